"""What a guarantee does to a run: what is released, taken down, withheld and refused."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.fedopt import FedAdam, FedOpt
from fedelta.algorithms.mechanism import Privacy
from fedelta.algorithms.sampling import All, Cyclic, Fixed, Poisson, Sampling
from fedelta.algorithms.tally import Tally
from fedelta.core.errors import BadInput, BudgetSpent, CannotResume, TooFewSites, UnsoundCombination
from fedelta.core.examples import Examples
from fedelta.core.messages import Request, Requests
from fedelta.core.program import Report, Site, SiteData, run
from fedelta.core.release import Budget, Limit, Release
from fedelta.core.snapshot import load, save
from fedelta.fleet.answer import answer
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Workers
from fedelta.learning.closed_form import LDA, Ridge
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.task import Task
from fedelta.learning.training import Training
from fedelta.privacy.accounting import epsilon
from fedelta.privacy.clipping import AdaptiveClip
from fedelta.privacy.events import gaussian, steps
from fedelta.privacy.example_level import ExampleLevel
from fedelta.privacy.ledger import FileLedger, MemoryLedger
from fedelta.privacy.local_dp import LocalDP
from fedelta.privacy.site_level import SiteLevel

SITES = [f"site-{i:02d}" for i in range(20)]
DIRECTIONS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def site(name: str) -> Examples:
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(int(name[-2:])))
    return Examples.of((x, (x @ DIRECTIONS).argmax(1)))


TASK = Task(model=module, objective=Classification(classes=3))
TRAINING = Training(optimizer=SGD(lr=0.3), batch=4)


def federation(privacy: Privacy | None, sampling: Sampling | None = None, **settings: Any) -> Federation[Any]:
    given: dict[str, Any] = {"rounds": 4, "test": site("site-99"), **settings}
    algorithm = FedAvg(task=TASK, training=TRAINING)
    return Federation(algorithm=algorithm, privacy=privacy, sampling=sampling or All(), **given)


def ran(program: Federation[Any], data: Callable[[str], object] = site) -> list[tuple[Any, Report]]:
    return list(run(program, Local(program, data, SITES)))


MECHANISMS: list[tuple[Privacy, Sampling]] = [
    (SiteLevel(clip=0.5, noise=1.0), All()),
    (SiteLevel(clip=0.5, noise=1.0), Poisson(rate=0.4)),
    (SiteLevel(clip=0.5, noise=1.0, accountant="rdp"), Fixed(size=6)),
    (SiteLevel(clip=0.5, noise=1.0, bands=3), Cyclic(groups=4)),
    (SiteLevel(clip=AdaptiveClip(initial=0.5), noise=0.8), All()),
    (LocalDP(clip=0.5, noise=1.0), All()),
    (ExampleLevel(clip=1.0, noise=1.0), All()),
]


@pytest.mark.parametrize(("privacy", "sampling"), MECHANISMS, ids=str)
def test_every_release_is_in_the_ledger_and_in_the_report(privacy: Privacy, sampling: Sampling) -> None:
    program = federation(privacy, sampling)
    reports = [report for _, report in ran(program)]
    assert [release for report in reports for release in report.releases] == list(program.ledger.releases())
    assert all(report.releases for report in reports)
    assert all(math.isfinite(report.metrics["test_loss"]) for report in reports)


@pytest.mark.parametrize(("privacy", "sampling"), MECHANISMS, ids=str)
def test_nothing_else_about_a_site_is_reported(privacy: Privacy, sampling: Sampling) -> None:
    for _, report in ran(federation(privacy, sampling)):
        assert set(report.metrics) <= {"test_loss", "test_accuracy", "epsilon"}
        assert not report.per_site


@pytest.mark.parametrize(("privacy", "sampling"), MECHANISMS, ids=str)
def test_a_run_can_be_repeated_also_on_workers(privacy: Privacy, sampling: Sampling) -> None:
    first = ran(federation(privacy, sampling))
    program = federation(privacy, sampling)
    with Workers(program, site, SITES, workers=2) as fleet:
        second = list(run(program, fleet))
    for (one, _), (other, _) in zip(first, second, strict=True):
        assert torch.equal(one.algorithm.vector, other.algorithm.vector)


def test_with_next_to_no_noise_and_a_wide_bound_it_is_the_plain_mean() -> None:
    def alike(name: str) -> Examples:
        return site(name)

    plain = ran(federation(None), alike)[-1][0].algorithm.vector
    for privacy in (SiteLevel(clip=100.0, noise=1e-6), LocalDP(clip=100.0, noise=1e-6)):
        private = ran(federation(privacy), alike)[-1][0].algorithm.vector
        torch.testing.assert_close(private, plain, atol=1e-3, rtol=0)


def deltas(program: Federation[Any], rounds: int) -> torch.Tensor:
    """What each round has added to the model [rounds, size]."""
    start = program.init().algorithm.vector
    states = [state.algorithm.vector for state, _ in ran(program)]
    return torch.stack([after - before for before, after in zip([start, *states[:-1]], states, strict=True)])[:rounds]


def empty(name: str) -> Examples:
    """With nothing to learn: the loss of one class out of one is 0 up to rounding, so deltas are next to nothing."""
    return Examples.of((torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("privacy", "sampling", "expected"),
    [
        (SiteLevel(clip=0.01, noise=300.0), All(), 3.0 / 20),
        (SiteLevel(clip=0.01, noise=300.0), Poisson(rate=0.25), 3.0 / 5),
        (SiteLevel(clip=0.01, noise=300.0, accountant="rdp"), Fixed(size=5), 6.0 / 5),
        (LocalDP(clip=0.01, noise=300.0), All(), 6.0 / math.sqrt(20)),
    ],
    ids=str,
)
def test_the_noise_in_a_round_has_the_stated_size(privacy: Privacy, sampling: Sampling, expected: float) -> None:
    """The deltas, of norm 0.01 at most, do not count beside it; 40 rounds are 2,280 draws, and 5 sigma is 7.4%."""
    found = deltas(federation(privacy, sampling, rounds=40, evaluate_every=100, test=None), 40)
    assert float(found.std()) == pytest.approx(expected, rel=0.075)


def test_the_sum_is_divided_by_the_expected_cohort_and_never_by_the_actual_one() -> None:
    program = federation(SiteLevel(clip=1.0, noise=1e-6), Poisson(rate=0.3), rounds=6, test=None)
    given = ran(program)
    start = program.init().algorithm.vector
    for (state, report), before in zip(given, [start, *(state.algorithm.vector for state, _ in given)], strict=False):
        # every site answers, and its delta is within the bound: so the sum is that of the cohort
        reference = federation(None, rounds=1, test=None)
        fleet = Local(reference, site, SITES)
        replies = []
        for name in report.cohort:
            fleet.submit(Request(to=name, op="train", round=report.round, shared={"parameters": before}))
            reply = fleet.next_reply()
            assert reply is not None
            replies.append(reply.body["difference"])
        total = torch.stack(replies).sum(0) if replies else torch.zeros_like(before)
        torch.testing.assert_close(state.algorithm.vector - before, total / 6.0, atol=2e-5, rtol=0)
    assert len({len(report.cohort) for _, report in given}) > 1


def test_a_round_that_nobody_was_drawn_for_is_noise_and_is_accounted_for() -> None:
    program = federation(SiteLevel(clip=1.0, noise=1.0), Poisson(rate=0.02), rounds=8, seed=3)
    given = ran(program)
    none = [index for index, (_, report) in enumerate(given) if not report.cohort]
    assert none
    moved = deltas(federation(SiteLevel(clip=1.0, noise=1.0), Poisson(rate=0.02), rounds=8, seed=3), 8)
    assert all(float(moved[index].norm()) > 0 for index in none)
    assert all(len(given[index][1].releases) == 1 for index in none)


def test_the_adaptive_bound_goes_to_the_quantile_of_the_norms() -> None:
    clip = AdaptiveClip(initial=5.0, quantile=0.5, lr=0.4, count_noise=0.5)
    program = federation(SiteLevel(clip=clip, noise=0.05), rounds=25, evaluate_every=100, test=None)
    state, _ = ran(program)[-1]
    reference = federation(None, rounds=1, test=None)
    fleet = Local(reference, site, SITES)
    norms = []
    for name in SITES:
        fleet.submit(Request(to=name, op="train", round=26, shared={"parameters": state.algorithm.vector}))
        reply = fleet.next_reply()
        assert reply is not None
        norms.append(float(reply.body["difference"].norm()))
    within = sum(norm <= state.privacy.norm for norm in norms) / len(norms)
    assert 0.25 <= within <= 0.75
    assert state.privacy.norm < 2.0


def test_the_count_of_the_adaptive_bound_costs_no_more_than_what_is_accounted_for() -> None:
    """Two Gaussians with precisions 1/z^2 each add up: values and count together are one with the stated noise."""
    clip = AdaptiveClip(count_noise=3.0)
    values = clip.noise_on_values(1.2, cohort=100)
    assert values**-2 + (2 * 3.0) ** -2 == pytest.approx(1.2**-2)


# The budget


def test_noise_is_solved_so_that_the_whole_run_spends_the_budget() -> None:
    for privacy, sampling in (
        (SiteLevel(clip=0.5, epsilon=3.0), All()),
        (SiteLevel(clip=0.5, epsilon=3.0, bands=2), Cyclic(groups=2)),
        (LocalDP(clip=0.5, epsilon=3.0), All()),
    ):
        program = federation(privacy, sampling)
        ran(program)
        spent = epsilon(program.ledger.releases(), delta=1e-5, unit="site")
        assert 2.97 <= spent <= 3.0


def test_example_level_noise_is_that_of_each_site() -> None:
    def sized(name: str) -> Examples:
        own = site(name)
        return own[: 4 if name == "site-00" else 12]

    program = federation(ExampleLevel(clip=1.0, epsilon=2.0, accountant="rdp"), rounds=2)
    ran(program, sized)
    releases = program.ledger.releases()
    noise = {str(release.of): str(release.event) for release in releases}
    assert noise["site-00"] != noise["site-01"]
    for name in SITES[:2]:
        own = epsilon(releases, delta=1e-5, accountant="rdp", unit="example", of=name)
        assert 1.97 <= own <= 2.0


def test_a_run_with_given_noise_stops_when_its_budget_is_spent() -> None:
    program = federation(SiteLevel(clip=0.5, noise=2.0, epsilon=4.0), rounds=100, evaluate_every=100)
    given = ran(program)
    assert 1 < len(given) < 100
    assert "budget" in str(given[-1][1].stop)
    more = [*program.ledger.releases(), program.ledger.releases()[-1]]
    assert epsilon(program.ledger.releases(), delta=1e-5, unit="site") <= 4.0
    assert epsilon(more, delta=1e-5, unit="site") > 4.0


def test_a_resumed_run_goes_on_where_its_ledger_is(tmp_path: Path) -> None:
    """A round that was released and not committed is released again: it is taken down twice, with other noise."""

    def program() -> Federation[Any]:
        ledger = FileLedger.open(tmp_path / "ledger.jsonl", None)
        return federation(SiteLevel(clip=0.5, noise=2.0, epsilon=8.0), rounds=100, evaluate_every=100, ledger=ledger)

    whole = len(ran(federation(SiteLevel(clip=0.5, noise=2.0, epsilon=8.0), rounds=100, evaluate_every=100)))
    first = program()
    states = []
    for state, report in run(first, Local(first, site, SITES)):
        states.append(state)
        if report.round == 3:
            break  # and round 3 is lost
    save(tmp_path / "state", states[1])
    second = program()
    restored, _ = load(tmp_path / "state", second.init())
    again = list(run(second, Local(second, site, SITES), restored))
    assert again[0][1].round == 3
    assert not torch.equal(again[0][0].algorithm.vector, states[2].algorithm.vector)
    assert 2 + len(again) == whole - 1
    assert epsilon(second.ledger.releases(), delta=1e-5, unit="site") <= 8.0


def test_a_state_without_its_ledger_is_refused() -> None:
    first = federation(SiteLevel(clip=0.5, noise=2.0))
    state, _ = next(iter(run(first, Local(first, site, SITES))))
    other = federation(SiteLevel(clip=0.5, noise=2.0))
    with pytest.raises(CannotResume, match="does not begin with the 1 releases"):
        next(iter(run(other, Local(other, site, SITES), state)))


def test_jobs_that_share_a_ledger_share_its_budget(tmp_path: Path) -> None:
    def program(seed: int) -> Federation[Any]:
        ledger = FileLedger.open(tmp_path / "ledger.jsonl", None)
        return federation(SiteLevel(clip=0.5, epsilon=3.0 + seed), seed=seed, ledger=ledger)

    first, second = program(0), program(1)
    ran(first)
    ran(second)
    assert 3.9 <= epsilon(second.ledger.releases(), delta=1e-5, unit="site") <= 4.0
    assert len(second.ledger.releases()) == 8


def test_other_sites_than_those_that_a_guarantee_was_made_for_are_refused() -> None:
    program = federation(SiteLevel(clip=0.5, noise=2.0))
    state, _ = next(iter(run(program, Local(program, site, SITES))))
    with pytest.raises(UnsoundCombination, match="made for 20 registered sites"):
        next(iter(run(program, Local(program, site, [*SITES[1:], "site-77"]), state)))


def test_whose_update_was_refused_is_not_told() -> None:
    """A coordinator shuts out whose updates are refused: that would say what reports withhold."""
    for told in (True, False):
        tally = Tally(cohort=("site-00", "site-01"), told=told)
        tally.refuse(["site-00"], "its value holds nan")
        report = tally.report(1, {}, {}, stop=None)
        assert report.refused == (("site-00",) if told else ())
        assert ("nan" in report.absent["site-00"]) is told


# At the site


@pytest.mark.parametrize("privacy", [SiteLevel(clip=0.5, noise=2.0), LocalDP(clip=0.5, noise=2.0)], ids=str)
def test_a_site_refuses_work_beyond_its_own_limit(privacy: Privacy) -> None:
    limit = Limit(budget=Budget(epsilon=3.0, delta=1e-5), unit="site")
    own = MemoryLedger(limit)

    def limited(name: str) -> SiteData:
        return SiteData(train=site(name), ledger=own if name == "site-03" else None)

    program = federation(privacy, rounds=8, evaluate_every=100)
    reports = [report for _, report in ran(program, limited)]
    refused = [report.round for report in reports if "site-03" in report.absent]
    assert refused == list(range(refused[0], 9))
    assert refused[0] > 1
    assert "is not told" in reports[-1].absent["site-03"]  # why a site is absent is data like any other
    assert len(own.releases()) == refused[0] - 1


def test_another_request_for_the_same_round_is_charged_anew() -> None:
    own = MemoryLedger(Limit(budget=Budget(epsilon=9.0, delta=1e-5), unit="example"))
    program = federation(ExampleLevel(clip=1.0, noise=1.0))
    state = program.begun(program.init(), SITES)
    shared, _ = program.broadcast(state, SITES)
    here = Site(id="site-00", data=lambda: SiteData(train=site("site-00"), ledger=own))
    event = steps(1 / 3, 1.0, 3)
    for attempt in range(10):
        before = len(own.releases())
        changed = {**shared, "parameters": shared["parameters"] + 0.01 * attempt}
        request = Request(to="site-00", op="train", round=1, attempt=attempt, shared=changed)
        try:
            program.handle(request, here)
        except Exception as error:
            assert "limit is 9" in str(error)  # noqa: PT017
            assert len(own.releases()) == before > 0
            return
        assert own.releases()[-1] == Release(
            event=event, unit="example", relation="replace_special", of="site-00", job=own.releases()[-1].job, round=1
        )
    pytest.fail("the site was asked ten times and never refused")


def test_that_noised_training_diverged_is_a_release_and_counts_as_one() -> None:
    """Or a coordinator could ask for it as often as it likes."""
    own = MemoryLedger(Limit(budget=Budget(epsilon=20.0, delta=1e-5), unit="example"))
    algorithm = FedAvg(task=TASK, training=replace(TRAINING, optimizer=SGD(lr=3e38)))
    program: Federation[Any] = Federation(algorithm=algorithm, rounds=1, privacy=ExampleLevel(clip=9.0, noise=1.0))
    with pytest.raises(TooFewSites):
        ran(program, lambda name: SiteData(train=site(name), ledger=own if name == "site-03" else None))
    assert [release.of for release in program.ledger.releases()] == SITES
    assert [release.of for release in own.releases()] == ["site-03"]


def diverging(name: str) -> Examples:
    """As `site`, but at site-03 the loss overflows in the second step."""
    if name != "site-03":
        return site(name)
    return Examples.of((torch.full((12, 5), 1e30), torch.arange(12) % 3))


@pytest.mark.parametrize("cohort", [1, 20])
@pytest.mark.parametrize("kind", [SiteLevel, LocalDP], ids=lambda kind: kind.__name__)
def test_that_training_diverged_at_a_site_is_as_private_as_all_else(kind: type[Privacy], cohort: int) -> None:
    """It counts, as zeros with noise: an absence would be one bit about its rows, of a model that others choose."""
    algorithm = FedAvg(task=replace(TASK, model=partial(nn.Linear, 5, 3)), training=TRAINING)
    shared: dict[str, Any] = {"algorithm": algorithm, "rounds": 1, "plan": Plan(cohort=cohort)}
    hidden: Federation[Any] = Federation(privacy=kind(clip=5.0, noise=1e-6), **shared)  # type: ignore[call-arg]
    [(state, report)] = run(hidden, Local(hidden, diverging, SITES))
    assert report.absent == {}
    plain: Federation[Any] = Federation(**shared)
    [(mean, report)] = run(plain, Local(plain, diverging, SITES))
    assert list(report.absent) == ["site-03"]
    start = plain.init().algorithm.vector
    expected = (mean.algorithm.vector - start) * 19 / 20
    assert float(expected.norm()) > 0.1
    assert torch.allclose(state.algorithm.vector - start, expected, atol=1e-4)


class Greedy(nn.Module):
    """Asks for as much memory as it has rows, and much more than there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x) + torch.empty(2**50 * len(x)).sum()
        return out


@pytest.mark.parametrize("model", [Greedy, module], ids=["greedy", "no rows"])
def test_why_a_site_cannot_work_is_not_told_to_the_coordinator_either(model: type[nn.Module]) -> None:
    algorithm = FedAvg(task=replace(TASK, model=model), training=TRAINING)
    program: Federation[Any] = Federation(algorithm=algorithm, rounds=1, privacy=LocalDP(clip=0.5, noise=1.0))
    shared, _ = program.broadcast(program.begun(program.init(), SITES), SITES)
    rows = site("site-00") if model is Greedy else site("site-00")[:0]
    here = Site(id="site-00", data=lambda: SiteData(train=rows))
    reply = answer(program, Request(to="site-00", op="train", round=1, shared=shared), here)
    assert reply.error == "it could not do its work; why is in its own log, as it may tell of its rows"


def asked(program: Federation[Any], op: str = "train", round: int = 1, **changes: torch.Tensor) -> torch.Tensor:
    """What site-00 answers to a request in which some tensors are changed."""
    state = program.begun(program.init(), SITES)
    shared, _ = program.broadcast(state, SITES)
    request = Request(to="site-00", op=op, round=round, shared={**shared, **changes})
    data = SiteData(train=site("site-00"), validation=site("site-01"))
    return program.handle(request, Site(id="site-00", data=lambda: data)).body["difference"]


def test_seeded_noise_is_another_one_for_every_message() -> None:
    """Or two answers to two broadcasts would have the same noise, which their difference would not have."""
    program = federation(LocalDP(clip=0.5, noise=100.0))
    start = program.init().algorithm.vector
    first, again = asked(program), asked(federation(LocalDP(clip=0.5, noise=100.0)))
    assert torch.equal(first, again)
    other = asked(program, parameters=start + 1e-3)
    assert float((first - other).norm()) > 0.5 * float(first.norm())


def test_noise_of_two_experiments_differs_also_with_one_seed() -> None:
    moved = [deltas(federation(SiteLevel(clip=clip, noise=300.0), rounds=1, test=None), 1) for clip in (0.01, 0.010001)]
    assert float((moved[0] - moved[1]).norm()) > 0.5 * float(moved[0].norm())


@pytest.mark.parametrize("privacy", [LocalDP(clip=0.5, epsilon=2.0), ExampleLevel(clip=0.5, noise=1.0)], ids=str)
def test_a_site_tells_nothing_that_no_guarantee_covers(privacy: Privacy) -> None:
    program = federation(privacy)
    for op in ("evaluate", "statistics"):
        with pytest.raises(BadInput, match=f"knows no '{op}' request"):
            asked(program, op)


@pytest.mark.parametrize("kind", [LocalDP, ExampleLevel], ids=lambda kind: kind.__name__)
def test_a_site_does_no_round_that_its_budget_does_not_have(kind: type[Privacy]) -> None:
    """And finds that out at once also where it is asked for the round 10^9."""
    program = federation(kind(clip=0.5, noise=4.0, epsilon=4.0))  # type: ignore[call-arg]
    asked(program, round=4)
    for round in (1_000, 10**9):
        with pytest.raises(BudgetSpent, match=f"round {round} would pass epsilon 4"):
            asked(program, round=round)
    for round in (0, -1):
        with pytest.raises(BadInput, match="it is asked for round"):
            asked(program, round=round)


def test_a_site_does_not_believe_what_it_is_told_about_noise() -> None:
    program = federation(LocalDP(clip=0.5, epsilon=1.0))
    for rounds in (0, -1):
        with pytest.raises(BadInput, match=r"it is told of .* rounds, and its experiment has"):
            asked(program, **{"privacy/rounds": torch.tensor(rounds)})
    quiet = asked(program, **{"privacy/rounds": torch.tensor(4), "privacy/noise": torch.tensor(0.0)})
    assert float(quiet.norm()) > 10


@pytest.mark.parametrize(
    "privacy", [LocalDP(clip=0.5, noise=1.5, epsilon=8.0), ExampleLevel(clip=1.0, noise=1.0, epsilon=7.0)], ids=str
)
def test_given_noise_ends_with_its_budget_also_where_sites_add_it(privacy: Privacy) -> None:
    program = federation(privacy, rounds=30, evaluate_every=100)
    given = ran(program)
    assert 0 < len(given) < 30
    assert epsilon(program.ledger.releases(), delta=1e-5, unit=privacy.unit) <= float(privacy.epsilon or 0)


def test_what_has_arrived_is_taken_down_also_if_the_round_fails() -> None:
    def mostly_gone(name: str) -> Examples:
        return site(name)[: 12 if name == "site-05" else 0]

    program = federation(LocalDP(clip=0.5, noise=1.0), min_sites=2)
    with pytest.raises(TooFewSites, match="is not told"):
        ran(program, mostly_gone)
    assert [release.of for release in program.ledger.releases()] == ["site-05"]


def test_a_run_does_not_go_on_with_another_ledger() -> None:
    first = federation(SiteLevel(clip=0.5, noise=2.0))
    state, _ = next(iter(run(first, Local(first, site, SITES))))
    ledger = MemoryLedger()
    ledger.record(Release(event=gaussian(1e5), unit="site", relation="replace_special"))
    other = federation(SiteLevel(clip=0.5, noise=2.0), ledger=ledger)
    with pytest.raises(CannotResume, match="does not begin with"):
        next(iter(run(other, Local(other, site, SITES), state)))


def test_many_sites_at_once_is_no_way_round_the_guarantee() -> None:
    program = federation(ExampleLevel(clip=1.0, noise=1.0))
    requests = Requests(to=SITES[:2], op="train", round=1, shared={"parameters": program.init().algorithm.vector})
    with pytest.raises(BadInput, match="one by one"):
        program.handle_many(requests, [Site(id=name, data=partial(SiteData, train=site(name))) for name in SITES[:2]])


# The closed-form start


@pytest.mark.parametrize(
    ("privacy", "count"),
    [(SiteLevel(clip=0.5, epsilon=4.0), 1), (ExampleLevel(clip=1.0, epsilon=4.0, accountant="rdp"), 20)],
    ids=str,
)
def test_the_closed_form_start_is_a_release_that_counts(privacy: Privacy, count: int) -> None:
    program = federation(privacy, start=Ridge(), rounds=2)
    given = ran(program)
    assert [report.round for _, report in given] == [0, 1, 2]
    assert len(given[0][1].releases) == count
    assert set(given[0][1].releases[0].event) == {"gaussian"}
    spent = epsilon(program.ledger.releases(), delta=1e-5, accountant=privacy.accountant, unit=privacy.unit)
    assert 3.9 <= spent <= 4.0


@pytest.mark.parametrize("privacy", [SiteLevel(clip=0.5, noise=1.0), ExampleLevel(clip=1.0, noise=1.0)], ids=str)
def test_a_row_that_is_not_finite_does_not_show_in_the_start(privacy: Privacy) -> None:
    def odd(name: str) -> Examples:
        rows = site(name)
        return rows if name != "site-03" else Examples.of((rows.inputs["x"] * torch.tensor(math.nan), rows.targets))

    program = federation(privacy, rounds=0, start=Ridge())
    ((_, report),) = ran(program, odd)
    assert report.absent == {}


@pytest.mark.parametrize("privacy", [SiteLevel(clip=0.5, noise=1.0), ExampleLevel(clip=1.0, noise=1.0)], ids=str)
def test_whoever_chooses_the_weights_of_the_start_does_not_choose_who_answers(privacy: Privacy) -> None:
    """Features that are nothing but rounding are others in a batch, of some rows: a site must not fail by its rows."""

    def deep() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

    algorithm = FedAvg(task=replace(TASK, model=deep), training=TRAINING)
    program: Federation[Any] = Federation(algorithm=algorithm, rounds=1, privacy=privacy, start=Ridge())
    chosen = program.algorithm.parameters(program.init().algorithm)
    chosen["0.weight"].copy_(torch.tensor([1.54, -0.29, -2.18, 0.57, -1.08]).expand(6, 5))
    chosen["2.weight"].copy_(1e9 * torch.tensor([1.1, -1.7, 1.3, -1.1, 1.7, -1.3]).expand(4, 6))
    for bias in ("0.bias", "2.bias"):
        chosen[bias].zero_()
    shared = {"parameters": chosen.vector, **program._told(program.begun(program.init(), SITES))}
    for name in SITES:
        given = Site(id=name, data=partial(SiteData, train=site(name)))
        body = program.handle(Request(to=name, op="statistics", round=0, shared=shared), given).body
        assert body["value"].isfinite().all()


def test_a_start_alone_may_spend_it_all() -> None:
    program = federation(SiteLevel(clip=0.5, epsilon=4.0), start=Ridge(), rounds=0)
    ran(program)
    (release,) = program.ledger.releases()
    assert 3.99 <= epsilon([release], delta=1e-5, unit="site") <= 4.0


# What is refused


def cannot(match: str, privacy: Privacy, sampling: Sampling | None = None, **settings: Any) -> None:
    with pytest.raises((UnsoundCombination, BadInput), match=match):
        federation(privacy, sampling, **settings)


def test_what_does_not_hold_is_refused_with_the_cure() -> None:
    here = SiteLevel(clip=0.5, noise=1.0)
    cannot("use Cyclic", SiteLevel(clip=0.5, noise=1.0, bands=2))
    cannot("give a number", SiteLevel(clip=AdaptiveClip(), noise=1.0), Cyclic(groups=2))
    cannot("leave min_sites out", here, Poisson(rate=0.5), min_sites=2)
    cannot("leave validate_at_sites out", here, validate_at_sites=True)
    cannot("use Ridge", here, start=LDA())
    cannot("leave `start` out", LocalDP(clip=0.5, noise=1.0), start=Ridge())
    with pytest.raises(BadInput, match="epsilon"):
        SiteLevel(clip=0.5)
    with pytest.raises(BadInput, match="clip"):
        SiteLevel(clip=math.nan, noise=1.0)


def test_an_unknown_sampling_has_no_account() -> None:
    class Odd:
        def __call__(self, parties: Sequence[str], round: int, seed: int) -> list[str]:
            return list(parties)

    cannot("no account of privacy knows", SiteLevel(clip=0.5, noise=1.0), Odd())


def test_batch_norm_is_refused() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    task = replace(TASK, model=normed)
    program = replace(federation(SiteLevel(clip=0.5, noise=1.0)), algorithm=FedAvg(task=task, training=TRAINING))
    with pytest.raises(UnsoundCombination, match="freezes BatchNorm"):
        program.init()


def test_a_batch_gradient_bound_is_not_that_of_an_example() -> None:
    training = replace(TRAINING, clip=1.0)
    with pytest.raises(BadInput, match=r"leave Training\.clip out"):
        Federation(algorithm=FedAvg(task=TASK, training=training), rounds=1, privacy=ExampleLevel(clip=1.0, noise=1.0))


def test_fixed_cohorts_need_the_accountant_that_knows_them() -> None:
    program = federation(SiteLevel(clip=0.5, epsilon=4.0), Fixed(size=5))
    with pytest.raises(UnsoundCombination, match="rdp"):
        ran(program)


def test_a_server_optimizer_comes_after_the_noise() -> None:
    algorithm = FedOpt(client=FedAvg(task=TASK, training=TRAINING), server=FedAdam(lr=0.05))
    program = Federation(algorithm=algorithm, rounds=3, privacy=SiteLevel(clip=0.5, noise=0.5), test=site("site-99"))
    assert len(ran(program)) == 3


def test_gaussian_events_say_what_was_added() -> None:
    program = federation(SiteLevel(clip=0.5, noise=1.5))
    ran(program)
    assert {str(release.event) for release in program.ledger.releases()} == {str(gaussian(1.5))}
    assert {release.relation for release in program.ledger.releases()} == {"replace_special"}
