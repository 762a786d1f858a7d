"""A site that uses nothing of fedelta but the messages of its protocol: what to write in another language.

    python examples/foreign_site.py --at 127.0.0.1:7443 --certificates at-north --rows north.csv --experiment DIGEST

It takes part in an experiment whose model is one linear layer with a bias, trained by FedAvg: docs/protocol.md. ROWS
is a table with the names of its columns in the first line; the last column is the class, as a whole number. DIGEST is
what `fedelta join --dry-run` prints. gRPC, protobuf, safetensors, BLAKE3, cryptography and NumPy are all that it needs;
the messages of frames.proto come compiled for Python. It keeps its replies in memory, so that a connection may break,
and not the process. The final model is NAME.npy.
"""

import argparse
import hashlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from safetensors.numpy import load, save

LEARNING_RATE, BATCH = 0.1, 16
CHUNK = 2**20
HELLO, WELCOME, REFUSED, REQUEST, REPLY, CHUNK_KIND, AGAIN, CANCEL, OVER = range(1, 10)

compiled = Path(__file__).resolve().parents[1] / "src/fedelta/fleet/frames_pb2.py"
spec = importlib.util.spec_from_file_location("frames_pb2", compiled)
assert spec is not None
assert spec.loader is not None
frames: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(frames)


def train(parameters: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """An update: one epoch of SGD over logistic regression from the global weights, in batches."""
    classes = parameters.size // (rows.shape[1] + 1)
    weight = parameters[: classes * rows.shape[1]].reshape(classes, -1).copy()  # as PyTorch flattens a Linear:
    bias = parameters[classes * rows.shape[1] :].copy()  # the weight row by row, then the bias
    loss = correct = steps = 0.0
    for start in range(0, len(rows), BATCH):
        x, y = rows[start : start + BATCH], labels[start : start + BATCH]
        logits = x @ weight.T + bias
        logits -= logits.max(axis=1, keepdims=True)
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        loss -= float(np.log(probabilities[np.arange(len(y)), y]).sum())
        correct += float((logits.argmax(axis=1) == y).sum())
        probabilities[np.arange(len(y)), y] -= 1
        weight -= LEARNING_RATE * probabilities.T @ x / len(y)
        bias -= LEARNING_RATE * probabilities.mean(axis=0)
        steps += 1
    numbers = {"weight": len(rows), "count": 1, "sum/examples": len(rows), "sum/loss": loss}
    numbers |= {"sum/correct": correct, "sum/steps": steps}
    difference = np.concatenate([weight.ravel(), bias]) - parameters
    return {"difference": difference.astype(np.float32)} | {
        name: np.array(value, np.float64) for name, value in numbers.items()
    }


class Site:
    """What outlasts a stream: the replies, by the digests of their requests."""

    def __init__(self, options: argparse.Namespace) -> None:
        table = np.loadtxt(options.rows, delimiter=",", skiprows=1)
        self.rows, self.labels = table[:, :-1].astype(np.float32), table[:, -1].astype(int)
        key = load_pem_private_key((options.certificates / "private.key").read_bytes(), password=None)
        if not isinstance(key, EllipticCurvePrivateKey):
            raise SystemExit("this site signs with P-256 only")
        self.key = key
        certificate = x509.load_pem_x509_certificate((options.certificates / "certificate.pem").read_bytes())
        self.name = str(certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)
        self.experiment = options.experiment
        self.replies: dict[bytes, list[bytes]] = {}  # the frames of each

    def hello(self) -> bytes:
        known = list(self.replies)[-64:]
        said = frames.Hello(protocol=1, name=self.name, experiment=self.experiment, known=known)
        return bytes([HELLO]) + bytes(said.SerializeToString())

    def answer(self, request: Any, shared: bytes, body: bytes) -> list[bytes]:
        """The frames of the reply to a request; the same ones if it was answered before."""
        if request.digest not in self.replies:
            error, content = "", b""
            if request.op == "train" and not body:
                content = save(train(load(shared)["parameters"], self.rows, self.labels))
            elif request.op == "model":  # the final one, which the site keeps
                np.save(f"{self.name}.npy", load(shared)["parameters"])
            else:
                error = f"this site does not know how to {request.op}"
            self.replies = {request.digest: self.framed(request, content, error)}
        return self.replies[request.digest]

    def framed(self, request: Any, content: bytes, error: str) -> list[bytes]:
        answers = f"{request.job}/{request.round}/{request.op}/{request.attempt}/{request.to}"
        said = [request.digest, answers.encode(), str(request.round).encode(), blake3(content).digest()]
        text = [error.encode()] if error else []
        signed = self.key.sign(statement(b"fedelta reply", *said, *text), ECDSA(SHA256()))
        reply = frames.Reply(digest=request.digest, answers=answers, round=request.round, body=len(content))
        reply.failed, reply.error, reply.signature = bool(error), error, signed
        chunks = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
        return [bytes([REPLY]) + reply.SerializeToString(), *(bytes([CHUNK_KIND]) + chunk for chunk in chunks)]


def statement(*parts: bytes) -> bytes:
    """What a signature is over: SHA-256 of the parts, each with its length in 8 bytes, little-endian, before it."""
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


def stream(site: Site, channel: grpc.Channel) -> str | None:
    """One stream, to its end: why the run is over, or None if it broke."""
    outgoing: SimpleQueue[bytes | None] = SimpleQueue()
    outgoing.put(site.hello())
    sending: Iterator[bytes] = iter(outgoing.get, None)
    request, parts = None, bytearray()
    for frame in channel.stream_stream("/fedelta.Fleet/Join")(sending):
        kind, payload = frame[0], frame[1:]
        if kind in (OVER, REFUSED):
            said = (frames.Over if kind == OVER else frames.Refused).FromString(payload)
            outgoing.put(None)
            return said.reason if kind == OVER or said.final else None
        if kind == REQUEST:
            request = frames.Request.FromString(payload)
            parts = bytearray(request.shared_head + request.body_head)
        elif kind == CHUNK_KIND:
            parts += payload
        elif kind == AGAIN:
            for part in site.replies[frames.Again.FromString(payload).digest]:
                outgoing.put(part)
        # a Welcome needs no answer; what a Cancel withdraws may be answered all the same
        if request is not None and len(parts) == request.shared + request.body:
            for part in site.answer(request, bytes(parts[: request.shared]), bytes(parts[request.shared :])):
                outgoing.put(part)
            request = None
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", required=True, metavar="HOST:PORT")
    parser.add_argument("--certificates", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    parser.add_argument("--experiment", required=True, metavar="DIGEST")
    options = parser.parse_args()
    site = Site(options)
    pem = [(options.certificates / name).read_bytes() for name in ("ca.pem", "private.key", "certificate.pem")]
    over = None
    while over is None:
        with grpc.secure_channel(options.at, grpc.ssl_channel_credentials(*pem)) as channel:
            try:
                over = stream(site, channel)
            except grpc.RpcError as error:
                print(f"{site.name}: {error.details()}", file=sys.stderr)
        time.sleep(0 if over else 1)
    print(f"{site.name}: {over}")


if __name__ == "__main__":
    main()
