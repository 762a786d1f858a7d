"""The model card: every fact of a run, in a form that the hub reads."""

import yaml

from fedelta.core.program import Report
from fedelta.observe.card import Card

RUN = [
    Report(round=0, metrics={"test_accuracy": 0.5}, cohort=("a", "b", "c"), bytes_up=100, bytes_down=200),
    Report(
        round=1,
        metrics={"test_accuracy": 0.875, "test_loss": 0.25},
        cohort=("a", "b"),
        absent={"b": "late"},
        bytes_up=1000,
        bytes_down=3000,
    ),
]


def card(**changes: object) -> Card:
    settings: dict[str, object] = {
        "title": "fine-tuning | of a model",
        "base": 'a "small" model',
        "base_digest": "abc123",
        "tuning": "LoRA(rank=8)",
        "algorithm": "FlexLoRA",
        "sites": 4,
        "privacy": "not bounded: nobody looked",
        "updates": "under masks",
        "library": "peft",
        "ranks": {"first": 8, "second": 8, "third": 4},
        "tiers": {"phone": 2},
        "classes": ("yes", "no"),
    }
    return Card(**{**settings, **changes})  # type: ignore[arg-type]


def test_the_card_has_every_fact_of_the_run() -> None:
    text = card().text(RUN, "1.2.3")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "peft",
        "base_model": 'a "small" model',
        "tags": ["federated-learning", "fedelta"],
    }
    rows = dict(
        line.strip("| ").split(" | ", 1) for line in body.splitlines() if line.startswith("| ") and line != "| | |"
    )
    assert rows["digest of its frozen weights"] == "SHA-256 abc123"
    assert rows["ranks"] == "4 in 1 layer, 8 in 2 layers"
    assert rows["ranks at the sites"] == "phone 2"
    assert rows["sites"] == "4, of which 3 took part"
    assert rows["rounds"] == "1 round, after a head in closed form"
    assert (rows["sent by all sites"], rows["received by all sites"]) == ("1.10 KB", "3.20 KB")
    assert (rows["test accuracy"], rows["test loss"]) == ("87.5%", "0.2500")
    assert rows["updates reached the coordinator"] == "under masks"
    assert rows["privacy spent"].startswith("not bounded")
    assert "fedelta 1.2.3" in body
    assert "PeftModel.from_pretrained" in body


def test_the_card_of_a_site_has_what_a_site_knows() -> None:
    text = card().at_site("hospital | a", 7, "1.2.3")
    assert yaml.safe_load(text.split("---\n", 2)[1])["library_name"] == "peft"
    assert "| kept by the site | hospital \\| a |" in text
    assert "| sites | 4 |" in text
    assert "| rounds | 7 rounds |" in text
    assert "| privacy | not bounded: nobody looked |" in text
    assert "took part" not in text
    assert "| sites |" not in card(sites=0).at_site("a", 1, "1")


def test_what_is_not_there_is_not_named() -> None:
    text = card(base_digest=None, ranks={}, tiers={}, classes=(), library="transformers").text(RUN[1:], "1")
    assert "| digest of its frozen weights | none |" in text
    assert "ranks" not in text
    assert "classes" not in text
    assert "closed form" not in text
