"""`fedelta demo`: a pre-trained model federated over eight unequal sites, against every baseline; offline."""

import json
import os
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fedelta.cli.board import Board, terminal_table
from fedelta.cli.demo_methods import WAYS, Job, jobs, train
from fedelta.cli.demo_results import METRIC, Results, page, setting, site_overview
from fedelta.cli.processes import Done, Processes
from fedelta.core.errors import BadInput
from fedelta.core.program import Report
from fedelta.observe.files import replace_file
from fedelta.observe.page import write_page
from fedelta.observe.report import comparison_table
from fedelta.observe.text import plural, seconds_text

_NUMBERS = "demo.json"  # also the mark of a folder that this command may write into again
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@click.command(short_help="A pre-trained model federated over 8 unequal sites, against every baseline.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder of the report, the model and the numbers; those of an earlier demo are replaced.",
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of every method.")
@click.option(
    "--rounds", type=click.IntRange(1), default=10, show_default=True, help="Rounds of the federated methods."
)
@click.option(
    "--workers", type=click.IntRange(0), default=_CORES, help="Processes; 0: all in this one. [default: one per core]"
)
def command(out: Path, seeds: int, rounds: int, workers: int) -> None:
    """Compare a pre-trained model, federated in three ways, with itself, lone sites, pooled data and a random start.

    Works offline, on scikit-learn's handwritten digits. Writes an HTML report, the numbers and a model.
    """
    began = time.perf_counter()
    _prepare(out)
    console = Console()
    results = _train(jobs(seeds, rounds), seeds, rounds, workers, console)
    console.print(_table(results))
    for sentence in results.reading():
        console.print(sentence, highlight=False)
    _write(out, results, began, console)


def _prepare(out: Path) -> None:
    """Make sure, before the work, that the folder is there and nobody else's."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / _NUMBERS).is_file():
        raise BadInput(f"{out} holds other files than a demo's; choose another --out")
    out.mkdir(parents=True, exist_ok=True)


def _train(todo: list[Job], seeds: int, rounds: int, workers: int, console: Console) -> Results:
    reports: dict[Job, list[Report]] = {job: [] for job in todo}
    models: dict[Job, bytes] = {}
    shown = Results(seeds=seeds, rounds=rounds, reports=reports, models=models)
    with Processes(train, min(workers, len(todo))) as processes:
        console.print(setting(shown)[0], highlight=False)
        overview = site_overview()
        console.print(overview.table(), overview.summary())
        with Board(todo, console, names=[way.name for way in WAYS], metric=METRIC) as board:
            for job, event in processes.run(todo):
                if isinstance(event, Done):
                    models[job] = event.result
                    board.finish(job)
                else:
                    reports[job].append(event)
                    board.show(job, event)
    return shown


def _table(results: Results) -> Table:
    """The comparison for the terminal: without what the report has besides."""
    whole = comparison_table(results.methods(), METRIC, results.target())
    caption = f"±: 95% interval by Student's t over {plural(results.seeds, 'seed')}; rounds: mean (least–most)."
    return terminal_table(whole, without={"seeds", "received per site"}, caption=caption)


def _write(out: Path, results: Results, began: float, console: Console) -> None:
    replace_file(out / _NUMBERS, json.dumps(results.plain(), indent=1).encode())
    best = results.best()
    replace_file(out / "model.safetensors", results.models[best])
    write_page(out / "report.html", page(results, seconds_text(time.perf_counter() - began)))
    console.print(f"\nReport:  {out / 'report.html'}", soft_wrap=True, highlight=False)
    console.print(f"Numbers: {out / _NUMBERS}", soft_wrap=True, highlight=False)
    console.print(f"Model:   {out / 'model.safetensors'} ({best.way.name}, seed {best.seed}); load it with")
    console.print(
        "  from safetensors.torch import load_file\n"
        "  from fedelta.cli.demo_methods import Network\n"
        f'  model = Network(); model.load_state_dict(load_file("{out / "model.safetensors"}"))',
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    console.print(f"It took {seconds_text(time.perf_counter() - began)}.", highlight=False)
