"""The loop, driven by a program and a fleet that are written out here: the sites' mean, one step closer each round."""

from collections import deque
from dataclasses import dataclass

import pytest
import torch

from fedelta.core import snapshot
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import Reply, Request
from fedelta.core.program import Report, Site, SiteData, run


@dataclass(frozen=True)
class Centre:
    at: float = 0.0
    round: int = 0


@dataclass(frozen=True, kw_only=True)
class Averaging:
    rounds: int

    def init(self):
        return Centre()

    def finished(self, state):
        return f"{self.rounds} rounds are done" if state.round >= self.rounds else None

    def step(self, state, fleet):
        for to in fleet.parties():
            shared = {"at": torch.tensor(state.at, dtype=torch.float64)}
            fleet.submit(Request(to=to, op="distance", round=state.round + 1, shared=shared))
        replies = []
        while (reply := fleet.next_reply()) is not None:
            replies.append(reply)
        present = [reply.body["distance"].item() for reply in replies if reply.error is None]
        after = Centre(state.at + sum(present) / len(present) / 2, state.round + 1)
        absent = {reply.sender: reply.error for reply in replies if reply.error is not None}
        return after, Report(round=after.round, metrics={"at": after.at}, absent=absent, stop=self.finished(after))

    def handle(self, request, site):
        if site.id == "broken":
            return Reply.failure(request, "no disk")
        targets = site.data().train.targets
        return Reply.to_request(request, {"distance": targets.double().mean() - request.shared["at"]})


class InOrder:
    """A fleet in this process: each request is answered when the reply is asked for."""

    def __init__(self, program, data):
        self._program = program
        self._sites = {
            name: Site(id=name, data=lambda values=values: SiteData.of((values, values)))
            for name, values in data.items()
        }
        self._waiting = deque()

    def parties(self):
        return list(self._sites)

    def submit(self, request):
        self._waiting.append(request)

    def next_reply(self, timeout_s=None):
        if not self._waiting:
            return None
        request = self._waiting.popleft()
        return self._program.handle(request, self._sites[request.to])

    def cancel(self, request_id):
        self._waiting = deque(request for request in self._waiting if request.id != request_id)


DATA = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([6.0]), "broken": torch.tensor([0.0])}


def test_a_run_yields_state_and_report_of_every_round_and_stops():
    program = Averaging(rounds=3)
    pairs = list(run(program, InOrder(program, DATA)))
    assert [state for state, _ in pairs] == [Centre(2.0, 1), Centre(3.0, 2), Centre(3.5, 3)]
    assert [report.round for _, report in pairs] == [1, 2, 3]
    assert [report.metrics["at"] for _, report in pairs] == [2.0, 3.0, 3.5]
    assert all(report.absent == {"broken": "no disk"} for _, report in pairs)
    assert [report.stop for _, report in pairs] == [None, None, "3 rounds are done"]


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_continued_from_a_saved_state_ends_like_an_uninterrupted_one(tmp_path, stop):
    program = Averaging(rounds=6)
    whole = list(run(program, InOrder(program, DATA)))
    for state, report in run(program, InOrder(program, DATA)):
        if report.round == stop:
            snapshot.save(tmp_path / "state", state)
            break
    state, _ = snapshot.load(tmp_path / "state", program.init())
    assert list(run(program, InOrder(program, DATA), state)) == whole[stop:]


def test_a_finished_run_does_nothing():
    program = Averaging(rounds=2)
    assert list(run(program, InOrder(program, DATA), Centre(1.0, 2))) == []


def test_rounds_are_done_one_at_a_time_as_they_are_asked_for():
    program = Averaging(rounds=10**9)
    loop = run(program, InOrder(program, DATA))
    assert next(loop)[1].round == 1
    assert next(loop)[1].round == 2


def test_site_data_is_what_a_site_may_return():
    x, y = torch.zeros(2, 1), torch.zeros(2)
    examples = Examples({"x": x}, y)
    whole = SiteData(train=examples, validation=examples)
    assert SiteData.of(whole) is whole
    assert SiteData.of(examples).train is examples
    assert torch.equal(SiteData.of((x, y)).train.targets, y)
    assert SiteData.of((x, y)).validation is None
    with pytest.raises(BadInput, match="got list"):
        SiteData.of([1])
