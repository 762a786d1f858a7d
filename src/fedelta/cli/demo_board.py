"""Live progress of the demo: a bar for each way to train; without a terminal, a line for each run of a way."""

import time
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedelta.cli.demo_methods import WAYS, Job, Way
from fedelta.core.program import Report
from fedelta.observe.text import metric_text, plural

_REDRAW_S = 0.1
_BAR = 16  # characters
_METRIC = "test_accuracy"


class Board:
    """Shows how far the jobs are; to be used in a `with`."""

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self._console = console
        self._jobs = jobs
        self._round = dict.fromkeys(jobs, 0)
        self._busy: dict[Job, None] = {}  # a set that keeps its order
        self._finished: set[Job] = set()
        self._accuracy: dict[Job, float] = {}
        self._live: Live | None = None
        self._began = self._drawn = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # No refresh thread: this shows what comes in, and processes may be forked beside it.
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._render)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()

    def show(self, job: Job, report: Report) -> None:
        """A job has made another round."""
        self._busy[job] = None
        self._round[job] = report.round
        if _METRIC in report.metrics:
            self._accuracy[job] = report.metrics[_METRIC]
        self._redraw()

    def finish(self, job: Job) -> None:
        """A job is over."""
        self._busy.pop(job, None)
        self._finished.add(job)
        self._redraw()
        together = [other for other in self._jobs if (other.way, other.seed) == (job.way, job.seed)]
        if self._live is None and self._finished.issuperset(together):
            accuracy = metric_text(_METRIC, self._mean(together))
            mean = f"mean of {plural(len(together), 'run')}: " if len(together) > 1 else ""
            self._console.print(f"{job.way.name}, seed {job.seed}: {mean}test accuracy {accuracy}", highlight=False)

    def _redraw(self) -> None:
        now = time.monotonic()
        if self._live is not None and now - self._drawn >= _REDRAW_S:
            self._drawn = now
            self._live.refresh()

    def _mean(self, jobs: Sequence[Job]) -> float:
        return sum(self._accuracy[job] for job in jobs) / len(jobs)

    def _render(self) -> Table:
        table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
        table.add_column("method", no_wrap=True, min_width=max(len(way.name) for way in WAYS))
        table.add_column("", width=_BAR)
        table.add_column("runs", justify="right", no_wrap=True, min_width=5)
        table.add_column("accuracy", justify="right", no_wrap=True, min_width=8)
        table.add_column("now", no_wrap=True, overflow="ellipsis")
        for way in WAYS:
            self._add_row(table, way)
        spent = f"{time.monotonic() - self._began:.0f} s"
        done = sum(self._round.values())
        table.add_row(Text(spent, style="dim"), self._bar(done, self._jobs), self._count(self._finished, self._jobs))
        return table

    def _add_row(self, table: Table, way: Way) -> None:
        jobs = [job for job in self._jobs if job.way == way]
        finished = [job for job in jobs if job in self._finished]
        busy = [job for job in self._busy if job in jobs]
        table.add_row(
            Text(way.name, style="" if busy or finished else "dim"),
            self._bar(sum(self._round[job] for job in jobs), jobs),
            self._count(finished, jobs),
            metric_text(_METRIC, self._mean(finished)) if finished else "",
            Text(", ".join(self._state(job) for job in busy), style="cyan"),
        )

    def _bar(self, done: int, jobs: Sequence[Job]) -> ProgressBar:
        return ProgressBar(total=sum(job.rounds for job in jobs), completed=done, width=_BAR)

    def _count(self, finished: Collection[Job], jobs: Sequence[Job]) -> str:
        return f"{len(finished)}/{len(jobs)}"

    def _state(self, job: Job) -> str:
        """ "seed 0 round 3: 91.2%"."""
        accuracy = f": {metric_text(_METRIC, self._accuracy[job])}" if job in self._accuracy else ""
        return f"seed {job.seed} {job.site or f'round {self._round[job]}'}{accuracy}"
