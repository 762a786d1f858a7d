"""A federation whose coordinator sees sums only, against the same federation in the clear."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedelta.adapters.flexlora import FlexLoRA
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.fedopt import FedAdam, FedOpt
from fedelta.algorithms.parts import Clear, Collect, Float32
from fedelta.algorithms.sampling import Cyclic, Fixed, Poisson
from fedelta.algorithms.state import FederationState
from fedelta.core.errors import BadInput, RoundLost, TooFewSites, UnsoundCombination
from fedelta.core.examples import Examples
from fedelta.core.grid import Terms
from fedelta.core.keys import new_key
from fedelta.core.messages import PUBLIC, PartyId, Replies, Reply, Request, Requests, Tensors, Update
from fedelta.core.parameters import Layout
from fedelta.core.program import Report, Site, SiteData, run
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Workers
from fedelta.learning.closed_form import Ridge
from fedelta.learning.lora import LoRA
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.task import Task
from fedelta.learning.training import Training
from fedelta.privacy.clipping import AdaptiveClip
from fedelta.privacy.example_level import ROWS, ExampleLevel
from fedelta.privacy.ledger import MemoryLedger
from fedelta.privacy.local_dp import LocalDP
from fedelta.privacy.site_level import SiteLevel
from fedelta.secure.aggregation import SecureAggregation, identities

NAMES = [f"site-{i}" for i in range(6)]
SECURE = SecureAggregation()
TRAINING = Training(optimizer=SGD(lr=0.3), batch=8)
WHOLE = Training(optimizer=SGD(lr=0.3), batch=10)  # all rows of a site: no batch is drawn at random


def rows(name: str) -> SiteData:
    place = int(name.rpartition("-")[2])
    x = torch.randn(13 + place, 6, generator=torch.Generator().manual_seed(place))
    examples = Examples.of((x, (x.sum(dim=1) > 0).long()))
    return SiteData(train=examples[:10], validation=examples[10:] if place else None)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


TASK = Task(model=network, objective=Classification(classes=2))


def federation(**changes: Any) -> Federation[Any]:
    parts = {"algorithm": FedAvg(task=TASK, training=TRAINING), "rounds": 2, "seed": 3, "collect": SECURE}
    return Federation(**{**parts, **changes})


def in_the_clear(program: Federation[Any]) -> Federation[Any]:
    return replace(program, collect=Clear(), ledger=MemoryLedger())


def weights(program: Federation[Any], state: FederationState[Any]) -> Tensor:
    return program.algorithm.parameters(state.algorithm).vector


def ended(program: Federation[Any], fleet: Any = None) -> tuple[FederationState[Any], list[Report]]:
    fleet = Local(program, rows, NAMES) if fleet is None else fleet
    found = list(run(program, fleet))
    return found[-1][0], [report for _, report in found]


@dataclass
class Losing:
    """A fleet that loses answers: those of `sites` to requests whose kind ends with `step`, in round `round`."""

    fleet: Local
    sites: Collection[PartyId]
    step: str
    round: int
    seen: list[tuple[str, Reply]] = field(default_factory=list)

    def parties(self) -> Sequence[PartyId]:
        return self.fleet.parties()

    def submit(self, request: Request) -> None:
        self.fleet.submit(request)

    def submit_many(self, requests: Requests, together: int) -> None:
        self.fleet.submit_many(requests, together)

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        reply = self.fleet.next_reply(timeout_s)
        if not isinstance(reply, Reply):
            return reply
        kind = reply.answers.removeprefix(f"/{reply.round}/").rpartition("/0/")[0]
        self.seen.append((kind, reply))
        if reply.sender in self.sites and kind == self.step and reply.round == self.round:
            return Reply(sender=reply.sender, answers=reply.answers, round=reply.round, error="the line is dead")
        return reply

    def cancel(self, request_id: str) -> None:
        self.fleet.cancel(request_id)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"start": Ridge()},
        {"validate_at_sites": True},
        {"sampling": Fixed(size=4)},
        {"algorithm": FedOpt(client=FedAvg(task=TASK, training=TRAINING), server=FedAdam())},
    ],
)
def test_the_bits_are_those_in_the_clear(changes: dict[str, Any]) -> None:
    program = federation(**changes)
    clear = in_the_clear(program)
    (state, reports), (plain, expected) = ended(program), ended(clear)
    assert torch.equal(weights(program, state), weights(clear, plain))
    for report, known in zip(reports, expected, strict=True):
        assert report.metrics == pytest.approx(known.metrics, rel=1e-12)
        assert report.releases == known.releases
        assert (report.absent, report.unmeasured) == ({}, {})
        assert report.per_site == {}


def test_the_bits_are_those_in_the_clear_in_worker_processes_too() -> None:
    program = federation(plan=Plan(cohort=1, channels_last=False))
    with Workers(program, rows, NAMES, workers=2) as fleet:
        state, _ = ended(program, fleet)
    clear = in_the_clear(program)
    assert torch.equal(weights(program, state), weights(clear, ended(clear)[0]))


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": SiteLevel(clip=0.5, noise=1e-4)},
        {"privacy": SiteLevel(clip=0.5, noise=1e-4, bands=2), "sampling": Cyclic(groups=2)},
        {"privacy": SiteLevel(clip=AdaptiveClip(initial=0.3), noise=1e-4)},
        {"privacy": ExampleLevel(clip=0.5, noise=1e-4), "algorithm": FedAvg(task=TASK, training=WHOLE)},
        {"privacy": LocalDP(clip=0.5, noise=1e-4)},
    ],
)
def test_a_guarantee_is_the_same_over_sums(changes: dict[str, Any]) -> None:
    """Noise is another one, as it depends on all parts of a program; so little that it does not show."""
    program = federation(**changes)
    clear = in_the_clear(program)
    (state, reports), (plain, expected) = ended(program), ended(clear)
    assert torch.allclose(weights(program, state), weights(clear, plain), atol=2e-2)
    for report, known in zip(reports, expected, strict=True):
        assert [release.event for release in report.releases] == [release.event for release in known.releases]
        assert {release.of for release in report.releases} == {release.of for release in known.releases}


@pytest.mark.parametrize("weight_bound", [2.0**4, 2.0**10])
def test_with_32_bits_the_mean_is_off_by_no_more_than_is_stated(weight_bound: float) -> None:
    collect = SecureAggregation(bits=32, weight_bound=weight_bound)
    program = federation(collect=collect, rounds=1)
    clear = in_the_clear(program)
    off = (weights(program, ended(program)[0]).double() - weights(clear, ended(clear)[0]).double()).abs().max()
    total = 10.0 * len(NAMES)  # rows
    bound = len(NAMES) * collect.resolution(len(NAMES)) / (2 * total)
    assert 0 < off <= bound + 2**-23


def test_a_whole_run_in_32_bits_ends_where_one_in_the_clear_does() -> None:
    program = federation(collect=SecureAggregation(bits=32, weight_bound=16.0), rounds=12, test=rows("site-9").train)
    clear = in_the_clear(program)
    (state, reports), (plain, expected) = ended(program), ended(clear)
    assert torch.allclose(weights(program, state), weights(clear, plain), atol=1e-5)
    assert reports[-1].metrics["test_accuracy"] == expected[-1].metrics["test_accuracy"]


@dataclass(frozen=True, kw_only=True)
class Some:
    """An encoding of `count` elements, the same of all sites, each enlarged so that the expectation is the vector."""

    count: int
    linear: bool = True

    def _which(self, size: int) -> Tensor:
        return torch.randperm(size, generator=torch.Generator().manual_seed(0))[: self.count]

    def encode(self, update: Update) -> Tensors:
        vector = update.values.vector
        found = dict(update.to_tensors())
        found[update.kind] = vector[self._which(len(vector))] * (len(vector) / self.count)
        return found

    def decode(self, tensors: Tensors, layout: Layout) -> Update:
        whole = torch.zeros(layout.size)
        whole[self._which(layout.size)] = tensors["difference"]
        return Update.from_tensors({**tensors, "difference": whole}, layout)


def test_a_linear_encoding_is_added_up_as_it_is() -> None:
    program = federation(encoding=Some(count=20), rounds=1)
    clear = in_the_clear(program)
    (state, (report,)), (plain, _) = ended(program), ended(clear)
    assert torch.equal(weights(program, state), weights(clear, plain))
    assert int((weights(program, state) != weights(program, program.init())).sum()) == 20
    assert report.bytes_up < ended(federation(rounds=1))[1][0].bytes_up


@pytest.mark.parametrize("collect", [SECURE, Clear()])
def test_what_was_said_in_an_earlier_round_is_not_taken_again(collect: Collect) -> None:
    program = federation(collect=collect, rounds=3)

    @dataclass
    class Replaying(Losing):
        """Before every answer comes what the same site has answered a round before."""

        due: list[Reply] = field(default_factory=list)

        def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
            if self.due:
                return self.due.pop()
            reply = super().next_reply(timeout_s)
            kind = self.seen[-1][0]
            old = [
                found for known, found in self.seen[:-1] if known == kind and found.sender == self.seen[-1][1].sender
            ]
            if old and isinstance(reply, Reply):
                self.due = [reply]
                return old[-1]
            return reply

    state, reports = ended(program, Replaying(Local(program, rows, NAMES), (), "", 0))
    assert not any(report.absent for report in reports)
    assert torch.equal(weights(program, state), weights(program, ended(program)[0]))


def test_what_leaves_a_site_is_half_as_much_with_32_bits() -> None:
    wide = partial(nn.Linear, 6, 40_000)
    algorithm = FedAvg(task=Task(model=wide, objective=Classification(classes=40_000)), training=TRAINING)
    up = {}
    for bits in (32, 64):
        program = federation(algorithm=algorithm, rounds=1, collect=SecureAggregation(bits=bits))
        up[bits] = ended(program)[1][0].bytes_up
    plain = ended(in_the_clear(program))[1][0].bytes_up
    assert up[32] < 1.02 * plain < 1.02 * up[64] / 1.98


@pytest.mark.parametrize("step", ["train/keys", "train/shares", "train/masked", "train"])
def test_the_mean_is_that_of_the_survivors(step: str) -> None:
    program = federation(rounds=1)
    fleet = Losing(Local(program, rows, NAMES), {"site-2"}, step, 1)
    state, (report,) = ended(program, fleet)
    assert report.absent == {"site-2": "the line is dead"}
    clear = in_the_clear(program)
    lost = Losing(Local(clear, rows, NAMES), {"site-2"}, "train", 1)
    assert torch.equal(weights(program, state), weights(clear, ended(clear, lost)[0]))
    assert state.bases.keys() == set(NAMES) - {"site-2"}


@pytest.mark.parametrize("step", ["train/survivors", "train/reveal"])
def test_a_site_that_falls_silent_after_its_update_came_is_in_the_mean(step: str) -> None:
    program = federation(rounds=1)
    state, (report,) = ended(program, Losing(Local(program, rows, NAMES), {"site-2"}, step, 1))
    assert not report.absent
    clear = in_the_clear(program)
    assert torch.equal(weights(program, state), weights(clear, ended(clear)[0]))


def test_a_site_without_data_says_so_and_the_others_go_on() -> None:
    def some(name: str) -> SiteData:
        if name == "site-4":
            raise FileNotFoundError("records.csv")
        return rows(name)

    program = federation(rounds=1)
    _, (report,) = ended(program, Local(program, some, NAMES))
    assert list(report.absent) == ["site-4"]
    assert "records.csv" in report.absent["site-4"]


def test_too_few_from_the_start_end_the_run_and_nothing_has_left() -> None:
    program = federation()
    fleet = Losing(Local(program, rows, NAMES), set(NAMES[:3]), "train/keys", 1)
    with pytest.raises(TooFewSites, match=r"3 of 6 sites sent keys, and a secure sum needs 5.*line is dead") as caught:
        ended(program, fleet)
    assert not isinstance(caught.value, RoundLost)
    assert "train" not in {kind for kind, _ in fleet.seen}


@pytest.mark.parametrize("step", ["train", "train/survivors", "train/reveal"])
def test_a_round_that_is_lost_after_updates_have_left_is_given_up(step: str) -> None:
    program = federation(rounds=3, test=rows("site-9").train)
    fleet = Losing(Local(program, rows, NAMES), set(NAMES[:4]), step, 2)
    found = list(run(program, fleet))
    assert [state.round for state, _ in found] == [1, 2, 3]
    before, given_up, after = (weights(program, state) for state, _ in found)
    assert torch.equal(before, given_up)
    assert not torch.equal(given_up, after)
    lost = found[1][1]
    assert set(lost.absent) == set(NAMES)
    assert "train_loss" not in lost.metrics
    assert found[0][1].metrics["test_loss"] == lost.metrics["test_loss"]


def test_a_masked_update_leaves_once_for_a_round_however_often_it_is_asked_for() -> None:
    program = federation(rounds=3)
    fleet = Local(program, rows, NAMES)
    rounds = run(program, fleet)
    first, _ = next(rounds)
    next(rounds)
    again = list(run(program, fleet, first))  # the coordinator has lost round 2, and asks for it again
    assert [state.round for state, _ in again] == [2, 3]
    assert set(again[0][1].absent) == set(NAMES)
    assert torch.equal(weights(program, again[0][0]), weights(program, first))
    assert not again[1][1].absent


def test_a_run_that_loses_round_after_round_ends() -> None:
    program = federation(rounds=6)

    @dataclass
    class Always(Losing):
        def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
            reply = self.fleet.next_reply()
            silent = isinstance(reply, Reply) and reply.sender in self.sites and "survivors" in reply.answers
            return replace(reply, body={}, error="the line is dead") if silent else reply  # type: ignore[type-var]

    rounds = run(program, Always(Local(program, rows, NAMES), set(NAMES[:4]), "", 0))
    assert [next(rounds)[0].round for _ in range(2)] == [1, 2]
    with pytest.raises(RoundLost, match="2 of 6 sites signed the set of survivors"):
        next(rounds)


def test_a_round_zero_that_is_lost_ends_the_run() -> None:
    program = federation(start=Ridge())
    fleet = Losing(Local(program, rows, NAMES), set(NAMES[:4]), "statistics", 0)
    with pytest.raises(RoundLost, match="2 of 6 sites sent their masked vectors"):
        ended(program, fleet)


def test_what_the_coordinator_gets_of_a_site_is_noise() -> None:
    """Bytes of a masked update are uniform (chi-square, 255 degrees of freedom), and never the same twice."""
    wide = partial(nn.Linear, 6, 5_000)
    algorithm = FedAvg(task=Task(model=wide, objective=Classification(classes=5_000)), training=TRAINING)
    program = federation(algorithm=algorithm, rounds=1)
    seen = []
    for _ in range(2):
        fleet = Losing(Local(program, rows, NAMES), (), "", 0)
        ended(program, fleet)
        seen.append(next(reply.body for kind, reply in fleet.seen if kind == "train" and reply.sender == NAMES[0]))
    for body in seen:
        bytes_ = torch.cat([body[name].view(torch.uint8) for name in ("values", "numbers")]).long()
        expected = len(bytes_) / 256
        square = float(((torch.bincount(bytes_, minlength=256) - expected) ** 2 / expected).sum())
        assert 147 < square < 403  # all but 1e-8 of the cases
    assert not bool((seen[0]["values"] == seen[1]["values"]).any())
    assert not bool((seen[0]["numbers"] == seen[1]["numbers"]).any())


def test_a_site_whose_update_is_out_of_bounds_is_absent_and_the_sum_does_not_wrap() -> None:
    program = federation(rounds=1, collect=SecureAggregation(bits=32, bound=1e-3))
    with pytest.raises(TooFewSites, match=r"its difference goes beyond 0\.001"):
        ended(program)


@pytest.mark.parametrize("body", [{"form": torch.zeros(3, dtype=torch.uint8)}, {"values": torch.zeros(4).long()}, {}])
def test_a_malformed_masked_update_is_left_out(body: dict[str, Tensor]) -> None:
    program = federation(rounds=1)

    @dataclass
    class Garbling(Losing):
        def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
            reply = super().next_reply(timeout_s)
            if isinstance(reply, Reply) and reply.sender == "site-5" and self.seen[-1][0] == "train":
                return replace(reply, body={**reply.body, **body} if body else {})
            return reply

    _, (report,) = ended(program, Garbling(Local(program, rows, NAMES), (), "", 0))
    assert list(report.absent) == ["site-5"]


def test_sites_know_each_other_by_their_identities(tmp_path: Path) -> None:
    for name in [*NAMES, "stranger"]:
        new_key(tmp_path / name)
    known = identities(tmp_path)
    program = federation(rounds=1, collect=SecureAggregation(identities=known))

    def signing(name: str, key: str | None = None) -> SiteData:
        return replace(rows(name), identity=tmp_path / (key or name))

    _, (report,) = ended(program, Local(program, signing, NAMES))
    assert not report.absent
    impostor = Local(program, lambda name: signing(name, "stranger" if name == "site-1" else None), NAMES)
    _, (report,) = ended(program, impostor)
    assert "not the one in the registry" in report.absent["site-1"]
    anonymous = Local(program, lambda name: rows(name) if name == "site-1" else signing(name), NAMES)
    _, (report,) = ended(program, anonymous)
    assert "has no identity key" in report.absent["site-1"]
    with pytest.raises(BadInput, match="has no public key"):
        identities(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="no Ed25519 public key of 64 hex digits"):
        SecureAggregation(identities={"a": "zz"})


def adapted() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    return LoRA(rank=2, targets=("0", "2")).apply(module)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": FlexLoRA(task=Task(model=adapted, objective=Classification(classes=2)), training=TRAINING)},
            "reveals only their sum; use Clear",
        ),
        ({"sampling": Fixed(size=2)}, "asks fewer sites than the 3"),
        (
            {"sampling": Poisson(rate=0.5), "privacy": SiteLevel(clip=1.0, noise=1.0)},
            "sites know each other",
        ),
        (
            {"sampling": Fixed(size=4), "privacy": SiteLevel(clip=1.0, noise=1.0, accountant="rdp")},
            "sites know each other",
        ),
        ({"min_sites": 4}, "give least=4 to the collect"),
        ({"plan": Plan(cohort=4)}, "leave Plan.cohort out"),
        ({"encoding": Float32(linear=False)}, "use a linear encoding"),
    ],
)
def test_what_does_not_hold_under_sums_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UnsoundCombination, BadInput), match=message):
        federation(**changes)


def test_statistics_that_are_averaged_have_no_bound_and_are_refused() -> None:
    task = Task(model=Normalised, objective=Classification(classes=2))
    program = federation(algorithm=FedAvg(task=task, training=TRAINING))
    with pytest.raises(UnsoundCombination, match="freezes BatchNorm"):
        program.init()


def test_two_sites_are_too_few() -> None:
    program = federation()
    with pytest.raises(TooFewSites, match="there are 2 sites, and 3 under"):
        ended(program, Local(program, rows, NAMES[:2]))


@pytest.mark.parametrize("guaranteed", [False, True])
def test_under_a_guarantee_no_reason_of_a_site_is_told(guaranteed: bool) -> None:
    privacy = ExampleLevel(clip=0.5, noise=1.0) if guaranteed else None
    program = federation(rounds=1, collect=SecureAggregation(bits=32, bound=1e-4), privacy=privacy)
    with pytest.raises(TooFewSites, match="no guarantee covers why" if guaranteed else "goes beyond 0.0001"):
        ended(program)


def test_a_site_that_is_sent_another_model_than_the_others_is_not_summed() -> None:
    """With a model on which all others learn nothing, the sum would be the update of one."""
    program = federation(rounds=1)

    @dataclass
    class Inconsistent(Losing):
        """The coordinator of the others is honest; one site gets `body` or `shared` of another."""

        kind: str = "body"

        def submit_many(self, requests: Requests, together: int) -> None:
            if requests.op != "train":
                self.fleet.submit_many(requests, together)
                return
            other = {"parameters": torch.zeros_like(requests.shared["parameters"])}
            for request in requests:
                if request.to == "site-1" and self.kind == "body":
                    request = replace(request, body=other)
                elif request.to == "site-1":
                    request = replace(request, shared=other)
                self.fleet.submit(request)

    for kind, reason in (("body", "apart from all others"), ("shared", "or its task")):
        _, (report,) = ended(program, Inconsistent(Local(program, rows, NAMES), (), "", 0, kind=kind))
        assert list(report.absent) == ["site-1"]
        assert reason in report.absent["site-1"]


@dataclass
class Altering(Losing):
    """A fleet in which the answers of `sites` to requests of kind `step` are altered on their way."""

    def altered(self, body: dict[str, Tensor]) -> dict[str, Tensor]:
        return body

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        reply = self.fleet.next_reply(timeout_s)
        if (
            isinstance(reply, Reply)
            and reply.sender in self.sites
            and reply.answers.startswith(f"/{self.round}/train/0")
        ):
            return replace(reply, body=self.altered({name: tensor.clone() for name, tensor in reply.body.items()}))
        return reply


class Fractional(Altering):
    """Adds one half to the number of sites that an update is of."""

    def altered(self, body: dict[str, Tensor]) -> dict[str, Tensor]:
        numbers: list[str] = json.loads(bytes(body["form"].tolist()))[2]
        body["numbers"][3 * numbers.index("count") + 1] += 2**25
        return body


def test_a_lie_that_spoils_the_sum_costs_a_round_and_not_the_run() -> None:
    program = federation(rounds=3)
    found = list(run(program, Fractional(Local(program, rows, NAMES), ["site-1"], "", 2)))
    assert [state.round for state, _ in found] == [1, 2, 3]
    assert set(found[1][1].absent) == set(NAMES)
    assert not found[2][1].absent


class Counting(Altering):
    said: float = 0.0

    def altered(self, body: dict[str, Tensor]) -> dict[str, Tensor]:
        body[PUBLIC + ROWS] = torch.tensor(self.said, dtype=torch.float64)
        return body


@pytest.mark.parametrize("said", [float("nan"), float("inf"), -3.0, 0.0, 1.5, 1e300])
def test_a_site_that_says_nonsense_of_its_rows_is_absent(said: float) -> None:
    program = federation(rounds=1, privacy=ExampleLevel(clip=0.5, noise=1.0))
    fleet = Counting(Local(program, rows, NAMES), ["site-1"], "", 1)
    fleet.said = said
    _, (report,) = ended(program, fleet)
    assert list(report.absent) == ["site-1"]


class First(Altering):
    """A site that is quick, and sends another form than the others."""

    def altered(self, body: dict[str, Tensor]) -> dict[str, Tensor]:
        form = torch.tensor(list(json.dumps([{"difference": 3}, {}, ["weight"]]).encode()), dtype=torch.uint8)
        return {**body, "form": form}


def test_the_form_of_most_counts_and_not_that_of_the_first() -> None:
    program = federation(rounds=1)
    _, (report,) = ended(program, First(Local(program, rows, NAMES), ["site-0"], "", 1))
    assert report.absent == {"site-0": "its masked update is of another form than most"}


def test_why_the_work_of_a_site_failed_does_not_leave_it(caplog: pytest.LogCaptureFixture) -> None:
    """A loss that is told would be that of the site alone, on a model that the coordinator chooses."""
    wild = FedAvg(task=TASK, training=Training(optimizer=SGD(lr=1e38), batch=8, epochs=9))
    program = federation(algorithm=wild, rounds=1)
    with pytest.raises(TooFewSites, match="why is in its own log") as caught:
        ended(program)
    assert "its loss became" not in str(caught.value)
    assert "site-0: its loss became" in caplog.text


def test_a_site_works_once_for_a_round_whether_it_fails_or_not() -> None:
    """Whether an update is within its bounds is an answer, too, about a model that the coordinator chooses."""
    program = federation(rounds=1, collect=SecureAggregation(bits=32, bound=1e-4))
    fleet = Local(program, rows, NAMES)
    with pytest.raises(TooFewSites, match="goes beyond"):
        ended(program, fleet)
    shared = {"parameters": weights(program, program.init())}
    again = Request(to="site-0", op="train", round=1, attempt=0, shared=shared)
    fleet.submit(again)
    reply = fleet.next_reply()
    assert isinstance(reply, Reply)
    assert "works on it once" in str(reply.error)
    _, report = next(run(program, fleet))
    assert "worked on this round already" in report.absent["site-3"]


def test_a_session_is_of_one_round_and_attempt() -> None:
    program = federation()
    site = Site(id="site-0", data=lambda: rows("site-0"))
    keys = {"cohort": torch.tensor(6)}
    program.handle(Request(to="site-0", op="train/keys", round=5, shared=keys), site)
    for other in ({"round": 6}, {"round": 5, "attempt": 1}, {"round": 5, "job": "another"}):
        request = Request(to="site-0", op="train", shared={"parameters": torch.zeros(1)}, **other)
        with pytest.raises(BadInput, match="knows of no secure sum"):
            program.handle(request, site)


def test_a_model_is_measured_once_by_each_site() -> None:
    """Exact sums of one model by two sets of sites would be those of the sites that one of them lacks."""
    program = federation(rounds=3, validate_at_sites=True)
    fleet = Losing(Local(program, rows, NAMES), set(NAMES[:4]), "train/survivors", 2)
    measured = [any(name.startswith("validation") for name in report.metrics) for _, report in run(program, fleet)]
    assert measured == [True, False, True]


@pytest.mark.parametrize("collect", [SECURE, Clear()])
def test_what_was_not_declared_is_not_measured(collect: Collect) -> None:
    program = federation(collect=collect)
    fleet = Local(program, rows, NAMES)
    fleet.submit(Request(to="site-1", op="evaluate", round=1, shared={"parameters": torch.zeros(1)}))
    reply = fleet.next_reply()
    assert isinstance(reply, Reply)
    assert "knows no 'evaluate' request" in str(reply.error)


def test_a_request_without_a_model_is_refused_and_no_bug_of_the_site() -> None:
    program = federation(collect=Clear(), start=Ridge())
    for op, round in (("train", 1), ("statistics", 0)):
        fleet = Local(program, rows, NAMES)
        fleet.submit(Request(to="site-1", op=op, round=round))
        reply = fleet.next_reply()
        assert isinstance(reply, Reply)
        assert "the request lacks 'parameters'" in str(reply.error)


def test_groups_that_are_too_small_for_a_sum_end_the_run_at_once() -> None:
    program = federation(sampling=Cyclic(groups=3))
    with pytest.raises(TooFewSites, match=r"asks 2 sites in a round, and a sum is of 3; ask more"):
        ended(program)


def test_a_site_insists_on_as_many_sites_as_it_was_set_up_with() -> None:
    """The cohort that a site is told is the coordinator's word."""
    careful, lying = (federation(rounds=1, collect=SecureAggregation(least=least)) for least in (5, 3))
    with pytest.raises(
        TooFewSites, match=r"0 of 4 sites sent keys.*a sum of 4 sites says too much of each; 5 must be asked"
    ):
        ended(lying, Local(careful, rows, NAMES[:4]))
    program = federation(rounds=1, collect=SecureAggregation(least=6))
    with pytest.raises(TooFewSites, match="5 of 6 sites sent keys, and a secure sum needs 6"):
        ended(program, Losing(Local(program, rows, NAMES), {"site-2"}, "train/keys", 1))


@pytest.mark.parametrize(
    "changes", [{"bits": 16}, {"least": 2}, {"bound": 0.0}, {"dropouts": 0.5}, {"colluding": -0.1}]
)
def test_settings_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="SecureAggregation"):
        SecureAggregation(**changes)


def test_the_resolution_is_that_of_the_mean() -> None:
    mean = Federation.aggregation.fget(in_the_clear(federation()))  # type: ignore[attr-defined]
    assert SECURE.resolution(100, mean.terms) == mean.resolution(100)
    assert SecureAggregation(bits=32).resolution(100, Terms()) == 2.0**-11
