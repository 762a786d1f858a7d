"""`fedelta finetune` on files as people have them; each run is compared with what the Python API does."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from fedelta import (
    AdamW,
    Classification,
    Dirichlet,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    Federation,
    FedOpt,
    FedProx,
    FedYogi,
    Fixed,
    Local,
    LoRA,
    Pretrained,
    Task,
    Training,
    run,
)
from fedelta.cli.main import main
from fedelta.core.digest import digest
from fedelta.core.examples import Examples
from fedelta.learning.bottleneck import Bottleneck
from fedelta.learning.closed_form import LDA, Ridge
from fedelta.learning.lora import IA3
from fedelta.learning.optimizers import Cosine
from fedelta.learning.pretrained import tokenizer
from fedelta.learning.prompts import Prefix, Prompt
from fedelta.learning.quantised import bits_of
from fedelta.learning.saving import load
from fedelta.learning.text import encode
from fedelta.learning.tuning import BitFit, Full, Head, HeadAndNorms, LastLayers, Tuning

CLASSES = ("no", "yes")
FILLING = ["the", "film", "plot", "was", "very", "dull", "story", "end"]
QUICK = ["--rounds", 1, "--workers", 0]  # in this process


def table(rows: int, seed: int) -> pandas.DataFrame:
    """Reviews that say "good" or "bad", by three critics with names that are not easy to print."""
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=rows)
    texts = [
        " ".join(random.permutation([*random.choice(FILLING, size=random.integers(1, 6)), ("bad", "good")[label]]))
        for label in labels
    ]
    critics = [["10", "2", "a/b [red]"][row % 3] for row in range(rows)]
    names = [CLASSES[label] for label in labels]
    return pandas.DataFrame({"title": random.choice(FILLING, rows), "text": texts, "label": names, "critic": critics})


TRAIN, TEST = table(30, 0), table(40, 1)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with train.csv and test.csv, where the run's folder goes as well."""
    TRAIN.to_csv(tmp_path / "train.csv", index=False)
    TEST.to_csv(tmp_path / "test.csv", index=False)
    return tmp_path


@dataclass(frozen=True)
class Command:
    """The command, called in this process; an option given replaces the usual one, None leaves it out."""

    capture: pytest.CaptureFixture[str]
    model: Path
    folder: Path

    def __call__(self, *more: object, status: int = 0, **options: object) -> str:
        """What it prints: on the standard output, or on standard error if it fails."""
        out = self.folder / "out"
        chosen = {
            "--model": self.model,
            "--data": self.folder / "train.csv",
            "--text": "text",
            "--label": "label",
            "--sites": 2,
            "--out": out,
            **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
        }
        given = [part for name, value in chosen.items() if value is not None for part in (name, value)]
        self.capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["finetune", *map(str, [*given, *QUICK, *more])])
        printed = self.capture.readouterr()
        assert ended.value.code == status, printed.out + printed.err
        if status == 0:
            assert printed.err == ""
            return printed.out
        return printed.err


@pytest.fixture
def finetune(capfd: pytest.CaptureFixture[str], files: Path, bert: Path) -> Command:
    return Command(capture=capfd, model=bert, folder=files)


def weights(out: Path) -> bytes:
    """The weights that were saved: whole, or LoRA factors and head."""
    (file,) = (out / "model").glob("*.safetensors")
    return file.read_bytes()


def experiment(finetune: Command) -> object:
    """The digest of the program that the last run was."""
    return json.loads((finetune.folder / "out" / "manifest.json").read_text())["experiment"]


def examples(rows: pandas.DataFrame, model: Path) -> Examples:
    labels = torch.tensor([CLASSES.index(name) for name in rows["label"]])
    return encode(rows["text"].tolist(), labels, tokenizer(str(model)), 16)


def federation(model: Path, tuning: Tuning, lr: float, **settings: Any) -> Federation[Any]:
    task = Task(model=Pretrained(source=str(model), labels=CLASSES, tuning=tuning), objective=Classification(classes=2))
    training = Training(optimizer=AdamW(lr=lr), batch=16, epochs=1, clip=1.0)
    return Federation(algorithm=FedAvg(task=task, training=training), **{"rounds": 1, "start": Ridge(), **settings})


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(**inputs).logits
    assert isinstance(found, torch.Tensor)
    return found


def loaded(folder: Path, base: Path, lora: bool) -> Any:
    """The saved model, as someone without fedelta loads it."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if not lora:
        return AutoModelForSequenceClassification.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(base, config=AutoConfig.from_pretrained(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return PeftModel.from_pretrained(plain, folder)


@pytest.mark.parametrize(
    ("source", "tune", "tuning", "lr"),
    [
        ("bert", "full", Full(), 5e-5),
        ("bert", "head", Head(), 1e-3),
        ("bert", "lora", LoRA(rank=8), 5e-4),
        ("gpt2", "lora", LoRA(rank=8), 5e-4),
        ("bert", "ia3", IA3(), 1e-2),
        ("gpt2", "bitfit", BitFit(), 2e-3),
    ],
)
def test_the_saved_model_is_that_of_the_python_api(
    request: pytest.FixtureRequest, finetune: Command, source: str, tune: str, tuning: Tuning, lr: float
) -> None:
    from transformers import AutoTokenizer

    base, folder = request.getfixturevalue(source), finetune.folder
    printed = finetune(model=base, test=folder / "test.csv", sites=3, alpha=0.5, tune=tune)

    program = federation(base, tuning, lr)
    train, test = examples(TRAIN, base), examples(TEST, base)
    parts = Dirichlet(alpha=0.5)(train.targets.numpy(), 3, 0)
    sites = {f"site-{i}": train[torch.from_numpy(rows)] for i, rows in enumerate(parts)}
    *_, (state, _) = run(program, Local(program, sites.__getitem__, list(sites), threads=1))
    expected = logits(program.model(state), test.inputs)

    words = AutoTokenizer.from_pretrained(folder / "out" / "model")
    words.pad_token = words.pad_token or words.eos_token
    inputs = words(TEST["text"].tolist(), padding=True, return_tensors="pt", return_token_type_ids=False)
    found = logits(loaded(folder / "out" / "model", base, tune in ("lora", "ia3")), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    correct = int((found.argmax(1) == test.targets).sum())
    card = (folder / "out" / "model" / "README.md").read_text()  # not peft's template, which says nothing
    assert f"| test accuracy | {2.5 * correct:.1f}% |" in card
    assert f"Accuracy: {correct}/40 ({2.5 * correct:.2f}%)" in printed
    assert experiment(finetune) == digest(program)


OTHERS: list[tuple[list[object], Tuning, float]] = [
    (["--tune", "last", "--layers", 2], LastLayers(count=2), 2e-4),
    (["--tune", "norms"], HeadAndNorms(), 1e-3),
    (["--tune", "adapter", "--width", 4], Bottleneck(width=4), 1e-3),
    (["--tune", "prompt", "--virtual-tokens", 3], Prompt(tokens=3), 3e-2),
    (["--tune", "prefix", "--virtual-tokens", 2, "--lr", 0.1], Prefix(tokens=2), 0.1),
    (["--rank", 4, "--rslora"], LoRA(rank=4, rslora=True), 5e-4),
]


@pytest.mark.parametrize(("options", "tuning", "lr"), OTHERS, ids=lambda value: type(value).__name__)
def test_every_other_tuning(finetune: Command, options: list[object], tuning: Tuning, lr: float) -> None:
    """The same experiment as in Python, and a model that loads."""
    finetune("--max-length", 12, *options)
    assert experiment(finetune) == digest(federation(finetune.model, tuning, lr))
    model = load(finetune.folder / "out" / "model")
    assert logits(model, examples(TEST, finetune.model).inputs).shape == (40, 2)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'fedelta[quantised]'"
)
@pytest.mark.parametrize(("tune", "tuning", "lr"), [("lora", LoRA(rank=8), 5e-4), ("head", Head(), 1e-3)])
def test_frozen_weights_in_fewer_bits(finetune: Command, tune: str, tuning: Tuning, lr: float) -> None:
    finetune(tune=tune, bits=4)
    program = federation(finetune.model, tuning, lr)
    task = program.algorithm.task
    rounded = replace(task, model=replace(task.model, bits=4))
    program = replace(program, algorithm=replace(program.algorithm, task=rounded))
    assert experiment(finetune) == digest(program)
    model = load(finetune.folder / "out" / "model")
    assert bits_of(model) == (4 if tune == "lora" else None)


SERVERS = [
    (["--algorithm", "fedavgm"], FedAvgM()),
    (["--algorithm", "fedadam", "--server-lr", 0.02], FedAdam(lr=0.02)),
    (["--algorithm", "fedyogi"], FedYogi()),
    (["--algorithm", "fedadagrad", "--server-lr", 0.5], FedAdagrad(lr=0.5)),
]


@pytest.mark.parametrize(("options", "server"), SERVERS, ids=lambda value: type(value).__name__)
def test_server_optimisers(finetune: Command, options: list[object], server: Any) -> None:
    finetune("--tune", "head", *options)
    program = federation(finetune.model, Head(), 1e-3)
    program = replace(program, algorithm=FedOpt(client=program.algorithm, server=server))
    assert experiment(finetune) == digest(program)


@pytest.mark.parametrize(("name", "start"), [("ridge", Ridge()), ("lda", LDA()), ("drawn", None)])
def test_where_the_head_starts(finetune: Command, name: str, start: Any) -> None:
    finetune("--tune", "head", "--start", name, "--features", finetune.folder / "kept")
    assert experiment(finetune) == digest(federation(finetune.model, Head(), 1e-3, start=start))
    rounds = (finetune.folder / "out" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in rounds] == ([1] if start is None else [0, 1])
    assert len(list((finetune.folder / "kept").iterdir())) == 3  # of two sites and the test rows


def test_a_head_that_is_pre_trained_stays_as_it_is(finetune: Command, bert_tokenizer: Any) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(finetune.model, num_labels=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(finetune.model)
    finetune("--tune", "head")
    assert experiment(finetune) == digest(federation(finetune.model, Head(), 1e-3, start=None))


@pytest.mark.parametrize(("options", "mu"), [([], 0.01), (["--mu", 0.3], 0.3)])
def test_fedprox(finetune: Command, options: list[object], mu: float) -> None:
    finetune("--algorithm", "fedprox", "--tune", "head", *options)
    program = federation(finetune.model, Head(), 1e-3)
    client = program.algorithm
    program = replace(program, algorithm=FedProx(task=client.task, training=client.training, mu=mu))
    assert experiment(finetune) == digest(program)


def test_every_other_option(finetune: Command) -> None:
    options = {"rank": 4, "lr": 0.002, "batch": 5, "epochs": 2, "per_round": 2, "seed": 7, "max_length": 4}
    options["schedule"] = "cosine"
    printed = finetune("--text", "title", "--bf16", sites=3, test_fraction=0.5, **options)
    assert "/15 (" in printed  # half of the rows are test rows
    program = federation(finetune.model, LoRA(rank=4), 0.002, sampling=Fixed(size=2), seed=7)
    client = program.algorithm
    training = replace(client.training, batch=5, epochs=2, schedule=Cosine(rounds=1, floor=0.1))
    program = replace(program, algorithm=FedAvg(task=client.task, training=training))
    assert experiment(finetune) == digest(program)
    assert json.loads((finetune.folder / "out" / "manifest.json").read_text())["plan"]["bf16"] is True
    zeroth, first = map(json.loads, (finetune.folder / "out" / "rounds.jsonl").read_text().splitlines())
    assert (len(zeroth["cohort"]), len(first["cohort"])) == (3, 2)  # round zero is of all sites


def test_natural_sites_take_part_under_their_names(finetune: Command) -> None:
    printed = finetune(sites=None, split_by="critic", tune="head", test_fraction=0)
    *_, report = (finetune.folder / "out" / "rounds.jsonl").read_text().splitlines()
    assert json.loads(report)["cohort"] == ["10", "2", "a/b [red]"]
    assert "a/b [red]" in printed
    assert "Test set" not in printed


def test_a_resumed_run_ends_with_the_same_model(finetune: Command) -> None:
    out = finetune.folder / "halves"
    finetune("--rounds", 3, tune="head")
    finetune("--rounds", 1, tune="head", out=out)
    first = weights(out)
    assert "Resumed after round 1." in finetune("--rounds", 3, "--resume", tune="head", out=out)
    assert weights(out) == weights(finetune.folder / "out") != first
    for options in ({"tune": "full"}, {"tune": "head", "seed": 1}, {"tune": "head", "batch": 3}):
        assert "continue it as it was started" in finetune("--rounds", 4, "--resume", out=out, status=2, **options)
    assert "already holds a run" in finetune(tune="head", status=2)


def test_with_an_empty_home_nothing_is_said_or_written_elsewhere(files: Path, bert: Path) -> None:
    """As a user calls it: two worker processes, and nothing to go by but the files."""
    home, work = files / "home", files / "work"
    home.mkdir()
    work.mkdir()
    script = "from fedelta.cli.main import main; main()"
    options = ["--model", bert, "--data", files / "train.csv", "--text", "text", "--label", "label", "--sites", 2]
    kept = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
    done = subprocess.run(
        [sys.executable, "-c", script, "finetune", *map(str, options), "--workers", "2", "--rounds", "1"],
        capture_output=True,
        text=True,
        cwd=work,
        env={name: os.environ[name] for name in kept if name in os.environ} | {"HOME": str(home)},
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Test set: Average loss: " in done.stdout
    assert [path.name for path in work.iterdir()] == ["runs"]
    assert {path.name for path in (work / "runs" / "finetune").iterdir()} >= {"model", "report.html", "manifest.json"}
    # the one thing that is kept: where matplotlib found fonts
    assert [path for path in home.rglob("*") if path.is_file() and "matplotlib" not in path.parts] == []


WRONG: list[tuple[dict[str, object], str]] = [
    ({"model": "{}/nowhere"}, "fedelta: there is no folder '{}/nowhere'"),
    ({"model": "{}"}, "fedelta: no tokenizer could be loaded from '{}': the folder has no tokenizer"),
    ({"data": "{}/nowhere.csv"}, "fedelta: there is no file '{}/nowhere.csv'"),
    ({"data": "nobody/nothing"}, "fedelta: cannot load 'nobody/nothing' from the Hugging Face hub"),
    ({"data": "{}"}, "fedelta: {} is not a folder that datasets.save_to_disk wrote"),
    ({"text": "txt"}, "fedelta: {}/train.csv: the table has no column 'txt' but .*; did you mean 'text'"),
    ({"label": "lable"}, "did you mean 'label'"),
    ({"sites": None, "split_by": "critics"}, "{}/train.csv: the table has no column 'critics' .* mean 'critic'"),
    ({"sites": None, "split_by": "gaps"}, "{}/train.csv: 1 of 30 rows name no site \\(row 17, counted from 0\\)"),
    ({"text": "blank"}, "{}/train.csv: the text in row 29 .* is blank"),
    ({"text": "gaps"}, "{}/train.csv: column 'gaps' has no value in 1 of 30 rows, the first in row 17"),
    ({"test": "{}/odd.csv"}, "{}/odd.csv: label 'maybe' in row 1 .* is none of the classes 'no', 'yes'"),
    ({"label": "same"}, "{}/train.csv: column 'same' has the single class '1'"),
    ({"columns": "a,b"}, "{}/train.csv cannot be read as csv: it has 7 columns, and 2 names were given"),
    ({"test": "{}/train.csv"}, "--test and --data are both"),
    ({"test": "{}/bert"}, "{}/bert is not a folder that datasets.save_to_disk wrote"),
    ({"test_fraction": 0.99}, "--test-fraction 0.99 of 30 rows leaves none for training"),
    ({"sites": 25}, "25 sites cannot share 24 rows; use at most 24 sites"),
    ({"sites": 20, "alpha": 0.001}, "gave no partition .*; use a larger alpha"),
    ({"sites": 2, "per_round": 3}, "--per-round 3 is more than the 2 sites"),
    ({"max_length": 17}, "--max-length 17 is more than {}/bert reads; give at most 16"),
    ({"max_length": 2}, "max_length must be > 2, got 2"),
    ({"lr": "inf"}, "AdamW.lr must be a finite number > 0, got inf"),
    ({"split_by": "critic"}, "Error: --split-by is for natural sites and --sites for simulated ones"),
    ({"sites": None}, "Error: Say how the rows are split: --split-by COLUMN .* or --sites N"),
    ({"sites": None, "alpha": 1}, "Error: Say how the rows are split"),
    ({"sites": None, "split_by": "critic", "alpha": 1}, "Error: --alpha is for simulated sites"),
    ({"tune": "head", "rank": 8}, "Error: --rank has no effect with --tune head; it is for --tune lora."),
    ({"width": 8}, "Error: --width has no effect with --tune lora; it is for --tune adapter."),
    ({"tune": "last", "virtual_tokens": 8}, "Error: --virtual-tokens has no effect .* for --tune prompt and prefix."),
    ({"tune": "prefix", "layers": 1}, "Error: --layers has no effect with --tune prefix; it is for --tune last."),
    ({"tune": "last", "layers": 9}, "asks for more blocks than the 2 that BertForSequenceClassification has"),
    ({"tune": "prompt"}, "--virtual-tokens 20 leave no room in {}/bert; give fewer than 16"),
    ({"tune": "prompt", "virtual_tokens": 3, "max_length": 14}, "besides 3 virtual tokens; give at most 13"),
    ({"tune": "full", "bits": 4}, "Error: --bits rounds weights that --tune full trains; use --tune lora."),
    ({"algorithm": "fed-sb", "bits": 8}, "Error: --bits rounds weights that --algorithm fed-sb needs as they are"),
    ({"bits": 2}, "Error: .*'2' is not one of '8', '4'"),
    ({"algorithm": "fedavgm", "mu": 0}, "Error: --mu has no effect with --algorithm fedavgm"),
    ({"algorithm": "fedprox", "server_lr": 1}, "Error: --server-lr has no effect with --algorithm fedprox"),
    ({"test": "{}/test.csv", "test_fraction": 0.2}, "Error: --test names the test rows"),
    ({"test_fraction": "nan"}, "Error: --test-fraction is not a number"),
    ({"test_fraction": 1}, "Error: .*1.0 is not in the range 0<=x<1"),
    ({"tune": "all"}, "Error: .*'all' is not one of 'full', 'head', 'last', 'norms'"),
    ({"label": None}, "fedelta: the config.json of {}/bert does not say what it learns of texts without labels"),
    ({"rounts": 1}, "Error: No such option '--rounts'. .*Did you mean .*'--rounds'"),
    ({"out": "{}/train.csv"}, "Error: .*'{}/train.csv' is a file"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_one_sentence_and_leaves_nothing_behind(
    finetune: Command, options: dict[str, object], message: str
) -> None:
    folder = finetune.folder
    gaps = ["x" if row != 17 else None for row in range(30)]
    blank = [" " if row == 29 else "x" for row in range(30)]
    TRAIN.assign(gaps=gaps, blank=blank, same=1).to_csv(folder / "train.csv", index=False)
    (folder / "odd.csv").write_text("text,label\nthe film,yes\nthe end,maybe\n")
    before = sorted(folder.iterdir())
    given = {name: value.format(folder) if isinstance(value, str) else value for name, value in options.items()}
    error = finetune(status=2, **given)
    *usage, sentence = error.splitlines()
    assert re.search(message.format(folder), sentence), error
    assert usage == [] if sentence.startswith("fedelta: ") else usage[0] == "Usage: fedelta finetune [OPTIONS]"
    assert sorted(folder.iterdir()) == before


def test_a_model_that_cannot_be_built_leaves_nothing_behind(finetune: Command) -> None:
    weights = finetune.model / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(b"not safetensors")
    assert finetune(tune="head", status=2).startswith("fedelta: no model for text classification could be loaded")
    assert not (finetune.folder / "out").exists()
    weights.write_bytes(good)
    finetune(tune="head")


def test_a_model_without_a_tokenizer_is_refused(finetune: Command) -> None:
    """Transformers would make a tokenizer of the configuration alone, for which every word is unknown."""
    for path in finetune.model.glob("tokenizer*"):
        path.unlink()
    assert "the folder has no tokenizer files" in finetune(status=2)


def test_a_model_that_reads_fewer_tokens_than_usual(finetune: Command, gpt2: Path) -> None:
    """GPT-2's tokenizer does not know that the model has 16 positions."""
    assert "give at most 16" in finetune(model=gpt2, max_length=17, status=2)
    TRAIN.assign(text=TRAIN["text"] + " the film" * 20).to_csv(finetune.folder / "train.csv", index=False)
    finetune(model=gpt2, tune="head")


def test_the_real_model_on_news(finetune: Command, minilm: Path, shared: Callable[[str], Path]) -> None:
    """LoRA on 144 rows of four classes; peft gives the accuracy that was printed."""
    folder = finetune.folder
    names = ["class", "title", "body"]
    news = pandas.read_csv(shared("ag-news/test.csv"), header=None, names=names, nrows=240)
    news[:144].to_csv(folder / "train.csv", index=False, header=False)
    news[144:].to_csv(folder / "test.csv", index=False, header=False)
    options = {"columns": ",".join(names), "label": "class", "text": "title", "test": folder / "test.csv"}
    training = {"lr": 0.008, "epochs": 2, "batch": 8, "max_length": 24}
    printed = finetune("--text", "body", model=minilm, **options, **training)
    (correct,) = map(int, re.findall(r"Accuracy: (\d+)/96 ", printed))
    assert correct >= 48  # 24 by chance

    model = loaded(folder / "out" / "model", minilm, lora=True)
    assert model.config.id2label == {0: "1", 1: "2", 2: "3", 3: "4"}
    joined = (news["title"] + " " + news["body"])[144:].tolist()
    inputs = tokenizer(str(folder / "out" / "model"))(
        joined, padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    assert int((logits(model, inputs).argmax(1) + 1 == torch.tensor(news["class"][144:].tolist())).sum()) == correct
