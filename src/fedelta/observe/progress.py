"""Progress of a run in the terminal.

On a terminal: a bar over the rounds that also moves within a round, as sites answer, with the metrics and the time
left. Otherwise: plain lines, at most one every few seconds. It reads reports and counts replies; nothing in training
calls it. A request "train/keys" is a step on the way of the request "train": it is named while it goes on, and who
answers it has not answered "train".
"""

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests
from fedelta.core.program import Fleet, Report
from fedelta.core.watched import Watched
from fedelta.observe.text import metric_text, plural, seconds_text

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

_REDRAW_S = 0.1
_WARNINGS = 20  # then only counts: a fleet that drops half its sites in every round would flood the terminal


class Progress:
    """Shows a run while it goes on.

    with Progress(rounds=50) as progress:
        for state, report in run(program, progress.watch(fleet)):
            progress.show(report)

    `rounds` is the last round of the run, None if unknown; `label` stands before each line; `done` are the rounds that
    a resumed run has behind it; `every_s` is the least time between two plain lines. Without a console it writes to the
    standard output.
    """

    def __init__(
        self,
        rounds: int | None = None,
        *,
        label: str = "",
        done: int = 0,
        console: "Console | None" = None,
        every_s: float = 3.0,
    ) -> None:
        from rich.console import Console  # here, so that importing this module costs nothing

        self._console = console or Console()
        self._rounds = rounds
        self._label = f"{label}: " if label else ""
        self._done = done
        self._every_s = every_s
        self._report: Report | None = None
        self._latest: dict[str, float] = {}  # of each metric: not every round evaluates
        self._printed: Report | None = None
        self._durations: deque[float] = deque(maxlen=10)  # seconds of the latest rounds
        self._asked: dict[str, int] = {}  # requests of this round, by operation
        self._answered: dict[str, int] = {}
        self._operations: dict[str, str] = {}  # of what is outstanding, by id
        self._step = ""  # that goes on, if it is not the operation itself
        self._warned: set[tuple[PartyId, str]] = set()
        self._live: Live | None = None
        self._began = self._drawn = self._printed_at = time.monotonic()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._console.is_terminal:
            from rich.live import Live

            # No refresh thread: worker processes may be forked while this is shown.
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._render)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
            self._live = None
        elif self._report is not None and self._printed is not self._report:
            self._print_line()

    def watch(self, fleet: Fleet) -> Fleet:
        """The same fleet, whose replies move the bar."""
        return Watched(fleet=fleet, on_request=self._on_request, on_reply=self._on_reply)

    def show(self, report: Report) -> None:
        """A round is over."""
        now = time.monotonic()
        # What the round itself took: in a deployment a round may have to wait until enough sites are there.
        self._durations.append(sum(report.seconds.values()) or now - self._began)
        self._began = now
        first = self._report is None
        self._report = report
        self._latest |= report.metrics
        self._done = report.round
        self._asked, self._answered, self._operations, self._step = {}, {}, {}, ""
        self._warn(report)
        last = report.stop is not None or report.round == self._rounds
        if self._live is not None:
            self._redraw(now, always=last)
        elif first or last or now - self._printed_at >= self._every_s:
            self._print_line()

    def _on_request(self, request: Request | Requests) -> None:
        operation, _, self._step = request.op.partition("/")
        if self._step:
            self._asked.setdefault(operation, 0)
            return
        self._operations[request.id] = operation
        sites = len(request) if isinstance(request, Requests) else 1
        self._asked[operation] = self._asked.get(operation, 0) + sites

    def _on_reply(self, reply: Reply | Replies) -> None:
        if isinstance(reply, Replies):
            ids, sites = [reply.answers], len(reply.senders) + len(reply.errors)
        else:  # to a single request, or to one of many
            ids, sites = [reply.answers, reply.answers.removesuffix(f"/{reply.sender}")], 1
        operation = next((self._operations[id] for id in ids if id in self._operations), None)
        if operation is not None:
            self._answered[operation] = self._answered.get(operation, 0) + sites
        self._redraw(time.monotonic())

    def _redraw(self, now: float, always: bool = False) -> None:
        if self._live is not None and (always or now - self._drawn >= _REDRAW_S):
            self._drawn = now
            self._live.refresh()

    def _warn(self, report: Report) -> None:
        for site, reason in (*report.absent.items(), *report.unmeasured.items()):
            if (site, reason) in self._warned or len(self._warned) > _WARNINGS:
                continue
            self._warned.add((site, reason))
            if len(self._warned) > _WARNINGS:
                text = "further absences are not shown here; each round's report has them"
            else:
                what = "goes on without" if site in report.absent else "is not evaluated at"
                text = f"{self._label}round {report.round} {what} {site}: {reason}"
            self._say(f"warning: {text}", style="yellow")

    def _print_line(self) -> None:
        if self._report is not None:
            self._say(
                "  ".join([f"{self._label}round {self._of_rounds()}", *self._facts(self._report, self._report.metrics)])
            )
            self._printed = self._report
            self._printed_at = time.monotonic()

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _of_rounds(self) -> str:
        return f"{self._done}/{self._rounds}" if self._rounds else str(self._done)

    def _facts(self, report: Report, metrics: Mapping[str, float]) -> list[str]:
        facts = [f"{name} {metric_text(name, value)}" for name, value in metrics.items()]
        seconds = sum(self._durations) / len(self._durations)
        facts.append(f"{seconds_text(seconds)}/round")
        if report.absent:
            facts.append(f"{plural(len(report.absent), 'site')} absent")
        if report.stop is not None:
            facts.append(f"stopped: {report.stop}")
        elif self._rounds and self._rounds > report.round:
            facts.append(f"about {seconds_text(seconds * (self._rounds - report.round))} left")
        return facts

    def _render(self) -> "Group":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        counts = [(operation, self._answered.get(operation, 0), asked) for operation, asked in self._asked.items()]
        within = counts[0][1] / max(1, counts[0][2]) if counts else 0.0  # the first is what takes long: training
        bar = ProgressBar(total=self._rounds, completed=min(self._done + within, self._rounds or 0), width=30)
        row = Table.grid(padding=(0, 1))
        told = [
            f"{operation}: {answered}/{asked} sites" if asked else operation for operation, answered, asked in counts
        ]
        sites = "  ".join([*told[:-1], f"{told[-1]}, {self._step}"] if self._step else told)
        cells = [
            Text(f"{self._label}round", style="bold"),
            Text(self._of_rounds(), style="bold"),
            Text(sites, style="dim"),
        ]
        row.add_row(*([cells[0], bar, *cells[1:]] if self._rounds else cells))
        facts = self._facts(self._report, self._latest) if self._report is not None else ["waiting for the first round"]
        return Group(row, Text("  ".join(facts), style="cyan"))
