"""A federation whose sites add the noise in shares, under secure sums."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.parts import Clear
from fedelta.algorithms.sampling import Cyclic, Fixed, Poisson
from fedelta.core.errors import BadInput, BadTensors, CannotResume, TooFewSites, UnsoundCombination
from fedelta.core.examples import Examples
from fedelta.core.grid import Terms
from fedelta.core.messages import Request, Requests, Update
from fedelta.core.parameters import Parameters
from fedelta.core.program import Site, SiteData, run
from fedelta.core.release import Budget, Limit
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Workers
from fedelta.learning.closed_form import Ridge
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD
from fedelta.learning.task import Task
from fedelta.learning.training import Training
from fedelta.privacy.accounting import epsilon
from fedelta.privacy.discretisation import discretisation
from fedelta.privacy.distributed import COHORT, ROUNDS, SITES, START, TURN, DistributedDP
from fedelta.privacy.ledger import MemoryLedger
from fedelta.privacy.local_dp import LocalDP
from fedelta.privacy.site_level import SiteLevel
from fedelta.secure.aggregation import SecureAggregation

NAMES = [f"site-{i:02}" for i in range(12)]
STILL = Training(optimizer=SGD(lr=1e-30), batch=10)  # updates of nothing: what comes out is noise
QUIET = DistributedDP(clip=1.0, noise=1e-3, bits=32)  # next to none


def rows(name: str) -> Examples:
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(int(name[-2:])))
    return Examples.of((x, (x.sum(dim=1) > 0).long()))


def lost(name: str, gone: frozenset[str]) -> Examples:
    return rows(name)[:0] if name in gone else rows(name)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 2))


TASK = Task(model=partial(nn.Linear, 6, 2), objective=Classification(classes=2))
WIDE = Task(model=wide, objective=Classification(classes=2))
LEARNING = FedAvg(task=TASK, training=Training(optimizer=SGD(lr=0.3), batch=10))


def federation(privacy=QUIET, **settings):
    given = {"algorithm": LEARNING, "rounds": 2, "collect": SecureAggregation(), **settings}
    return Federation(privacy=privacy, **given)


def learned(program, load=rows, names=NAMES):
    *_, (state, report) = run(program, Local(program, load, names))
    return program.algorithm.parameters(state.algorithm).vector, report


def test_with_next_to_no_noise_it_is_the_mean_of_what_sites_have_cut():
    without = federation(SiteLevel(clip=1.0, noise=1e-6), collect=SecureAggregation())
    torch.testing.assert_close(learned(federation())[0], learned(without)[0], atol=2e-3, rtol=0)


def test_a_round_with_sites_that_are_lost_is_the_mean_of_the_others():
    gone = frozenset(NAMES[3:6])
    others = [name for name in NAMES if name not in gone]
    some, report = learned(federation(rounds=1), partial(lost, gone=gone))
    without = federation(SiteLevel(clip=1.0, noise=1e-6), rounds=1)
    torch.testing.assert_close(some, learned(without, names=others)[0], atol=2e-3, rtol=0)
    assert set(report.absent) == gone


def test_the_noise_of_a_round_is_that_of_the_sites_in_it():
    """Whose number is more than it was made for: 12 sites add it, and 8 would be enough (9, of whom 1 may collude)."""
    program = federation(DistributedDP(clip=0.5, noise=2.0), algorithm=FedAvg(task=WIDE, training=STILL), rounds=1)
    before = program.algorithm.parameters(program.init().algorithm).vector
    noise = learned(program)[0] - before
    honest = SecureAggregation().honest(12)
    assert honest == 8
    wanted = 2.0 * 0.5 * math.sqrt(12 / honest) / 12
    assert float(noise.std()) == pytest.approx(wanted, rel=0.06)  # 2,702 draws, and a little for the rounding
    assert abs(float(noise.mean())) < 5 * wanted / math.sqrt(len(noise))


def test_what_the_coordinator_gets_of_sites_without_anything_to_say_is_discrete_gaussian():
    """A goodness-of-fit test of the noise in a secure sum, against exact probabilities."""
    seen = []

    class Watched(SecureAggregation):
        def gather(self, *given):
            for reply in super().gather(*given):
                seen.append(reply.body["difference"] * reply.body["weight"])
                yield reply

    privacy = DistributedDP(clip=0.5, noise=2.0)
    program = federation(privacy, algorithm=FedAvg(task=WIDE, training=STILL), rounds=3, collect=Watched())
    list(run(program, Local(program, rows, NAMES)))
    whole = torch.cat(seen).round().long().numpy()
    form = discretisation(size=len(seen[0]), norm=0.5, multiplier=2.0, cohort=12, honest=8)
    variance = 12 * float(form.variance)
    reach = int(8 * math.sqrt(variance))
    chances = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * variance))
    edges = np.searchsorted(np.cumsum(chances) / chances.sum(), np.linspace(0, 1, 41)[1:-1])
    found = np.bincount(np.searchsorted(edges, whole + reach), minlength=40)
    wanted = np.array([part.sum() for part in np.split(chances, edges + 1)]) * len(whole) / chances.sum()
    assert stats.chisquare(found, wanted).pvalue > 1e-3
    other = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * 1.2 * variance))  # a little more would be noticed
    wrong = np.array([part.sum() for part in np.split(other, edges + 1)]) * len(whole) / other.sum()
    assert stats.chisquare(found, wrong).pvalue < 1e-6


def test_the_head_of_round_zero_is_that_of_a_trusted_coordinator_with_as_little_noise():
    quiet = replace(QUIET, start_clip=1.0)
    head = learned(federation(quiet, rounds=0, start=Ridge()))[0]
    other = learned(federation(SiteLevel(clip=1.0, noise=1e-3, start_clip=1.0), rounds=0, start=Ridge()))[0]
    torch.testing.assert_close(head, other, atol=0.05, rtol=0)
    loud = learned(federation(DistributedDP(clip=1.0, noise=10.0), rounds=0, start=Ridge()))[0]
    assert float((loud - other).norm()) > 0.1  # and the noise of round zero is real


def test_workers_give_the_same_bits():
    program = federation(DistributedDP(clip=0.5, noise=1.0), start=Ridge())
    with Workers(program, rows, NAMES, workers=2) as fleet:
        *_, (state, _) = run(program, fleet)
    assert torch.equal(program.algorithm.parameters(state.algorithm).vector, learned(program)[0])


def test_noise_of_the_operating_system_differs_from_run_to_run():
    program = federation(DistributedDP(clip=0.5, noise=1.0), entropy="system")
    assert not torch.equal(learned(program)[0], learned(program)[0])


def test_a_budget_is_spent_by_what_each_site_lets_out_and_no_more():
    ledger = MemoryLedger()
    program = federation(DistributedDP(clip=0.5, epsilon=3.0), start=Ridge(), ledger=ledger, rounds=3)
    states, reports = zip(*run(program, Local(program, rows, NAMES)), strict=True)
    found = ledger.releases()
    assert len(found) == 4 * len(NAMES) == sum(len(report.releases) for report in reports)
    assert {release.of for release in found} == set(NAMES)
    assert all(list(release.event) == ["concentrated"] for release in found)
    spent = epsilon(found, delta=1e-5, accountant="rdp", unit="site", of=NAMES[0])
    assert 2.95 < spent <= 3.0
    assert reports[-1].metrics["epsilon"] == pytest.approx(spent, rel=0.01)
    more = replace(program, rounds=4)
    assert more.finished(states[-1]) == "its noise was made for 3 rounds"


def test_a_site_keeps_its_own_limit():
    def site(name):
        limit = Limit(budget=Budget(epsilon=0.5, delta=1e-5, accountant="rdp"), unit="site")
        return SiteData(train=rows(name), ledger=MemoryLedger(limit=limit) if name == NAMES[0] else None)

    program = federation(DistributedDP(clip=0.5, epsilon=3.0))
    _, report = next(run(program, Local(program, site, NAMES)))
    assert list(report.absent) == [NAMES[0]]


@pytest.mark.parametrize(("name", "told"), [(COHORT, 100), (ROUNDS, 0), (START, 1)])
def test_a_site_takes_no_part_in_a_sum_that_its_noise_is_not_made_for(name, told):
    """A coordinator that says that many sites are asked, and asks few, would get away with less noise."""

    class Lying(Federation):
        def broadcast(self, state, to):
            shared, own = super().broadcast(state, to)
            return {**shared, name: torch.tensor(told)}, own

    honest = federation(DistributedDP(clip=0.5, epsilon=3.0), rounds=2)
    liar = Lying(**{field: getattr(honest, field) for field in honest.__dataclass_fields__})
    with pytest.raises(TooFewSites, match="0 of 12 sites"):
        next(run(liar, Local(honest, rows, NAMES)))


@pytest.mark.parametrize(("op", "round"), [("train", 3), ("train", 0), ("statistics", 1)])
def test_a_site_does_no_round_that_its_experiment_does_not_have(op, round):
    """Or else a coordinator that says that there are ever more rounds would get ever more sums."""
    told = federation(DistributedDP(clip=0.5, epsilon=3.0), rounds=10, start=Ridge())
    state = told.begun(told.init(), NAMES)
    shared, _ = told.broadcast(state, NAMES)
    honest = federation(DistributedDP(clip=0.5, epsilon=3.0), rounds=2, start=Ridge())
    fleet = Local(honest, rows, NAMES)
    requests = Requests(to=NAMES, op=op, round=round, shared=shared)
    with pytest.raises(TooFewSites, match="0 of 12 sites"):
        list(honest.collect.gather(fleet, requests, 1, Terms()))


@pytest.mark.parametrize("wrong", [None, torch.tensor(2.0), torch.tensor([2, 2]), torch.tensor(math.nan)])
@pytest.mark.parametrize("name", [COHORT, ROUNDS, SITES, START, TURN])
def test_a_malformed_broadcast_is_refused_with_a_sentence(name, wrong):
    program = federation(DistributedDP(clip=0.5, epsilon=3.0))
    shared, _ = program.broadcast(program.begun(program.init(), NAMES), NAMES)
    told = {key: value for key, value in shared.items() if key != name} | ({} if wrong is None else {name: wrong})
    site = Site(id=NAMES[0], data=lambda: SiteData(train=rows(NAMES[0])))
    with pytest.raises(BadTensors, match=name):
        program._at_site._update(Request(to=NAMES[0], op="train", round=1, shared=told), site)


def test_a_site_knows_how_many_sites_there_are_by_their_identities():
    collect = SecureAggregation(identities=dict.fromkeys(NAMES, "00" * 32))
    assert collect.registered == 12
    program = federation(DistributedDP(clip=0.5, epsilon=3.0), collect=collect)
    shared, _ = program.broadcast(program.begun(program.init(), NAMES), NAMES)
    few = {**shared, COHORT: torch.tensor(3), SITES: torch.tensor(3)}
    site = Site(id=NAMES[0], data=lambda: SiteData(train=rows(NAMES[0])))
    with pytest.raises(BadInput, match="identities of 12"):
        program._at_site._update(Request(to=NAMES[0], op="train", round=1, shared=few), site)


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38])
def test_an_update_that_is_not_finite_or_huge_leaves_as_any_other(value):
    program = federation(rounds=1)
    shared, _ = program.broadcast(program.begun(program.init(), NAMES), NAMES)
    values = Parameters.of(nn.Linear(6, 2))
    update = Update(values=values.like(torch.full_like(values.vector, value)), weight=10.0)
    sent = program._at_site._outgoing(update, Site(id=NAMES[0], data=lambda: SiteData(train=rows(NAMES[0]))), shared, 1)
    assert float(sent["weight"]) == 1
    assert (sent["difference"] == sent["difference"].round()).all()


def test_that_training_diverged_at_a_site_is_not_told():
    def wild(name: str) -> Examples:
        return Examples.of((torch.full((10, 6), 1e30), torch.arange(10) % 2)) if name == NAMES[3] else rows(name)

    few = replace(LEARNING, training=replace(LEARNING.training, batch=2))
    assert learned(federation(algorithm=few, rounds=1), wild)[1].absent == {}
    assert list(learned(federation(None, algorithm=few, rounds=1), wild)[1].absent) == [NAMES[3]]


def test_a_run_goes_on_with_as_many_rounds_as_its_noise_was_made_for():
    program = federation(DistributedDP(clip=0.5, epsilon=3.0), rounds=2)
    state, _ = next(run(program, Local(program, rows, NAMES)))
    more = replace(program, rounds=5)
    with pytest.raises(CannotResume, match="go on with 2"):
        next(run(more, Local(more, rows, NAMES), state))


def test_a_start_that_does_not_fit_is_refused_before_a_site_is_asked():
    given = {"start": Ridge(), "rounds": 0, "algorithm": FedAvg(task=WIDE, training=STILL)}
    program = federation(DistributedDP(clip=0.5, noise=400.0), **given)
    with pytest.raises(BadInput, match="use bits=32"):
        next(run(program, Local(program, rows, [f"site-{i:02}" for i in range(99)])))


def test_what_leaves_a_site_is_whole_numbers_of_16_bits_under_masks():
    program = federation(DistributedDP(clip=0.5, noise=1.0))
    sent = []

    class Watched(Local):
        def next_reply(self, timeout_s=None):
            reply = super().next_reply(timeout_s)
            if reply is not None and "values" in reply.body:
                sent.append(reply.body["values"])
            return reply

    next(run(program, Watched(program, rows, NAMES)))
    assert len(sent) == len(NAMES)
    assert {(values.dtype, len(values)) for values in sent} == {(torch.int16, 14)}


def test_fixed_cohorts_have_noise_for_their_size():
    program = federation(DistributedDP(clip=0.5, epsilon=3.0), sampling=Fixed(size=6))
    state = program.begun(program.init(), NAMES)
    assert state.privacy.cohort == 6
    assert int(program.privacy.shared(state.privacy)[SITES]) == 12
    assert learned(program)[1].metrics["epsilon"] <= 3.0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"collect": Clear()}, "use SecureAggregation"),
        ({"sampling": Poisson(rate=0.5)}, "use All\\(\\) or Fixed\\(\\)"),
        ({"sampling": Cyclic(groups=2)}, "use All\\(\\) or Fixed\\(\\)"),
        ({"validate_at_sites": True}, "leave validate_at_sites out"),
    ],
)
def test_what_does_not_hold_is_refused(settings, sentence):
    with pytest.raises(UnsoundCombination, match=sentence):
        federation(**settings)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"bits": 24}, "bits must be 16 or 32"),
        ({"overflow": 0.0}, "overflow must be from"),
        ({"clip": 0.0}, "clip must be > 0"),
        ({"noise": None}, "needs an epsilon"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, sentence):
    with pytest.raises(BadInput, match=sentence):
        DistributedDP(**{"clip": 1.0, "noise": 1.0, **wrong})


def test_integers_that_are_too_small_for_so_many_sites_are_refused_before_the_first_round():
    program = federation(DistributedDP(clip=1.0, noise=1000.0), algorithm=FedAvg(task=WIDE, training=STILL))
    with pytest.raises(BadInput, match="use bits=32"):
        program.begun(program.init(), [f"site-{i:03}" for i in range(900)])


def test_it_costs_little_more_than_a_trusted_coordinator_and_much_less_than_local_noise():
    """The standard deviations of the mean, for one epsilon and two rounds."""
    names = [f"site-{i:03}" for i in range(100)]

    def deviation(privacy, collect):
        program = Federation(
            algorithm=FedAvg(task=WIDE, training=STILL), rounds=2, privacy=privacy, collect=collect, entropy="seed"
        )
        before = program.algorithm.parameters(program.init().algorithm).vector
        state, _ = next(run(program, Local(program, lambda name: rows(name[:-3] + "0" + name[-1]), names)))
        return float((program.algorithm.parameters(state.algorithm).vector - before).std())

    central = deviation(SiteLevel(clip=0.5, epsilon=4.0), Clear())
    shares = deviation(DistributedDP(clip=0.5, epsilon=4.0), SecureAggregation())
    local = deviation(LocalDP(clip=0.5, epsilon=4.0), Clear())
    assert 1.2 < shares / central < 1.6
    assert 10 < local / shares < 20
