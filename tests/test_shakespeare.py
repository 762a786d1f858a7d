"""examples/shakespeare.py, on a few roles and speeches."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from fedelta import Examples, Local, Parameters, run
from fedelta.cli.experiment import Experiment
from fedelta.core.errors import BadInput
from fedelta.learning.pretrained import tokenizer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "shakespeare.py"
Opened = Callable[..., ModuleType]


@pytest.fixture
def opened(shared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Opened:
    """The example as `fedelta run` imports it."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def load(**settings: str) -> ModuleType:
        monkeypatch.setenv("FEDELTA_DATA", str(shared("weights-stories260K").parent))
        shared("tinyshakespeare")
        return sys.modules[Experiment.load(EXAMPLE, settings).program.__module__]

    return load


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_round_lowers_the_perplexity_of_speeches_that_no_site_holds(opened: Opened, tune: str) -> None:
    example = opened(TUNE=tune, ROLES="3", ROUNDS="1")
    assert example.sites() == ["GLOUCESTER", "DUKE VINCENTIO", "MENENIUS"]
    program = replace(example.program(), test=example.test()[:12])
    before = program.evaluate(Parameters.of(program.algorithm.task.build(0)))
    assert 50 < before["test_perplexity"] < 150  # a model of this tongue, but not of this style
    fleet = Local(program, lambda name: example.site(name)[:16], example.sites())
    [(_, report)] = run(program, fleet)
    assert not report.absent
    assert report.metrics["test_perplexity"] < 0.8 * before["test_perplexity"]


def test_every_fifth_speech_of_a_role_is_held_out(opened: Opened) -> None:
    example = opened(ROLES="2")
    words = tokenizer(example._found(example.MODEL))
    speeches = example._speeches()["GLOUCESTER"]
    assert len(speeches) == 211
    assert speeches[0].startswith("Now is the winter of our discontent")
    site, test = (words.decode(stream(part)) for part in (example.site("GLOUCESTER"), example.test()))
    for number, speech in enumerate(speeches):
        text = words.decode(words(speech, add_special_tokens=False)["input_ids"])
        assert text in (site if number % 5 else test)
    assert "Made glorious summer" in test
    assert "Made glorious summer" not in site


def stream(packed: Examples) -> list[int]:
    """The tokens of full rows, each of which begins with the last one of the row before."""
    rows = zip(packed.inputs["input_ids"], packed.inputs["attention_mask"], strict=True)
    return [token for ids, mask in rows for token in ids[: int(mask.sum())].tolist()[1:]]


def test_what_is_missing_is_named(opened: Opened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="TUNE is full or lora, got 'head'"):
        opened(TUNE="head").program()
    example = opened()
    monkeypatch.setenv("FEDELTA_DATA", str(tmp_path))
    with pytest.raises(BadInput, match="set FEDELTA_DATA to the folder that holds tinyshakespeare"):
        example.sites()
