import io
import math
from collections import deque
from collections.abc import Sequence

import pytest
from rich.console import Console

from fedelta.core.messages import Reply, Request, Requests
from fedelta.core.program import Fleet, Report
from fedelta.core.watched import Watched
from fedelta.observe.progress import Progress


class Echo:
    """A fleet whose sites answer with nothing, in the order of the requests."""

    def __init__(self, *sites: str) -> None:
        self.sites = sites
        self.waiting: deque[Request] = deque()

    def parties(self) -> Sequence[str]:
        return self.sites

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    def submit_many(self, requests: Requests, together: int) -> None:
        for request in requests:
            self.submit(request)

    def next_reply(self, timeout_s: float | None = None) -> Reply | None:
        return Reply.to_request(self.waiting.popleft(), {}) if self.waiting else None

    def cancel(self, request_id: str) -> None:
        self.waiting = deque(request for request in self.waiting if request.id != request_id)


def requests(fleet: Fleet, round: int, op: str) -> list[Request]:
    return [Request(to=site, op=op, round=round) for site in fleet.parties()]


def lines_of(reports: list[Report], rounds: int | None, every_s: float, label: str = "") -> list[str]:
    """What a file gets to see of a run."""
    output = io.StringIO()
    with Progress(rounds, label=label, console=Console(file=output, width=40), every_s=every_s) as progress:
        for report in reports:
            progress.show(report)
    return output.getvalue().splitlines()


def test_a_watched_fleet_is_the_same_fleet() -> None:
    bare, inner = Echo("a", "b", "c"), Echo("a", "b", "c")
    asked: list[str] = []
    answered: list[str] = []
    watched = Watched(
        fleet=inner, on_request=lambda r: asked.append(r.to), on_reply=lambda reply: answered.append(reply.sender)
    )
    seen = []
    for fleet in (bare, watched):
        waiting = requests(fleet, 1, "train")
        for request in waiting:
            fleet.submit(request)
        fleet.cancel(waiting[1].id)
        seen.append([fleet.next_reply(), fleet.next_reply(), fleet.next_reply(0.0)])
    assert seen[0] == seen[1]
    assert asked == ["a", "b", "c"]
    assert answered == ["a", "c"]


def test_without_a_terminal_every_round_can_have_its_line() -> None:
    reports = [Report(round=r, metrics={"test_loss": 1 / r, "test_accuracy": r / 4}) for r in (1, 2, 3)]
    lines = lines_of(reports, 3, every_s=0)
    assert [line.split("  ")[:3] for line in lines] == [
        ["round 1/3", "test_loss 1", "test_accuracy 25.0%"],
        ["round 2/3", "test_loss 0.5000", "test_accuracy 50.0%"],
        ["round 3/3", "test_loss 0.3333", "test_accuracy 75.0%"],
    ]
    assert "left" in lines[0]
    assert "left" not in lines[2]


@pytest.mark.parametrize(
    ("rounds", "stop"), [(5, None), (None, None), (9, None), (9, "the target is reached")], ids=str
)
def test_fast_rounds_show_the_first_and_the_last(rounds: int | None, stop: str | None) -> None:
    reports = [Report(round=r, stop=stop if r == 5 else None) for r in range(1, 6)]
    lines = lines_of(reports, rounds, every_s=math.inf, label="LoRA")
    assert [line.split("/")[0].split("  ")[0] for line in lines] == ["LoRA: round 1", "LoRA: round 5"]
    assert (stop is None) or lines[-1].endswith(f"stopped: {stop}")


def test_an_absence_is_told_once_for_a_site_and_a_reason() -> None:
    absences = [{"a": "its loss is NaN"}, {"a": "its loss is NaN", "b": "its loss is NaN"}, {"a": "[red]no rows"}]
    reports = [Report(round=r, absent=absent) for r, absent in enumerate(absences, start=1)]
    warnings = [line for line in lines_of(reports, 3, every_s=math.inf) if line.startswith("warning")]
    assert warnings == [
        "warning: round 1 goes on without a: its loss is NaN",
        "warning: round 2 goes on without b: its loss is NaN",
        "warning: round 3 goes on without a: [red]no rows",
    ]


def test_absences_do_not_flood_the_terminal() -> None:
    reports = [Report(round=r, absent={f"site-{r}-{k}": "dropped out" for k in range(100)}) for r in range(1, 4)]
    warnings = [line for line in lines_of(reports, 3, every_s=math.inf) if line.startswith("warning")]
    assert len(warnings) == 21
    assert "not shown" in warnings[-1]


def terminal(output: io.StringIO) -> Console:
    return Console(file=output, force_terminal=True, width=100, color_system=None, legacy_windows=False)


def test_on_a_terminal_the_sites_of_a_round_are_counted() -> None:
    output = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(2, console=terminal(output)) as progress:  # noqa: PT012
        fleet = progress.watch(Echo("a", "b", "c"))
        for request in requests(fleet, 1, "train"):
            fleet.submit(request)
        fleet.next_reply()
        fleet.next_reply()
        raise KeyboardInterrupt
    assert "waiting for the first round" in output.getvalue()
    assert "train: 2/3 sites" in output.getvalue()


@pytest.mark.parametrize(
    ("requested", "shown"),
    [
        (["train/keys"], "train, keys"),
        (["train/keys", "train/shares", "train"], "train: 3/3 sites"),
        (["train/masked", "train", "train/reveal"], "train: 3/3 sites, reveal"),
        (["train", "evaluate/keys"], "train: 3/3 sites  evaluate, keys"),
        (["train", "evaluate/keys", "evaluate"], "train: 3/3 sites  evaluate: 3/3 sites"),
    ],
    ids=str,
)
def test_who_answers_a_step_on_the_way_has_not_answered_yet(requested: list[str], shown: str) -> None:
    output = io.StringIO()
    with Progress(2, console=terminal(output)) as progress:
        fleet = progress.watch(Echo("a", "b", "c"))
        for op in requested:
            fleet.submit_many(Requests(to=fleet.parties(), op=op, round=1), 1)
            while fleet.next_reply() is not None:
                pass
    assert output.getvalue().rpartition("0/2")[2].splitlines()[0].strip() == shown


def test_on_a_terminal_the_last_value_of_each_metric_is_kept() -> None:
    output = io.StringIO()
    with Progress(2, console=terminal(output)) as progress:
        progress.show(Report(round=1, metrics={"test_accuracy": 0.5}, absent={"a": "no rows"}))
        progress.show(Report(round=2, metrics={"train_loss": 0.25}))
    assert "warning: round 1 goes on without a: no rows" in output.getvalue()
    last = output.getvalue().rpartition("2/2")[2]
    assert "test_accuracy 50.0%  train_loss 0.2500" in last


def test_the_time_left_counts_what_rounds_took_and_not_what_was_waited_for_sites() -> None:
    reports = [Report(round=number, seconds={"sites": 100.0, "aggregation": 20.0}) for number in (1, 2)]
    (first, _) = lines_of(reports, 4, every_s=0.0)
    assert "2 min 00 s/round" in first
    assert "about 6 min 00 s left" in first
