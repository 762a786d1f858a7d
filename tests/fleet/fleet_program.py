"""A small program whose requests show what a fleet does with them; importable, so that spawned workers find it."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fedelta.core.errors import BadInput, TrainingFailed
from fedelta.core.messages import Replies, Reply, Request, Requests
from fedelta.core.parameters import Parameters
from fedelta.core.program import Fleet, Report, Site
from fedelta.core.seeds import generator, seeded

NAMES = ("amber", "birch", "cedar", "dune", "elm")


def load(name: str) -> tuple[Tensor, Tensor]:
    """A site's data: 24 rows of 6 features, and a class of 3."""
    if name == "elm":
        raise FileNotFoundError(2, "no such file", "elm.csv")
    inputs = torch.randn(24, 6, generator=generator(1, name))
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


def model() -> nn.Module:
    with seeded(5):
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3))


@dataclass(frozen=True)
class Play:
    """`handle` does what `op` says; `step` is one round of federated averaging, dropout included.

    `handle_many` does it for each site, one after the other, and where there is a `_many` of it, that.
    """

    rounds: int = 3

    def init(self) -> tuple[int, Tensor]:
        return 0, Parameters.of(model()).vector

    def finished(self, state: tuple[int, Tensor]) -> str | None:
        return "all rounds done" if state[0] == self.rounds else None

    def step(self, state: tuple[int, Tensor], fleet: Fleet) -> tuple[tuple[int, Tensor], Report]:
        number, vector = state[0] + 1, state[1]
        shared = {"vector": vector}
        for name in NAMES:
            fleet.submit(Request(to=name, op="train", round=number, base=number - 1, shared=shared))
        replies: dict[str, Reply] = {}
        while (reply := fleet.next_reply()) is not None:
            replies[reply.sender] = reply
        absent = {name: reply.error for name, reply in replies.items() if reply.error is not None}
        deltas = [replies[name].body["difference"] for name in NAMES if name not in absent]
        return (number, vector + torch.stack(deltas).mean(0)), Report(round=number, absent=absent)

    def handle(self, request: Request, site: Site) -> Reply:
        return getattr(self, request.op)(request, site)  # type: ignore[no-any-return]

    def handle_many(self, requests: Requests, sites: Sequence[Site]) -> Replies:
        assert [site.id for site in sites] == [*requests.to]
        own = getattr(self, f"{requests.op}_many", None)
        if own is not None:
            return own(requests, sites)  # type: ignore[no-any-return]
        body, errors = {}, {}
        for request, site in zip(requests, sites, strict=True):
            try:
                body |= {f"{site.id}/{name}": x for name, x in self.handle(request, site).body.items()}
            except OSError as error:
                errors[site.id] = str(error)
        senders = [name for name in requests.to if name not in errors]
        return Replies(senders=senders, answers=requests.id, round=requests.round, body=body, errors=errors)

    def echo_many(self, requests: Requests, sites: Sequence[Site]) -> Replies:
        body = {f"shared/{name}": x for name, x in requests.shared.items()}
        for name in requests.to:
            body |= {f"{name}/{key}": x for key, x in requests.bodies.get(name, {}).items()}
        body["bases"] = torch.tensor([requests.bases.get(name, -1) for name in requests.to])
        body["threads"] = torch.tensor(torch.get_num_threads())
        return Replies(senders=requests.to, answers=requests.id, round=requests.round, body=body)

    def fail_many(self, requests: Requests, sites: Sequence[Site]) -> Replies:
        """Fail as `job` says."""
        return self.fail(Request(to="", op="fail", round=0, meta={"kind": requests.job}), sites[0])  # type: ignore[return-value]

    def mistake_many(self, requests: Requests, sites: Sequence[Site]) -> Replies:
        """Answer what was not asked, as `job` says."""
        answers = "other requests" if requests.job == "stray" else requests.id
        senders = {"missing": requests.to[1:], "double": [*requests.to, requests.to[0]], "more": [*requests.to, "fir"]}
        errors = {requests.to[0]: "failed"} if requests.job == "both" else {}
        body = {"w": torch.eye(3).to_sparse()} if requests.job == "unsendable" else {}
        who = senders.get(requests.job, requests.to)
        return Replies(senders=who, answers=answers, round=requests.round, body=body, errors=errors)

    def overwrite_many(self, requests: Requests, sites: Sequence[Site]) -> Replies:
        for tensors in (requests.shared, *requests.bodies.values()):
            for tensor in tensors.values():
                tensor.add_(1)
        return Replies(senders=requests.to, answers=requests.id, round=requests.round)

    def die_many(self, requests: Requests, sites: Sequence[Site]) -> Replies:
        """Be killed, as often as `job` says: "times folder"."""
        times, _, folder = requests.job.partition(" ")
        self.die(Request(to="", op="die", round=0, meta={"times": times, "folder": folder}), sites[0])
        return Replies(senders=requests.to, answers=requests.id, round=requests.round)

    def gate_many(self, requests: Requests, sites: Sequence[Site]) -> Replies:
        """As `gate`, for the first site alone; the folder is the job."""
        meta = {"folder": requests.job}
        self.gate(Request(to=sites[0].id, op="gate", round=requests.round, meta=meta), sites[0])
        return Replies(senders=requests.to, answers=requests.id, round=requests.round)

    def gate(self, request: Request, site: Site) -> Reply:
        """Say that this site has begun, and in which process; then wait until it may end, for at most a minute."""
        folder = Path(str(request.meta["folder"]))
        with (folder / "begun").open("a") as file:
            file.write(f"{site.id} {request.round} {os.getpid()}\n")
        for _ in range(6000):
            if (folder / site.id).exists():
                return Reply(sender=site.id, answers=request.id, round=request.round, meta={"pid": os.getpid()})
            time.sleep(0.01)
        raise BadInput(f"nobody let {site.id} go")

    def rest(self, request: Request, site: Site) -> Reply:
        """Take as many seconds as the request says; and say who came before, by the file `begun`."""
        with (Path(str(request.meta["folder"])) / "begun").open("a") as file:
            file.write(f"{site.id}\n")
        time.sleep(float(str(request.meta["seconds"])))
        return Reply(sender=site.id, answers=request.id, round=request.round)

    def echo(self, request: Request, site: Site) -> Reply:
        return Reply(
            sender=site.id,
            answers=request.id,
            round=request.round,
            body={**{f"shared/{k}": v for k, v in request.shared.items()}, **request.body},
            meta={**request.meta, "base": request.base, "job": request.job, "threads": torch.get_num_threads()},
        )

    def train(self, request: Request, site: Site) -> Reply:
        net = model()
        start = Parameters.of(net).like(request.shared["vector"])
        start.load(net)
        data = site.data().train
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        with seeded(7, request.round, site.id, "dropout"):
            for rows in torch.randperm(len(data)).split(8):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(data.inputs["x"][rows]), data.targets[rows]).backward()
                optimizer.step()
        return Reply.to_request(request, {"difference": Parameters.of(net).vector - start.vector})

    def count(self, request: Request, site: Site) -> Reply:
        """How often this site was asked, by its memory; and within this attempt, by its scratch."""
        asked = site.memory.at(request.base).get("asked", torch.tensor(0)) + 1
        site.memory.commit(request.base, request.round, {"asked": asked})
        site.scratch["asked"] = tried = int(str(site.scratch.get("asked", 0))) + 1
        return Reply.to_request(request, {"asked": asked, "tried": torch.tensor(tried)})

    def keep(self, request: Request, site: Site) -> Reply:
        """Keep the broadcast itself, not a copy, for the rest of the attempt."""
        kept = site.scratch.setdefault("kept", request.shared)
        assert isinstance(kept, dict)
        return Reply.to_request(request, {"kept": kept["vector"].clone()})

    def fail(self, request: Request, site: Site) -> Reply:
        if request.meta["kind"] == "allocation":
            torch.empty(10**14)  # more than a process can address
        errors = {"user": TrainingFailed("the loss is NaN; lower the learning rate"), "memory": MemoryError()}
        raise errors[str(request.meta["kind"])]

    def bug(self, request: Request, site: Site) -> Reply:
        raise KeyError("not what was meant")

    def leave(self, request: Request, site: Site) -> Reply:
        raise SystemExit(3)

    def overwrite(self, request: Request, site: Site) -> Reply:
        request.shared["vector"].add_(1)
        return Reply.to_request(request, {})

    def stray(self, request: Request, site: Site) -> Reply:
        return Reply(sender=site.id, answers="another request", round=request.round)

    def unsendable(self, request: Request, site: Site) -> Reply:
        """A reply with the one thing in it that no message carries."""
        what = {"sparse": {"body": {"w": torch.eye(3).to_sparse()}}, "set": {"meta": {"m": {1, 2}}}}
        what["tuple"] = {"meta": {"m": (1, 2)}}
        return Reply(sender=site.id, answers=request.id, round=request.round, **what[str(request.meta["kind"])])  # type: ignore[arg-type]

    def whoami(self, request: Request, site: Site) -> Reply:
        return Reply(sender=site.id, answers=request.id, round=request.round, meta={"pid": os.getpid()})

    def wait(self, request: Request, site: Site) -> Reply:
        """Say that the work has begun, then wait until it may end; for at most a minute."""
        folder = Path(str(request.meta["folder"]))
        with (folder / "begun").open("a") as file:
            file.write(f"{site.id}\n")
        for _ in range(6000):
            if (folder / "go").exists():
                return Reply.to_request(request, {})
            time.sleep(0.01)
        raise BadInput("nobody said go")

    def die(self, request: Request, site: Site) -> Reply:
        """Be killed, the first `times` times."""
        deaths = Path(str(request.meta["folder"])) / "deaths"
        before = len(deaths.read_text()) if deaths.exists() else 0
        if before < int(str(request.meta["times"])):
            deaths.write_text("x" * (before + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return Reply(sender=site.id, answers=request.id, round=request.round, meta={"pid": os.getpid()})

    def map(self, request: Request, site: Site) -> Reply:
        """The file behind the memory that holds each tensor: device and inode, by /proc."""
        where = {}
        for name, tensor in {**request.shared, **request.body}.items():
            for line in Path("/proc/self/maps").read_text().splitlines():
                fields = line.split()
                low, high = (int(bound, 16) for bound in fields[0].split("-"))
                if low <= tensor.data_ptr() < high:
                    where[name] = " ".join(fields[3:5])
        return Reply(sender=site.id, answers=request.id, round=request.round, meta=dict(where))
