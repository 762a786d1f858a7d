"""The Gaussian mechanism on sums over sites: bounds, noise, events, and a test that finds it broken."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedelta.aggregation.mean import Mean
from fedelta.algorithms.mechanism import population
from fedelta.algorithms.sampling import All, Cyclic, Fixed, Poisson, Sampling
from fedelta.core.errors import BadInput
from fedelta.core.messages import Update
from fedelta.core.noise import SeededNoise
from fedelta.core.parameters import Layout, Parameters
from fedelta.privacy.clipping import WITHIN, AdaptiveClip, clipped
from fedelta.privacy.local_dp import LocalDP
from fedelta.privacy.population import Population, Work
from fedelta.privacy.site_level import SiteLevel

WORK = Work(rows=5, rate=1.0, steps=1)
SIZE = 2000
LAYOUT = Layout.of({"w": torch.empty(SIZE)})
FALSE_ALARM = 1e-6


def update(values: torch.Tensor, weight: float = 7.0) -> Update:
    layout = Layout.of({"w": torch.empty(len(values))})
    return Update(values=Parameters(layout, values), weight=weight, sums={"loss": 3.0, "examples": 5.0})


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    norm=st.floats(1e-6, 1e6),
)
def test_nothing_is_longer_than_the_bound_and_what_is_within_it_is_untouched(values: list[float], norm: float) -> None:
    given = torch.tensor(values)
    found, within = clipped(given, norm)
    assert float(found.double().norm()) <= norm
    assert within == (float(given.double().norm()) <= norm)
    if within:
        assert torch.equal(found, given)
    else:
        torch.testing.assert_close(found / found.norm(), given / given.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mechanism", [SiteLevel(clip=0.5, noise=1.0), LocalDP(clip=0.5, noise=1.0)], ids=str)
def test_a_site_counts_as_one_and_says_nothing_else(mechanism: SiteLevel | LocalDP) -> None:
    told = mechanism.shared(mechanism.begin(Population(sites=3, rounds=1, scheme="all"), 4, (), False))
    given = update(torch.ones(4))
    left = mechanism.on_site(given, WORK, told, SeededNoise(0))
    assert (left.weight, dict(left.sums), left.count) == (1.0, {}, 1)
    assert torch.equal(given.values.vector, torch.ones(4))  # what it was given is as it was


def test_the_adaptive_bound_asks_for_one_bit() -> None:
    mechanism = SiteLevel(clip=AdaptiveClip(initial=1.0), noise=1.0)
    told = mechanism.shared(mechanism.begin(Population(sites=200, rounds=1, scheme="all"), 4, (), False))
    for length, bit in ((0.5, 0.5), (2.0, -0.5)):
        left = mechanism.on_site(update(torch.tensor([length])), WORK, told, SeededNoise(0))
        assert dict(left.sums) == {WITHIN: bit}


@given(share=st.floats(0.0, 1.0), quantile=st.floats(0.0, 1.0), lr=st.floats(0.01, 1.0))
def test_the_adaptive_bound_is_that_of_the_paper(share: float, quantile: float, lr: float) -> None:
    """Andrew et al., Algorithm 1: C exp(-eta (b - gamma)), b being the share of updates within C."""
    clip = AdaptiveClip(quantile=quantile, lr=lr)
    cohort = 40.0
    assert clip.next(2.0, cohort * (share - 0.5), cohort) == pytest.approx(2.0 * math.exp(-lr * (share - quantile)))


def test_a_count_that_takes_all_of_the_noise_is_refused() -> None:
    with pytest.raises(BadInput, match="leaves nothing"):
        SiteLevel(clip=AdaptiveClip(), noise=1.0).begin(Population(sites=5, rounds=1, scheme="all"), 4, (), False)


@pytest.mark.parametrize(
    ("sampling", "relation", "kind"),
    [
        (All(), "replace_special", "gaussian"),
        (Poisson(rate=0.25), "replace_special", "poisson_sampled"),
        (Fixed(size=10), "replace_one", "sampled_without_replacement"),
        (Cyclic(groups=4), "replace_special", "gaussian"),
    ],
    ids=str,
)
def test_a_round_is_accounted_for_as_what_it_was(sampling: Sampling, relation: str, kind: str) -> None:
    who = population(sampling, 40, 8)
    mechanism = SiteLevel(clip=1.0, noise=1.5, accountant="rdp")
    state = mechanism.begin(who, SIZE, (), False)
    assert mechanism.relation(who.scheme) == relation
    assert set(mechanism.event(state, who, 1, again=False)) == {kind}
    later = mechanism.event(state, who, 2, again=False)
    assert set(later) == ({"no_op"} if who.scheme == "cyclic" else {kind})
    assert set(mechanism.event(state, who, 2, again=True)) == {kind}  # done twice, it is charged in full


def test_correlated_noise_takes_the_rounds_of_a_run_into_account() -> None:
    """8 rounds, each site in two of them: with fresh noise a site is in a sum of sensitivity sqrt(2)."""
    who = population(Cyclic(groups=4), 40, 8)
    mechanism = SiteLevel(clip=1.0, noise=1.5)
    state = mechanism.begin(who, SIZE, (), False)
    total = Update(values=Parameters.zeros(LAYOUT), weight=10.0)
    noised, _ = mechanism.on_total(total, state, who, SeededNoise(1))
    assert float(noised.values.vector.std()) == pytest.approx(1.5 * math.sqrt(2) / 10, rel=0.08)


# A test that finds a broken mechanism


@dataclass(frozen=True)
class Halved:
    """A source of half the noise."""

    inner: SeededNoise

    def add_normal(self, values: torch.Tensor, std: float) -> None:
        self.inner.add_normal(values, std / 2)

    def chosen(self, n: int, rate: float) -> torch.Tensor:
        return self.inner.chosen(n, rate)


@dataclass(frozen=True)
class Eager:
    """Asks every site with one and a half times the probability that it was given."""

    rate: float

    def __call__(self, parties: Sequence[str], round: int, seed: int) -> list[str]:
        return Poisson(rate=1.5 * self.rate)(parties, round, seed)


def released(
    mechanism: SiteLevel, who: Population, cohort: Sequence[str], noise: SeededNoise | Halved, clipping: bool
) -> torch.Tensor:
    """What a round lets out of sites whose deltas are (9, 0, 0, ...)."""
    state = mechanism.begin(who, SIZE, (), False)
    told = mechanism.shared(state)
    given = update(torch.cat([torch.tensor([9.0]), torch.zeros(SIZE - 1)]))
    left = [mechanism.on_site(given, WORK, told, SeededNoise(0)) if clipping else replace(given, weight=1.0)] * len(
        cohort
    )
    total = Mean()([replace(one, sums={}) for one in left], len(cohort))
    found, _ = mechanism.on_total(total, state, who, noise)
    return found.values.vector.double()


def faults(*, noise: type = SeededNoise, clipping: bool = True, sampling: Sampling | None = None) -> set[str]:
    """What is wrong with 30 rounds of 400 sites, of which a quarter are asked: by three tests."""
    mechanism, who = SiteLevel(clip=1.0, noise=2.0), population(Poisson(rate=0.25), 400, 30)
    parties = [str(i) for i in range(400)]
    sizes, squares, moved = [], 0.0, []
    for round in range(30):
        cohort = (sampling or Poisson(rate=0.25))(parties, round, 0)
        source = SeededNoise(0, round)
        found = released(mechanism, who, cohort, Halved(source) if noise is Halved else source, clipping)
        sizes.append(len(cohort))
        squares += float((found[1:] * 100 / 2.0).square().sum())
        moved.append(float(found[0]) * 100 - len(cohort))
    wrong = set()
    degrees = 30 * (SIZE - 1)
    tail = stats.chi2.cdf(squares, degrees)
    if min(tail, 1 - tail) < FALSE_ALARM / 2:
        wrong.add("noise")
    if abs(sum(moved)) / (2.0 * math.sqrt(30)) > stats.norm.isf(FALSE_ALARM / 2):
        wrong.add("clip")
    if stats.binomtest(sum(sizes), 30 * 400, 0.25).pvalue < FALSE_ALARM:
        wrong.add("sampling")
    return wrong


def test_the_mechanism_is_found_to_be_right() -> None:
    assert faults() == set()


@pytest.mark.parametrize(
    ("broken", "found"),
    [({"noise": Halved}, {"noise"}), ({"clipping": False}, {"clip"}), ({"sampling": Eager(0.25)}, {"sampling"})],
    ids=["half the noise", "no clip", "another sampling"],
)
def test_a_broken_mechanism_is_found(broken: dict[str, object], found: set[str]) -> None:
    assert faults(**broken) == found  # type: ignore[arg-type]


@settings(max_examples=20)
@given(sites=st.integers(2, 60), seed=st.integers(0, 100))
def test_leaving_one_site_out_moves_a_sum_by_no_more_than_the_bound(sites: int, seed: int) -> None:
    mechanism, who = SiteLevel(clip=0.7, noise=1.0), Population(sites=sites, rounds=1, scheme="all")
    state = mechanism.begin(who, 6, (), False)
    generator = torch.Generator().manual_seed(seed)
    given = [update(3 * torch.randn(6, generator=generator)) for _ in range(sites)]
    left = [mechanism.on_site(one, WORK, mechanism.shared(state), SeededNoise(0)) for one in given]
    quiet = replace(state, noise=1e-9)

    def sum_of(updates: Sequence[Update]) -> torch.Tensor:
        return mechanism.on_total(Mean()(updates, sites), quiet, who, SeededNoise(0))[0].values.vector * sites

    assert float((sum_of(left) - sum_of(left[1:])).norm()) <= 0.7 * (1 + 1e-5)
