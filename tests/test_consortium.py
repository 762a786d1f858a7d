"""examples/consortium: what its files say, and, where there is time and the right to it, the whole of it."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedelta.cli.experiment import federated, opened
from fedelta.cli.facts import facts
from fedelta.fleet.policy import refusal
from fedelta.fleet.policy_file import parse

HERE = Path(__file__).resolve().parents[1] / "examples" / "consortium"
SITES = ["cleveland", "hungary", "switzerland"]
Opened = Callable[[str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """A file of the example, as its scripts import it."""
    monkeypatch.syspath_prepend(HERE)
    names = [path.stem for path in HERE.glob("*.py")]
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def keys(tmp_path: Path) -> str:
    """A setting: the folder with a public key of each hospital."""
    folder = tmp_path / "identities"
    folder.mkdir()
    for name in SITES:
        public = Ed25519PrivateKey.generate().public_key()
        text = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(text)
    return f"IDENTITIES={folder}"


def script(name: str, *arguments: object, **options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


# The files


@pytest.mark.parametrize("name", SITES)
def test_each_policy_allows_the_experiment_once_it_was_read_and_nothing_in_the_clear(name: str, keys: str) -> None:
    text = (HERE / "policies" / f"{name}.toml").read_text()
    _, masked = federated(HERE / "experiment.py", [keys], test=False)
    told = facts(masked, name, SITES)
    policy = parse(text.replace("0" * 64, told.experiment))
    assert refusal(policy, told) == []
    assert bool(refusal(parse(text), told)) == ("0" * 64 in text)
    _, clear = federated(HERE / "experiment.py", ["COLLECT=clear"], test=False)
    assert any("secure.collect" in why for why in refusal(policy, facts(clear, name, SITES)))


def test_the_policies_differ() -> None:
    texts = {re.sub(r"^(#|zone).*$", "", path.read_text(), flags=re.M) for path in (HERE / "policies").glob("*.toml")}
    assert len(texts) == 3


def test_a_fourth_of_each_hospital_is_held_back_and_no_finding_is_missing(shared: Callable[[str], Path]) -> None:
    data = shared("heart-disease")
    federation, sites = opened(HERE / "experiment.py", ["COLLECT=clear", f"DATA={data}"], rounds=None, seed=None)
    assert sites.names == SITES
    for name, rows, held_back in (("cleveland", 303, 76), ("hungary", 294, 74), ("switzerland", 323, 81)):
        own = sites(name)
        assert own.validation is not None
        assert (len(own.train) + len(own.validation), len(own.validation)) == (rows, held_back)
        x = own.train.inputs["x"]
        assert torch.isfinite(x).all()
        assert x.abs().max() < 10
        assert federation.algorithm.task.build(0)(x).shape == (rows - held_back, 2)


def test_the_scripts_know_the_files_of_the_experiment(module: Opened) -> None:
    assert module("parties").FILES == module("experiment").FILES


def test_a_record_becomes_numbers(module: Opened) -> None:
    experiment = module("experiment")
    line = "63.0,1.0,1.0,150,0,?,2.0,NaN,0.0,2.3,3.0,0.0,6.0,0"
    record = dict(zip([*experiment.COLUMNS, "num"], map(experiment.number, line.split(",")), strict=True))
    # age, pressure, what is missing in two ways, 2.3 mm, no vessel; a man; no or no known sugar, angina; kinds
    expected = [1.3, 1.0, 0.0, 0.0, 1.3, -1.0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0]
    assert experiment.features(record).tolist() == pytest.approx(expected)


# The scripts


def test_records_that_are_not_there_are_named_and_nothing_is_made(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with script("run.py", "--data", tmp_path, "--out", out) as one:
        printed, _ = one.communicate()
    assert one.returncode == 1
    assert f"consortium: there is no file {tmp_path / 'processed.cleveland.data'}; --data names a folder" in printed
    assert not out.exists()


def test_a_folder_that_is_in_use_is_left_alone(module: Opened, tmp_path: Path, shared: Callable[[str], Path]) -> None:
    parties, data = module("parties"), shared("heart-disease")
    (tmp_path / "mine").touch()
    with pytest.raises(parties.Failed, match="is there already; give another --out"):
        parties.Consortium.at(tmp_path, data)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_from_an_authority_to_a_model(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    with script("run.py", "--data", shared("heart-disease"), "--out", tmp_path / "out") as one:
        printed, _ = one.communicate()
    assert one.returncode == 0, printed
    for text in (
        "cleveland$ fedelta ca request cleveland --out certificates",
        "authority$ fedelta ca issue cleveland --request cleveland.csr",
        "refuses the experiment: secure.collect asks for masks, and there is clear",
        "20 train, 200 steps of secure sums",  # of a round's training and of its evaluation, five each
        "Ended after round 20",
    ):
        assert text in printed
    assert len(re.findall(r"departures\.jsonl: \d+ replies\. Nothing was altered, removed or moved\.", printed)) == 3
    here, there = re.findall(r"^ +([0-9a-f]{64})  \S+model\.safetensors$", printed, re.MULTILINE)
    assert here == there
    card = (tmp_path / "out" / "coordinator" / "run" / "card.md").read_text()
    assert here in card
    quality = {line.split("  ")[0]: float(line.split()[-2]) for line in printed.splitlines() if line.endswith("%")}
    alone = [auc for name, auc in quality.items() if name.endswith(" alone")]
    assert len(alone) == 3
    assert quality["the consortium"] > max(alone)
    assert quality["the consortium"] == pytest.approx(quality["all records in one place"], abs=0.02)


@pytest.mark.slow
def test_an_interrupt_ends_all_processes(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    out = tmp_path / "out"
    with script("run.py", "--data", shared("heart-disease"), "--out", out, start_new_session=True) as one:
        log = out / "hungary" / "join.log"
        while not log.exists():
            assert one.poll() is None
            time.sleep(0.05)
        one.send_signal(signal.SIGINT)
        printed, _ = one.communicate()
        assert one.returncode == 130
        assert printed.endswith("consortium: interrupted; all that was started has ended\n")
        with pytest.raises(ProcessLookupError):
            os.killpg(one.pid, 0)


# The network


@pytest.fixture
def network(module: Opened) -> Iterator[ModuleType]:
    """It skips the test where there is no right to make one."""
    found = module("network")
    try:
        with found.Network(["one"]).there():
            pass
    except found.Lacking as error:
        pytest.skip(str(error))
    return found


def test_who_has_no_right_to_a_network_is_told_so(module: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    network = module("network")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(network.Lacking, match="need root; try sudo"), network.Network(["one"]).there():
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    with (
        pytest.raises(network.Lacking, match="there is no program ip; install iproute2"),
        network.Network(["one"]).there(),
    ):
        pass


ECHO = """
import socket
connection, _ = socket.create_server(("{host}", 5555)).accept()
while came := connection.recv(65536):
    connection.sendall(came)
"""
CALL = """
import socket, sys, time
while True:
    try:
        connection = socket.create_connection(("{host}", 5555))
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
for number in range(100_000, 100_030):
    sent = str(number).encode()
    connection.sendall(sent)
    came = b""
    while len(came) < len(sent):
        came += connection.recv(65536)
    assert came == sent
    print(number, flush=True)
"""


def test_what_is_said_gets_over_a_bad_line_that_is_cut_and_mended(network: ModuleType) -> None:
    bad = network.Network(["far", "near"])
    host = bad.address("far")
    with bad.there():
        spaces = [line.split()[0] for line in subprocess.check_output(["ip", "netns"], text=True).splitlines()]
        own = [space for space in spaces if space.startswith(f"fedelta-{os.getpid()}-")]
        assert len(own) == 3
        echo = [*bad.inside("far"), sys.executable, "-c", ECHO.format(host=host)]
        command = [*bad.inside("near"), sys.executable, "-c", CALL.format(host=host)]
        with subprocess.Popen(echo) as far, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as near:
            assert near.stdout is not None
            assert next(near.stdout) == "100000\n"
            bad.cut("near")
            time.sleep(1)
            bad.mend("near")
            said = near.stdout.read().split()
            assert near.wait() == far.wait() == 0
        assert said == [str(number) for number in range(100_001, 100_030)]
        assert re.match(r"\d+ of \d+ packets", bad.traffic().replace(",", ""))
    left = subprocess.check_output(["ip", "netns"], text=True)
    assert not any(space in left for space in own)
    assert f": fd{os.getpid()}" not in subprocess.check_output(["ip", "link"], text=True)


@pytest.mark.slow
def test_the_bits_survive_delay_loss_and_a_cut(
    network: ModuleType, tmp_path: Path, shared: Callable[[str], Path]
) -> None:
    with script("network.py", "--data", shared("heart-disease"), "--out", tmp_path / "out") as one:
        printed, _ = one.communicate()
    assert one.returncode == 0, printed
    assert "The line of hungary is cut" in printed
    assert "20 rounds, nobody absent in any" in printed
    here, there = re.findall(r"^ +([0-9a-f]{64})  \S+model\.safetensors$", printed, re.MULTILINE)
    assert here == there
