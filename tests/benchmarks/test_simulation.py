"""The benchmark of the simulation: contestants take the same steps, and figures are what was measured."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.simulation import results, with_bare, with_fedelta
from benchmarks.simulation.figures import figures
from benchmarks.simulation.measure import agreement
from benchmarks.simulation.outcome import Settings
from benchmarks.simulation.plans import FedeltaPlan
from benchmarks.simulation.workloads import Workload, find

ONE_BY_ONE = {"cohort": 1, "channels_last": False}


def moved(run, workload: Workload) -> np.ndarray:
    settings = Settings(device="cpu", cores=1)
    threads = torch.get_num_threads()
    try:
        start = with_bare.run(workload, 0, settings).model
        return (run(workload, 1, settings).model - start).numpy()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("plan", [ONE_BY_ONE, {"cohort": 3, "channels_last": False}], ids=["one by one", "cohort"])
@pytest.mark.parametrize("name", ["tiny-many@4", "stack@2000"])
def test_fedelta_and_the_bare_loop_agree(name: str, plan: dict[str, object]) -> None:
    workload = find(name).steady()
    fedelta = with_fedelta.contestant(FedeltaPlan(workers=0, plan=plan)).run
    found = agreement(moved(fedelta, workload), moved(with_bare.run, workload), 1.0, bf16=False)
    assert found["agrees"]
    assert found["largest"] < 1e-6


def test_another_number_of_steps_does_not_agree() -> None:
    base = moved(with_bare.run, find("tiny-many@4").steady())
    assert not agreement(base * 1.05, base, 1.0, bf16=False)["agrees"]
    assert not agreement(base, base, 1.5, bf16=False)["agrees"]


def test_a_workload_is_found_by_its_name() -> None:
    for name in ("mnist-cnn", "tiny-many@7/few", "stack@10000/steady"):
        assert find(name).name == name
    with pytest.raises(ValueError, match="no workload 'mnist'"):
        find("mnist")


def test_the_cnn_has_the_parameters_that_are_told() -> None:
    assert sum(parameter.numel() for parameter in find("mnist-cnn").build().parameters()) == 431_080


def block(name: str) -> dict[str, object]:
    def result(factor: float) -> dict[str, object]:
        repeats = [{"ends": [1.0, 1.0 + t * factor, 1.0 + 2 * t * factor], "phases": {}} for t in (1.0, 3.0, 2.0)]
        return {"versions": {"torch": "2"}, "first_run_s": 5.0, "peak_mb": 100.0, "rounds": 3, "repeats": repeats}

    return {
        "workload": name,
        "machine": {"cpu": "one", "cores": 2, "memory_gb": 4, "device": "cpu"},
        "date": "2026-01-01",
        "settings": {"repeats": 3, "seconds": 1.0, "cores": 2},
        "contestants": {"bare": result(1.0), "fedelta:auto": result(0.25)},
        "missing": {"flower": "not installed: no module"},
    }


def test_ratios_are_taken_within_a_repeat() -> None:
    bare, own = figures(block("mnist-cnn"))
    assert (bare.round_s, bare.ratio) == (2.0, 1.0)
    assert (own.ratio, own.least, own.most, own.first_s) == (0.25, 0.25, 0.25, 1.0)


def test_only_the_marked_section_of_a_page_is_rewritten(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{results.BEGIN}\n\nold\n\n{results.END}\n\nafter\n")
    file = tmp_path / "results.json"
    for name in ("mnist-cnn", "tiny-many@10", "tiny-many@100", "stack@10000"):
        results.add(file, block(name))
    results.write_docs(results.read(file), page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| fedelta:auto | 500 ms | 0.25 |" in text
    assert "old" not in text
    assert "flower: not installed" in text
    assert (tmp_path / "images" / results.GROWTH).exists()
    with pytest.raises(ValueError, match="needs one line"):
        results.write_docs({}, file)
