"""`fedelta run --compare`: the experiment beside its baselines, over several seeds.

Every finished run is a line of `results.jsonl` in the folder, under a key that stands for all that decides it: the
experiment, its data, the model's weights, the number of rounds, the source of fedelta and the versions of the
libraries. A second call takes from there what it finds. Failures are not kept: they are tried again.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from torch import Tensor

from fedelta.algorithms.federation import Federation
from fedelta.cli.board import Board, terminal_table
from fedelta.cli.compare_methods import ALONE, FEDERATED, Job, Setup
from fedelta.cli.compare_results import Results
from fedelta.cli.experiment import Sites
from fedelta.cli.held import Held
from fedelta.cli.processes import Done, Processes
from fedelta.core.digest import digest
from fedelta.core.errors import BadInput, FedeltaError
from fedelta.core.messages import Plain
from fedelta.core.program import Report
from fedelta.core.source import own_digest
from fedelta.observe.files import sync_directory
from fedelta.observe.manifest import environment
from fedelta.observe.page import write_page
from fedelta.observe.plain import from_plain, to_plain
from fedelta.observe.series import Run, final
from fedelta.observe.text import plural, seconds_text

RESULTS = "results.jsonl"  # also the mark of a folder that a comparison may write into again
REPORT = "report.html"
_FEATURES = ".features"  # of frozen bodies; there until all runs are
_SITES_SHOWN = 12  # on the terminal


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`federation` over `sites`, and all that it is compared with, for `seeds` seeds from its own one on."""

    title: str
    federation: Federation[Any]
    sites: Sites
    seeds: int
    out: Path
    workers: int  # processes; 0: all in this one

    def run(self) -> None:
        """Run what is not there yet, print what came of it, and write the report."""
        began = time.perf_counter()
        console = Console(highlight=False)
        if self.federation.algorithm.personal:
            raise BadInput(
                f"with {type(self.federation.algorithm).__name__} a part of the model stays at each site, so that "
                "there is no one model to compare; leave --compare out"
            )
        self._prepare()
        held = Held.of(self.sites, self.federation, console)
        with console.status("taking the experiment apart"):
            setup = self._setup(held, console)
            manifest = self._manifest(setup, held)
        seeds = [self.federation.seed + number for number in range(self.seeds)]
        results = self._results(setup, seeds, str(manifest["key"]), console)
        self._show(results, console)
        taken = seconds_text(time.perf_counter() - began)
        page = results.page(self.title, held.sections(), {**manifest, **environment(), "time": taken})
        write_page(self.out / REPORT, page)
        console.print(f"\nReport:  {self.out / REPORT}\nNumbers: {self.out / RESULTS}", markup=False, soft_wrap=True)
        console.print(f"It took {taken}.")

    def _prepare(self) -> None:
        """Make sure, before the work, that the folder is there and nobody else's."""
        others = [path for path in self.out.iterdir() if not path.name.startswith(".")] if self.out.is_dir() else []
        if self.out.exists() and not self.out.is_dir():
            raise BadInput(f"{self.out} is a file; choose another --out")
        if others and not (self.out / RESULTS).is_file():
            raise BadInput(f"{self.out} holds other files than a comparison's; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / RESULTS).open("a+b") as file:
            file.seek(0, os.SEEK_SET)
            if (there := file.read()) and not there.endswith(b"\n"):  # a line that a crash tore
                file.write(b"\n")

    def _setup(self, held: Held, console: Console) -> Setup:
        usable = [name for name in self.sites.names if held.digests[name] is not None]
        found = {name: self.sites(name) for name in usable if len(self.sites(name).train)}
        for name in usable:
            if name not in found:
                console.print(f"{name} has no rows to train on, and is left out", style="yellow", markup=False)
        return Setup.of(replace(self.federation, plan=self.federation.plan.plain), found)

    def _manifest(self, setup: Setup, held: Held) -> dict[str, Plain]:
        """What the runs depend on, and the key that stands for it; the seed of each is not in it."""
        federation, test = setup.federation, setup.federation.test
        state = federation.algorithm.task.build(0).state_dict()
        decides: dict[str, Any] = {
            "experiment": digest(replace(federation, seed=0)),
            "model": digest({name: value for name, value in state.items() if isinstance(value, Tensor)}),
            "rounds": federation.rounds,
            "data": {"sites": dict(held.digests), "test": test.digest() if test is not None else None},
            "versions": environment()["versions"],
            "source": own_digest(),  # of one version there are many while it is worked on
        }
        key = digest([decides, federation.plan])
        return {"key": key[:16], **decides, "seeds": [federation.seed + number for number in range(self.seeds)]}

    def _results(self, setup: Setup, seeds: Sequence[int], key: str, console: Console) -> Results:
        jobs = setup.jobs(seeds)
        reports = dict(_kept(self.out / RESULTS, key, jobs))
        todo = [job for job in jobs if job not in reports]
        failures: dict[Job, str] = {}
        results = Results(setup=setup, seeds=seeds, reports=reports, failures=failures)
        console.print(
            f"{self.title}: {plural(len(setup.sites), 'site')}, {plural(self.federation.rounds, 'round')}, "
            f"{plural(len(seeds), 'seed')}: {plural(len(jobs), 'run')} of {len(setup.ways())} methods"
            + (f", of which {len(reports)} are there already." if reports else "."),
            markup=False,
        )
        console.print(results.measured_on(), soft_wrap=not console.is_terminal)
        try:
            self._run(setup.keeping_features(self.out / _FEATURES), todo, reports, failures, key, console)
        except KeyboardInterrupt:
            count = len(dict(_kept(self.out / RESULTS, key, jobs)))
            raise click.Abort(f"{count} of {plural(len(jobs), 'run')} are kept. The same command continues.") from None
        shutil.rmtree(self.out / _FEATURES, ignore_errors=True)
        return results

    def _run(
        self,
        setup: Setup,
        todo: Sequence[Job],
        reports: dict[Job, Run],
        failures: dict[Job, str],
        key: str,
        console: Console,
    ) -> None:
        workers = min(self.workers, len(todo)) if sys.platform == "linux" else 0  # what is not forked is pickled
        before = {job: value for job, run in reports.items() if (value := final(run, setup.metric)) is not None}
        names = [way.name for way in setup.ways()]
        running: dict[Job, list[Report]] = {job: [] for job in todo}
        with (
            Processes(setup.work, workers) as processes,
            Board([*reports, *todo], console, names=names, metric=setup.metric, before=before) as board,
        ):
            for job, event in processes.run(todo):
                if not isinstance(event, Done):
                    running[job].append(event)
                    board.show(job, event)
                    continue
                if event.result:
                    failures[job] = event.result.decode()
                else:
                    reports[job] = running[job] if job.way.how is None else running[job][-1:]
                    _keep(self.out / RESULTS, key, job, reports[job])
                del running[job]
                board.finish(job)

    def _show(self, results: Results, console: Console) -> None:
        if not results.methods():
            raise FedeltaError(f"all runs failed, the first one with: {next(iter(results.failures.values()))}")
        caption = f"±: 95% interval by Student's t over {self.seeds} seeds." if self.seeds > 1 else ""
        without = {"seeds", "received per site"}
        console.print(terminal_table(results.table(), without=without, caption=caption, stacked=True))
        ways = [way for way in (ALONE, FEDERATED) if results.by_site(way)]
        table = results.site_table(ways, _SITES_SHOWN)
        console.print(terminal_table(table, caption=table.caption, stacked=True))
        for sentence in results.reading():
            console.print(sentence, markup=False)
        for sentence in (*results.setup.left_out, *results.failed()):
            console.print(sentence, markup=False, style="yellow")


def _keep(path: Path, key: str, job: Job, run: Run) -> None:
    """Add a run to the file, durably, in one write."""
    kept = {"key": key, **_identity(job), "reports": [to_plain(report) for report in run]}
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            content = json.dumps(kept, allow_nan=False).encode() + b"\n"
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(path.parent)
    except OSError as error:
        raise FedeltaError(f"{path} cannot be written: {error.strerror}; make room, or choose another --out") from error


def _kept(path: Path, key: str, jobs: Iterable[Job]) -> Iterator[tuple[Job, Run]]:
    """The jobs whose runs are in the file. Lines of another key, and lines that a crash tore, are passed over."""
    wanted = {(job.name, job.seed, job.site): job for job in jobs}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
            job = wanted.get((found["method"], found["seed"], found["site"]))
            if found["key"] == key and job is not None:
                yield job, [from_plain(report) for report in found["reports"]]
        except (ValueError, KeyError, TypeError, BadInput):
            continue


def _identity(job: Job) -> dict[str, Plain]:
    return {"method": job.name, "seed": job.seed, "site": job.site}
