"""At the end of a run every site has its model: `fedelta serve`, and sites that keep what it hands over."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.in_process import Fedelta, fedelta
from tests.fleet.remote_sites import Running, site
from tests.ports import free_port
from torch import nn

from fedelta import SGD, Classification, ExampleLevel, FedAvg, Federation, Task, Training
from fedelta.cli.experiment import federated
from fedelta.cli.facts import facts
from fedelta.cli.models import guaranteed, kept_by, promised
from fedelta.fleet.departures import Departures, read
from fedelta.fleet.policy import NO_POLICY, Door

__all__ = ["fedelta"]  # a fixture

PLAIN = '''
"""Two sites of three classes."""
import torch
from torch import nn
from fedelta import SGD, Classification, FedAvg, Federation, Task, Training

def program():
    task = Task(model=lambda: nn.Linear(6, 3), objective=Classification(classes=3))
    training = Training(optimizer=SGD(lr=0.1), batch=4)
    return Federation(algorithm=FedAvg(task=task, training=training), rounds=2)

def site(name):
    g = torch.Generator().manual_seed(ord(name))
    return torch.randn(40, 6, generator=g), torch.randint(0, 3, (40,), generator=g)

def sites():
    return ["a", "b"]
'''
TUNED = '''
"""Two sites with the head of a BERT."""
import torch
from fedelta import SGD, Classification, Examples, FedAvg, Federation, Head, Pretrained, Task, Training

def program():
    model = Pretrained(source="{model}", labels=("x", "y", "z"), tuning=Head())
    task = Task(model=model, objective=Classification(classes=3))
    return Federation(algorithm=FedAvg(task=task, training=Training(optimizer=SGD(lr=0.1), batch=4)), rounds=2)

def site(name):
    ids = torch.randint(5, 18, (8, 6), generator=torch.Generator().manual_seed(ord(name)))
    return Examples({{"input_ids": ids, "attention_mask": torch.ones_like(ids)}}, ids[:, 0] % 3)

def sites():
    return ["a", "b"]
'''
PERSONAL = '''
"""Three sites with a Llama of which each keeps its own half of the factors."""
import torch
from fedelta import (
    CAUSAL_LANGUAGE_MODEL, SGD, Examples, Federation, FedSALoRA, Fixed, LanguageModel, LoRA, Pretrained, SiteData,
    Task, Training,
)

MODEL = "{model}"

def program():
    tuning = LoRA(rank=2, targets=("q_proj", "v_proj"))
    model = Pretrained(source=MODEL, kind=CAUSAL_LANGUAGE_MODEL, tuning=tuning)
    training = Training(optimizer=SGD(lr=0.5), batch=2)
    algorithm = FedSALoRA(task=Task(model=model, objective=LanguageModel()), training=training)
    return Federation(algorithm=algorithm, rounds=3, sampling=Fixed(size=2), validate_at_sites=True)

def site(name):
    ids = torch.randint(3, 500, (6, 8), generator=torch.Generator().manual_seed(ord(name)))
    rows = Examples({{"input_ids": ids, "attention_mask": torch.ones_like(ids)}}, ids)
    return SiteData(train=rows[:4], validation=rows[4:])

def sites():
    return ["a", "b", "c"]
'''


@pytest.fixture(autouse=True)
def folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@contextmanager
def joined(experiment: Path, port: int, *names: str) -> Iterator[list[Running]]:
    """Sites as `fedelta join` makes them, in threads; they wait for a coordinator."""
    loaded, program = federated(experiment, (), test=False)
    with ExitStack() as stack:
        running = []
        for name in names:
            folder = Path("joined") / name
            folder.mkdir(parents=True, exist_ok=True)
            running.append(
                stack.enter_context(
                    site(
                        program,
                        loaded.data,
                        name,
                        port,
                        credentials=None,
                        folder=folder,
                        keep=kept_by(name, folder, experiment.stem, program, loaded.names()),
                        guards=Door(NO_POLICY, facts(program, name), Departures.open(folder / "log")),
                    )
                )
            )
        yield running
        for one in running:
            assert one.result() == "the run is over"


@pytest.fixture
def serve(fedelta: Fedelta) -> Callable[..., str]:
    def served(experiment: Path, *options: object, sites: str) -> str:
        """What the coordinator and these sites print."""
        port = free_port()
        with joined(experiment, port, *sites):
            at = ["--listen", f"127.0.0.1:{port}", "--insecure"]
            return fedelta("serve", experiment, *at, "--out", "run", *options)

    return served


def written(text: str) -> Path:
    path = Path("experiment.py")
    path.write_text(text)
    return path


def test_sites_end_with_the_model_of_the_coordinator(serve: Callable[..., str]) -> None:
    printed = serve(written(PLAIN), sites="ab")
    model = Path("run/model.safetensors").read_bytes()
    for name in "ab":
        assert (Path("joined") / name / "model.safetensors").read_bytes() == model
        assert f"{name}: the model is in joined/{name}/model.safetensors." in printed
        last = read(Path("joined") / name / "log")[-1].entry
        assert (last.op, last.round, last.bytes, last.tensors, last.error) == ("model", 2, 0, (), None)
    assert "The model is at a, b." in printed


def test_a_site_that_is_away_is_named_and_a_run_that_is_over_hands_over_again(serve: Callable[..., str]) -> None:
    file = written(PLAIN)
    printed = serve(file, "--min-sites", 1, "--absence", 1, sites="a")
    assert "Not here: b; who is away for 1 s gets none." in printed
    assert "The model is at a; not at b: --resume hands it over again." in printed
    assert not Path("joined/b").exists()
    model, rounds = Path("run/model.safetensors").read_bytes(), Path("run/rounds.jsonl").read_bytes()
    Path("joined/a/model.safetensors").write_text("of a run before")
    printed = serve(file, "--resume", sites="ab")
    assert "The model is at a, b." in printed
    assert "a: the model of before is in joined/a/model-1.safetensors." in printed
    assert Path("joined/a/model-1.safetensors").read_text() == "of a run before"
    for folder in ("run", "joined/a", "joined/b"):
        assert (Path(folder) / "model.safetensors").read_bytes() == model
    assert Path("run/rounds.jsonl").read_bytes() == rounds


def test_nothing_is_handed_over_that_is_not_to_be(serve: Callable[..., str]) -> None:
    printed = serve(written(PLAIN), "--no-hand-over", sites="ab")
    assert "The model is at" not in printed
    assert Path("run/model.safetensors").exists()
    assert not [*Path("joined").rglob("model*")]


def test_what_a_site_has_in_the_way_is_set_aside(serve: Callable[..., str], bert: Path) -> None:
    own = Path("joined/b/model")
    own.mkdir(parents=True)
    (own / "thesis.txt").write_text("years of work")
    printed = serve(written(TUNED.format(model=bert)), sites="ab")
    assert "The model is at a, b." in printed
    assert [path.name for path in Path("joined/b/model-1").iterdir()] == ["thesis.txt"]
    there, here = Path("run/model"), Path("joined/a/model")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (here / name).read_bytes() == (there / name).read_bytes()
    card = (here / "README.md").read_text()
    assert "| kept by the site | a |" in card
    assert "| rounds | 2 rounds |" in card
    assert "| sites | 2 |" in card
    assert (there / "README.md").read_text().partition("| sites |")[0] == card.partition("| kept by")[0]


def test_each_site_has_its_own_model_where_a_part_stays_with_it(
    serve: Callable[..., str], fedelta: Fedelta, shared: Callable[[str], Path]
) -> None:
    file = written(PERSONAL.format(model=shared("weights-stories260K/hf")))
    printed = serve(file, sites="abc")
    fedelta("run", file, "--plan", "plain", "--workers", 0, "--out", "here")
    rounds: list[list[dict[str, Any]]] = [
        [json.loads(line) for line in (Path(run) / "rounds.jsonl").read_text().splitlines()] for run in ("here", "run")
    ]
    for one, other in zip(*rounds, strict=True):
        assert one["metrics"]["validation_perplexity"] == other["metrics"]["validation_perplexity"]
        assert one["per_site"] == other["per_site"]
        assert one["per_site"].keys() == {"a", "b", "c"}
    models = []
    for name in "abc":
        own, simulated = Path("joined") / name / "model", Path("here/models") / name
        assert {path.name for path in own.iterdir()} == {path.name for path in simulated.iterdir()}
        models.append(load_file(own / "adapter_model.safetensors"))
        expected = load_file(simulated / "adapter_model.safetensors")
        assert models[-1].keys() == expected.keys()
        assert all(torch.equal(models[-1][key], expected[key]) for key in expected)
        assert f"{name}: its model is in joined/{name}/model." in printed
    b = [key for key in models[0] if "lora_B" in key]
    assert b
    assert not any(torch.equal(models[0][key], models[1][key]) for key in b)
    assert "A model for each site: at that site alone; what they have in common is in run/state.safetensors" in printed
    assert not [*Path("run").glob("model*")]
    shutil.rmtree("joined/a/model")
    assert "The model is at a, b, c." in serve(file, "--resume", sites="abc")
    again = load_file("joined/a/model/adapter_model.safetensors")
    assert all(torch.equal(again[key], models[0][key]) for key in again)


def test_a_site_says_of_a_guarantee_what_its_experiment_promises() -> None:
    task = Task(model=partial(nn.Linear, 6, 3), objective=Classification(classes=3))
    algorithm = FedAvg(task=task, training=Training(optimizer=SGD(lr=0.1), batch=4))
    program = Federation(algorithm=algorithm, rounds=2)
    assert promised(program) == guaranteed(program) == "not bounded: no noise was accounted for"
    private = replace(program, privacy=ExampleLevel(clip=1.0, epsilon=8.0, delta=1e-6))
    said = "example-level differential privacy, as the experiment promises it: epsilon 8 at delta 1e-06"
    assert promised(private) == said


def test_a_round_need_not_wait_for_all(serve: Callable[..., str]) -> None:
    printed = serve(written(PLAIN), "--enough", 1, "--rounds", 6, sites="ab")
    assert "The model is at a, b." in printed
    rounds = [json.loads(line) for line in Path("run/rounds.jsonl").read_text().splitlines()]
    assert len(rounds) == 6
    assert all(len(one["absent"]) <= 1 for one in rounds)
    assert {why for one in rounds for why in one["absent"].values()} == {"enough sites had answered before it did"}
