"""The benchmark of privacy: how rows are dealt, what is chosen, what a run is, and what is told of results."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.privacy.jobs import (
    CHOSEN_AT,
    EPSILONS,
    METHODS,
    TUNING_SEED,
    Choice,
    Job,
    Results,
    chosen,
    closed_forms,
    trained,
)
from benchmarks.privacy.results import BEGIN, END, show, write_docs
from benchmarks.privacy.workload import SETTINGS, News, Setting, dealt

from fedelta import Classification, Examples, LoRA, Plan, Task
from fedelta.learning.features import features, head_layer

EXAMPLE, SITE, FEW = SETTINGS
BEST = {"FedIT": 10.0, "FFA-LoRA": 1.0, "Fed-SB": 0.1}


def model() -> nn.Module:
    """Frozen layers that are the same in every run, as a pre-trained model has them."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    return LoRA(rank=2, targets=("0", "2")).apply(layers)


@pytest.fixture(scope="module")
def news() -> News:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(152, 6, generator=draws)
    y = (2 * (x[:, 0] > 0) + (x[:, 1] > 0)).long()
    rows, module = Examples.of((x, y)), model()
    found = features(module, [head_layer(module, 4)], rows, Plan().plain, torch.empty(152, 8))
    task = Task(model=model, objective=Classification(classes=4))
    return News(task=task, rows=rows, features=Examples.of((found, y)))


def small(setting: Setting) -> Setting:
    """All rows of a site are in every batch, and all sites in every round: noise that is solved in no time."""
    return replace(setting, sites=4, rows=120, batch=30, rate=None)


def test_sites_have_as_many_rows_and_each_row_once() -> None:
    labels = np.arange(600) % 4
    parts = dealt(labels, 20, 0.5, seed=0)
    assert [len(part) for part in parts] == [30] * 20
    assert sorted(np.concatenate(parts)) == list(range(600))
    mixtures = np.array([np.bincount(labels[part], minlength=4) for part in parts])
    assert mixtures.max(axis=1).mean() > 15  # of 30, where an even mixture would have 7.5
    assert not all(np.array_equal(a, b) for a, b in zip(parts, dealt(labels, 20, 0.5, seed=1), strict=True))


def test_rows_for_choosing_public_rows_and_test_rows_are_of_no_site(news: News) -> None:
    setting = small(EXAMPLE)
    numbered = replace(news, rows=Examples.of((torch.arange(152.0)[:, None], news.rows.targets)))
    drawn = [numbered.draw(setting, seed, "tokens") for seed in (0, 1)]
    for data in drawn:
        parts = [*data.sites.values(), data.validation, data.public, data.test]
        rows = [int(row) for part in parts for row in part.inputs["x"]]
        assert len(rows) == len(set(rows)) == 120 + 8 + 4 + 20
    assert torch.equal(drawn[0].validation.inputs["x"], drawn[1].validation.inputs["x"])
    assert not torch.equal(drawn[0].test.inputs["x"], drawn[1].test.inputs["x"])


def test_the_whole_table_is_used() -> None:
    assert (EXAMPLE.held_out, EXAMPLE.rows + sum(EXAMPLE.held_out)) == ((400, 200, 1000), 7600)
    assert (EXAMPLE.sites, SITE.sites, EXAMPLE.rows // EXAMPLE.sites, SITE.rows // SITE.sites) == (20, 1000, 300, 6)


@pytest.mark.parametrize("setting", [EXAMPLE, SITE], ids=lambda setting: setting.name)
@pytest.mark.parametrize("method", METHODS)
def test_a_run(setting: Setting, method: str, news: News) -> None:
    own = replace(small(setting), rounds=2)
    results = {
        epsilon: Job(setting=own, method=method, epsilon=epsilon, seed=0, choice=Choice(lr=0.3)).measured(news)
        for epsilon in (8.0, math.inf)
    }
    assert results[8.0]["noise"]["round"] > 0.3
    assert results[8.0]["noise"]["start"] > 0.3
    assert results[math.inf]["noise"]["round"] == pytest.approx(1e-3)
    assert results[math.inf]["loss"] != results[8.0]["loss"]
    assert all(math.isfinite(one["loss"]) for one in results.values())
    json.dumps(results[8.0], allow_nan=False)


@pytest.mark.parametrize("setting", [EXAMPLE, FEW], ids=lambda setting: setting.name)
def test_the_closed_form_alone_spends_it_all_and_is_plain_without_privacy(setting: Setting, news: News) -> None:
    found = {job.epsilon: job.measured(news) for job in closed_forms([small(setting)], 1)}
    noise = [found[epsilon]["noise"]["start"] for epsilon in (8.0, 4.0, 2.0)]
    assert noise == pytest.approx([0.6002, 1.0812, 1.9938], rel=0.003)  # Balle and Wang, 2018, theorem 8
    assert found[math.inf]["noise"] == {}
    assert found[math.inf]["accuracy"] > 0.5
    assert all(one["accuracy"] == one["start"] for one in found.values())


# What is chosen


def invented(setting: Setting, results: Results) -> dict[str, Choice]:
    """Everything is chosen: learning rates as in BEST, the largest clip, and the smallest share."""

    def accuracy(job: Job) -> float:
        choice = job.choice
        assert choice is not None
        off = abs(math.log(choice.lr / BEST[job.method]))
        return 0.9 - 0.01 * off + 0.001 * choice.clip - 0.001 * choice.share

    found = {}
    for method in METHODS:
        while not isinstance(made := chosen(setting, method, results), Choice):
            assert all((job.epsilon, job.seed) == (CHOSEN_AT, TUNING_SEED) for job in made)
            results |= {job.key: result(accuracy(job)) for job in made}
        found[method] = made
    return found


def result(accuracy: float) -> dict[str, object]:
    return {"accuracy": accuracy, "loss": 1.0, "start": 0.5, "noise": {"start": 2.0, "round": 1.25}, "seconds": 1.0}


def test_the_rate_is_not_at_an_end_and_clip_and_share_are_those_of_fedit() -> None:
    results: Results = {}
    found = invented(EXAMPLE, results)
    assert {method: choice.lr for method, choice in found.items()} == BEST
    assert {(choice.clip, choice.share) for choice in found.values()} == {(1.0, 0.25)}
    tried = {json.loads(key)["lr"] for key in results if json.loads(key)["method"] == "Fed-SB"}
    assert tried == {0.03, 0.1, 0.3, 1.0, 3.0}


def test_of_equal_accuracies_the_smaller_loss_decides() -> None:
    results: Results = {}
    jobs = chosen(SITE, "FedIT", results)
    assert isinstance(jobs, list)
    for job, loss in zip(jobs, (2.0, 1.0, 3.0), strict=True):
        results[job.key] = {**result(0.5), "loss": loss}
    more = chosen(SITE, "FedIT", results)
    assert isinstance(more, list)
    assert {job.choice.lr for job in more if job.choice} == {1.0}


def test_rates_stop_where_nothing_is_left_to_try() -> None:
    results: Results = {}
    while isinstance(found := chosen(EXAMPLE, "FedIT", results), list):
        results |= {job.key: result(0.5 - (job.choice.lr if job.choice else 0)) for job in found}
    assert found.lr == 0.01


def test_a_key_has_every_setting() -> None:
    job = Job(setting=EXAMPLE, method="FedIT", epsilon=8.0, seed=0, choice=Choice())
    others = [
        replace(job, setting=SITE),
        replace(job, setting=replace(EXAMPLE, rounds=4)),
        replace(job, setting=replace(EXAMPLE, tokens=16)),
        replace(job, method="Fed-SB"),
        replace(job, epsilon=math.inf),
        replace(job, seed=1),
        *(replace(job, choice=replace(Choice(), **{name: 0.123})) for name in ("lr", "clip", "share")),
        replace(job, choice=None),
    ]
    assert len({one.key for one in [job, *others]}) == len(others) + 1
    assert replace(job, setting=replace(EXAMPLE, text="other")).key == job.key


def test_an_interrupted_run_leaves_what_is_most_wanted() -> None:
    jobs = trained({(EXAMPLE, "FedIT"): Choice(), (SITE, "FedIT"): Choice()}, seeds=2)
    assert [(job.seed, job.epsilon) for job in jobs[::2]] == [(seed, e) for seed in (0, 1) for e in EPSILONS]
    assert (8.0, math.inf, 4.0, 2.0) == EPSILONS


# What is told


def test_a_cell_says_how_many_seeds_it_has_and_when_it_has_none() -> None:
    results: Results = {}
    choices = invented(EXAMPLE, results)
    for seed, accuracy in enumerate((0.80, 0.82)):
        job = Job(setting=EXAMPLE, method="FedIT", epsilon=8.0, seed=seed, choice=choices["FedIT"])
        results[job.key] = result(accuracy)
    results[closed_forms([EXAMPLE], 1)[1].key] = result(0.855)
    lines = show(EXAMPLE, results, seeds=3).splitlines()
    assert lines[2] == "| method | ε = ∞ | ε = 8 | ε = 4 | ε = 2 | learning rate |"
    assert "| closed form | 85.5% (1) | missing | missing | missing |  |" in lines
    assert "| FedIT | missing | 81.0% ± 12.7 (2) | missing | missing | 10 |" in lines
    assert "| Fed-SB | missing | missing | missing | missing | 0.1 |" in lines
    assert "Clip 1; round zero may spend 0.25 of epsilon." in lines
    assert "Noise multiplier of a step: 1.25 (ε = 8)." in lines
    assert "learning rate" not in show(FEW, results, seeds=3)


def test_nothing_yet_is_a_table_of_missing_cells() -> None:
    assert show(SITE, {}, seeds=3).count("missing") == 4 * 4 + 3


def test_the_page_has_tables_between_its_marks_and_a_picture(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "privacy.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    results: Results = {job.key: result(0.8) for job in closed_forms(SETTINGS, 2)}
    for _ in range(2):
        write_docs(SETTINGS, results, 2, tmp_path)
        text = page.read_text()
        assert text.startswith(f"before\n{BEGIN}\n\n**Every row")
        assert text.endswith(f"{END}\nafter\n")
        assert "old" not in text
        assert text.count("80.0% ± 0.0 (2)") == 12
    assert (tmp_path / "docs" / "images" / "privacy.png").stat().st_size > 10_000
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="needs a line"):
        write_docs(SETTINGS, results, 2, tmp_path)


def test_the_documentation_has_the_marks() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "privacy.md").read_text()
    assert text.index(BEGIN) < text.index(END)
