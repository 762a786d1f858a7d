"""`fedelta run` as a user would call it: in a process of its own, on an experiment file."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.in_process import Fedelta, fedelta

__all__ = ["fedelta"]  # a fixture


EXPERIMENT = '''
"""Six sites of three classes; BatchNorm and dropout."""
import torch
from torch import nn
from fedelta import SGD, Classification, FedAdam, FedAvg, FedOpt, Federation, Fixed, Task, Training

ROWS = 40
BROKEN = ""

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)
        self.drop, self.second = nn.Dropout(0.3), nn.Linear(16, 3)

    def forward(self, x):
        return self.second(self.drop(self.norm(self.first(x)).relu()))

def program():
    task = Task(model=Net, objective=Classification(classes=3))
    client = FedAvg(task=task, training=Training(optimizer=SGD(lr=0.1), batch=8))
    return Federation(algorithm=FedOpt(client=client, server=FedAdam(lr=0.03)), sampling=Fixed(size=4), rounds=6)

def sites():
    return [f"s{i}" for i in range(6)]

def examples(seed, n):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    x = torch.randn(n, 6, generator=g)
    x[torch.arange(n), y] += 2
    return x, y

def site(name):
    if name == BROKEN:
        raise FileNotFoundError(f"{name}.csv is not there")
    return examples(int(name[1:]), ROWS)

def test():
    return examples(100, 200)
'''


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "exp.py"
    path.write_text(EXPERIMENT)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from fedelta.cli.main import main; main()", *map(str, arguments)]


def model(out: Path) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(load_file(out / "model.safetensors").items())])


def test_a_run_trains_reports_and_saves(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = fedelta("run", experiment, "--out", out, "--rounds", 8)
    assert "Test set: Average loss: " in printed
    line = next(line for line in printed.splitlines() if line.startswith("Test set"))
    correct, total = map(int, line.split("Accuracy: ")[1].split(" ")[0].split("/"))
    assert total == 200
    assert correct > 120
    reports = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [report["round"] for report in reports] == list(range(1, 9))
    assert reports[-1]["metrics"]["test_accuracy"] == correct / total
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    namespace: dict[str, object] = {}
    exec(EXPERIMENT, namespace)
    net = namespace["Net"]()  # type: ignore[operator]
    net.load_state_dict(load_file(out / "model.safetensors"))
    x, y = namespace["test"]()  # type: ignore[operator]
    assert int((net.eval()(x).argmax(1) == y).sum()) == correct


def test_workers_and_one_process_give_the_same_bits(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    for workers in (0, 1, 3):
        fedelta("run", experiment, "--out", tmp_path / f"w{workers}", "--workers", workers)
    assert torch.equal(model(tmp_path / "w0"), model(tmp_path / "w1"))
    assert torch.equal(model(tmp_path / "w0"), model(tmp_path / "w3"))
    fedelta("run", experiment, "--out", tmp_path / "other", "--seed", 1)
    assert not torch.equal(model(tmp_path / "w0"), model(tmp_path / "other"))


# The base of FLoRA, and the B of FedSA-LoRA, are in the sites' memories.
REMEMBERING = """
from fedelta.adapters.{module} import {name}
from fedelta.learning.lora import LoRA

def build():
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return LoRA(rank=2, targets=("0",)).apply(net)

def program():
    task = Task(model=build, objective=Classification(classes=3))
    algorithm = {name}(task=task, training=Training(optimizer=SGD(lr=0.1), batch=8))
    return Federation(algorithm=algorithm, sampling=Fixed(size=4), rounds=6, validate_at_sites=True)

del test
"""


def test_what_sites_keep_outlives_the_run(fedelta: Fedelta, tmp_path: Path) -> None:
    """Other processes, and other numbers of them, go on with it; the folder of a run without any does not have it."""
    for module, name in (("flora", "FLoRA"), ("fedsa_lora", "FedSALoRA")):
        path = tmp_path / f"{module}.py"
        path.write_text(EXPERIMENT + REMEMBERING.format(module=module, name=name))
        whole, parts = tmp_path / f"{module}-whole", tmp_path / f"{module}-parts"
        fedelta("run", path, "--out", whole, "--rounds", 4, "--workers", 0)
        fedelta("run", path, "--out", parts, "--rounds", 2, "--workers", 2)
        fedelta("run", path, "--out", parts, "--rounds", 4, "--workers", 0, "--resume")
        files = [sorted(out.glob("model*/*.safetensors")) or [out / "model.safetensors"] for out in (whole, parts)]
        assert len(files[0]) == (
            1 if name == "FLoRA" else len(json.loads((whole / "manifest.json").read_text())["data"]["sites"])
        )
        assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
        ends = [json.loads((out / "rounds.jsonl").read_text().splitlines()[-1]) for out in (whole, parts)]
        assert ends[0]["per_site"] == ends[1]["per_site"]
        assert (parts / "memory").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("remembering", ["", REMEMBERING.format(module="flora", name="FLoRA")])
def test_killed_twenty_times_it_ends_with_the_same_bits(
    fedelta: Fedelta, experiment: Path, tmp_path: Path, remembering: str
) -> None:
    """`kill -9` at a random moment, again and again, and --resume each time."""
    experiment.write_text(EXPERIMENT + remembering)
    every = 60 if remembering else 0  # where sites remember something, every round is committed
    rounds = 150
    fedelta("run", experiment, "--out", tmp_path / "whole", "--rounds", rounds)
    out = tmp_path / "killed"
    moments = random.Random(0)
    kills = resumed = 0
    while kills < 20:
        resume = ["--resume"] if (out / "manifest.json").exists() else []
        resumed += bool(resume)
        run = subprocess.Popen(
            command("run", experiment, "--out", out, "--rounds", rounds, "--commit-every", every, *resume),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        began = time.monotonic()
        # the first rounds of each attempt are waited for, so that the run advances
        lines = _lines(out)
        while run.poll() is None and _lines(out) < lines + 2 and time.monotonic() - began < 60:
            time.sleep(0.005)
        time.sleep(moments.random() * 0.05)
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
    assert kills == 20
    fedelta("run", experiment, "--out", out, "--rounds", rounds, "--resume")
    assert torch.equal(model(tmp_path / "whole"), model(out))
    reports = [json.loads(line)["round"] for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert reports == list(range(1, rounds + 1))


def _lines(out: Path) -> int:
    path = out / "rounds.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_ctrl_c_keeps_the_rounds_and_says_how_to_go_on(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["run", experiment, "--out", out, "--rounds", 100000]
    run = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while _lines(out) < 3 and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 130, stderr
    assert stderr.count("nterrupted") == 1
    assert "Continue with:" in stderr
    assert "Traceback" not in stderr
    found = re.search(r"(\d+) rounds are kept", stderr)
    assert found
    kept = int(found[1])
    assert _lines(out) - kept in (0, 1)  # the line of a round is there a moment before the round counts
    printed = fedelta("run", experiment, "--out", out, "--rounds", kept + 1, "--resume")
    assert f"Resumed after round {kept}." in printed
    assert _lines(out) == kept + 1


def test_an_error_leaves_the_report_of_the_rounds_before_it(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    """And a run that was never evaluated has a model and a report, too."""
    bug = """
    left = 45  # of the steps: 20 a round

    def forward(self, x):
        Net.left -= self.training
        if Net.left < 0:
            raise ZeroDivisionError("in round 3")
"""
    text = EXPERIMENT.replace("\n    def forward(self, x):\n", bug).replace("rounds=6", "rounds=6, evaluate_every=5")
    experiment.write_text(text)
    out = tmp_path / "out"
    assert "in round 3" in fedelta("run", experiment, "--out", out, "--workers", 0, status=1)
    assert "2 rounds" in (out / "report.html").read_text()
    assert not (out / "model.safetensors").exists()
    (out / "report.html").unlink()
    printed = fedelta("run", experiment, "--out", out, "--workers", 0, "--resume", "--rounds", 2)
    assert "Test set" not in printed
    assert (out / "report.html").exists()
    assert len(model(out))


def test_what_is_frozen_is_part_of_what_a_run_is(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    """Weights read from a file of the same name, of which a resume would otherwise not know that they changed."""
    body = tmp_path / "body.pt"
    frozen = f"""
        self.first.load_state_dict(torch.load({str(body)!r}))
        self.first.requires_grad_(False)

    def forward(self, x):
"""
    experiment.write_text(EXPERIMENT.replace("\n    def forward(self, x):\n", frozen))
    out = tmp_path / "out"
    torch.save({"weight": torch.ones(16, 6), "bias": torch.zeros(16)}, body)
    fedelta("run", experiment, "--out", out, "--rounds", 1, "--workers", 0)
    fedelta("run", experiment, "--out", out, "--rounds", 2, "--workers", 0, "--resume")
    torch.save({"weight": torch.ones(16, 6), "bias": torch.ones(16)}, body)
    assert "model = " in fedelta("run", experiment, "--out", out, "--rounds", 3, "--workers", 0, "--resume", status=2)
    assert _lines(out) == 2


def test_a_plan_is_chosen_kept_on_resume_and_taken_from_another_run(
    fedelta: Fedelta, experiment: Path, tmp_path: Path
) -> None:
    plain, other, out = tmp_path / "plain", tmp_path / "other", tmp_path / "out"
    fedelta("run", experiment, "--out", plain, "--rounds", 1, "--plan", "plain")
    assert plan(plain) == {"threads": 1, "cohort": 1, "channels_last": False, "bf16": False, "device": "cpu"}
    chosen = {**plan(plain), "channels_last": True}
    shutil.copytree(plain, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"plan": chosen}))
    fedelta("run", experiment, "--out", out, "--rounds", 1, "--plan", other)
    assert plan(out) == chosen
    printed = fedelta("run", experiment, "--out", out, "--rounds", 2, "--resume")
    assert "Sites are trained" not in printed
    assert plan(out) == chosen
    assert "Sites are trained one by one" in fedelta("run", experiment, "--out", tmp_path / "auto", "--rounds", 1)
    error = fedelta("run", experiment, "--out", tmp_path / "x", "--plan", tmp_path / "nothing", status=2)
    assert "there is no run" in error


def plan(out: Path) -> object:
    return json.loads((out / "manifest.json").read_text())["plan"]


def test_a_second_run_into_the_same_folder_is_refused_and_nothing_is_lost(
    fedelta: Fedelta, experiment: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    fedelta("run", experiment, "--out", out, "--rounds", 2)
    before = model(out)
    error = fedelta("run", experiment, "--out", out, "--rounds", 2, status=2)
    assert "--resume" in error
    assert torch.equal(model(out), before)
    error = fedelta("run", experiment, "--out", out, "--resume", "--seed", 5, status=2)
    assert "seed" in error
    error = fedelta("run", experiment, "--out", out, "--resume", "--set", "ROWS=30", status=2)
    assert "data" in error
    experiment.write_text(EXPERIMENT.replace("nn.Linear(6, 16)", "nn.Linear(6, 17)").replace("Linear(16", "Linear(17"))
    assert "experiment" in fedelta("run", experiment, "--out", out, "--resume", status=2)


def test_a_site_without_its_data_is_absent_and_named(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = fedelta("run", experiment, "--out", out, "--set", "BROKEN=s2")
    assert "s2 has no data to train on" in printed
    absent = [json.loads(line)["absent"] for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert any("s2.csv is not there" in reasons.get("s2", "") for reasons in absent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("def site(", "def sight("), "does not define site()"),
        (("def program():", "def program():\n    raise KeyError('FOLDER')"), "KeyError: 'FOLDER' (when program()"),
        (("import torch\n", "import torch, nowhere\n"), "No module named 'nowhere'"),
        (("def sites():", "def sites()"), "SyntaxError"),
        (('return [f"s{i}" for i in range(6)]', "return []"), "must give distinct names"),
        (("return Federation(", "return dict("), "must return a Federation"),
        (("lr=0.1", "lr=-1"), "SGD.lr must be"),
        (("size=4", "size=40"), "40"),
        (("lr=0.1", "lr=1e30"), "learning rate 1e+30"),
        (("Linear(16, 3)", "Linear(17, 3)"), "shapes cannot be multiplied"),
    ],
)
def test_what_is_wrong_with_an_experiment_is_one_sentence(
    fedelta: Fedelta, experiment: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    assert change[0] in EXPERIMENT
    experiment.write_text(EXPERIMENT.replace(*change))
    bug = "shapes" in message  # of the user's model: found when it runs
    error = fedelta("run", experiment, "--out", tmp_path / "out", status=1 if bug else 2)
    assert message in error
    assert error.startswith("fedelta: ")
    assert len(error.strip().splitlines()) == 1


def test_wrong_arguments(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    assert "there is no experiment file" in fedelta("run", tmp_path / "no.py", status=2)
    assert "No such option" in fedelta("run", experiment, "--round", 3, status=2)
    assert "no constant ROW" in fedelta("run", experiment, "--set", "ROW=3", status=2)
    assert "needs a int" in fedelta("run", experiment, "--set", "ROWS=x", status=2)
    assert "NAME=VALUE" in fedelta("run", experiment, "--set", "ROWS", status=2)
    assert "no run to resume" in fedelta("run", experiment, "--out", tmp_path / "none", "--resume", status=2)
    assert "No such command" in fedelta("fly", status=2)


def test_debug_shows_the_traceback(experiment: Path) -> None:
    experiment.write_text("1 / 0")
    done = subprocess.run(command("run", experiment, "--debug"), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" in done.stderr


def test_trackers_get_every_round_once_over_a_resume(fedelta: Fedelta, experiment: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'fedelta[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, events = tmp_path / "out", tmp_path / "events"
    arguments = ("run", experiment, "--workers", 0, "--tensorboard", events, "--out")
    fedelta(*arguments, out, "--rounds", 2)
    fedelta(*arguments, out, "--rounds", 4, "--resume")
    found = EventAccumulator(str(events))
    found.Reload()
    reports = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    told = {event.step: event.value for event in found.Scalars("test_accuracy")}
    assert told == pytest.approx({report["round"]: report["metrics"]["test_accuracy"] for report in reports})
    assert [event.step for event in found.Scalars("bytes/up")] == [1, 2, 3, 4]
    settings = found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| algorithm.server.lr | 0.03 |" in settings
    assert "| seed | 0 |" in settings
    assert "has the rounds of another run" in fedelta(*arguments, tmp_path / "other", status=2)
    assert not (tmp_path / "other" / "rounds.jsonl").read_text()


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_read(
    fedelta: Fedelta, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("tensorboard", "mlflow"):
        monkeypatch.setattr("fedelta.core.extras.find_spec", lambda name: None)
        arguments = ("run", experiment, "--out", tmp_path / "out", f"--{library}", tmp_path / "told")
        error = fedelta(*arguments, status=2)
        assert error == f"fedelta: {library} is not installed; run: pip install 'fedelta[{library}]'\n"
        assert not (tmp_path / "out").exists()
    assert "--compare goes without --mlflow" in fedelta("run", experiment, "--compare", "--mlflow", "x", status=2)
