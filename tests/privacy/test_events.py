import json

import dp_accounting as dp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.errors import BadInput
from fedelta.privacy.events import (
    DEEPEST,
    concentrated,
    from_plain,
    gaussian,
    poisson_gaussian,
    steps,
    to_plain,
    without_replacement_gaussian,
)

NOISE = st.floats(1e-6, 1e6)
COUNT = st.integers(1, 10**9)
GAUSSIANS = st.recursive(
    st.builds(dp.GaussianDpEvent, NOISE),
    lambda inner: (
        st.builds(dp.SelfComposedDpEvent, inner, COUNT)
        | st.builds(dp.ComposedDpEvent, st.lists(inner, min_size=1, max_size=3))
    ),
    max_leaves=4,
)
SIZES = st.tuples(COUNT, COUNT).map(sorted)
EVENTS = st.recursive(
    GAUSSIANS
    | st.builds(dp.NoOpDpEvent)
    | st.builds(dp.NonPrivateDpEvent)
    | st.builds(dp.PoissonSampledDpEvent, st.floats(0, 1), GAUSSIANS)
    | st.builds(lambda n, event: dp.SampledWithoutReplacementDpEvent(n[1], n[0], event), SIZES, GAUSSIANS)
    | st.builds(dp.SingleEpochTreeAggregationDpEvent, NOISE, COUNT)
    | st.builds(dp.ZCDpEvent, st.floats(5e-13, 5e11)),
    lambda inner: (
        st.builds(dp.SelfComposedDpEvent, inner, COUNT) | st.builds(dp.ComposedDpEvent, st.lists(inner, max_size=3))
    ),
    max_leaves=4,
)


@given(event=EVENTS)
def test_an_event_comes_back_from_json(event: dp.DpEvent) -> None:
    assert from_plain(json.loads(json.dumps(to_plain(event)))) == event


def test_what_the_short_forms_stand_for() -> None:
    noise = dp.GaussianDpEvent(1.5)
    assert from_plain(gaussian(1.5)) == noise
    assert from_plain(poisson_gaussian(0.1, 1.5)) == dp.PoissonSampledDpEvent(0.1, noise)
    assert from_plain(without_replacement_gaussian(3, 7, 1.5)) == dp.SampledWithoutReplacementDpEvent(7, 3, noise)
    assert from_plain(concentrated(0.4)) == dp.ZCDpEvent(0.4)
    assert from_plain(steps(0.1, 1.5, 9)) == dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.1, noise), 9)


@pytest.mark.parametrize(
    "event",
    [
        {},
        [],
        None,
        "gaussian",
        {"gaussian": {"noise_multiplier": 1.0}, "no_op": {}},
        {"GaussianDpEvent": {"noise_multiplier": 1.0}},
        {"os.system": {"command": "true"}},
        {"gaussian": {}},
        {"gaussian": None},
        {"gaussian": {"noise_multiplier": 1.0, "more": 1}},
        {"gaussian": {"noise_multiplier": "1"}},
        {"gaussian": {"noise_multiplier": True}},
        {"gaussian": {"noise_multiplier": 0}},
        {"gaussian": {"noise_multiplier": -1.0}},
        {"gaussian": {"noise_multiplier": 1e-300}},
        {"gaussian": {"noise_multiplier": float("nan")}},
        {"gaussian": {"noise_multiplier": float("inf")}},
        {"gaussian": {"noise_multiplier": 10**400}},
        {"no_op": {"x": 1}},
        {"poisson_sampled": {"rate": 1.1, "event": gaussian(1.0)}},
        {"poisson_sampled": {"rate": -0.1, "event": gaussian(1.0)}},
        {"poisson_sampled": {"rate": 0.1, "event": {"non_private": {}}}},
        {"poisson_sampled": {"rate": 0.1, "event": {"composed": []}}},
        {"poisson_sampled": {"rate": 0.1, "event": poisson_gaussian(0.1, 1.0)}},
        {"sampled_without_replacement": {"size": 3, "of": 2, "event": gaussian(1.0)}},
        {"sampled_without_replacement": {"size": 0, "of": 2, "event": gaussian(1.0)}},
        {"self_composed": {"count": 0, "event": gaussian(1.0)}},
        {"self_composed": {"count": 1.5, "event": gaussian(1.0)}},
        {"self_composed": {"count": 10**30, "event": gaussian(1.0)}},
        {"composed": {"events": []}},
        {"concentrated": {}},
        {"concentrated": {"rho": 0}},
        {"concentrated": {"rho": -1.0}},
        {"concentrated": {"rho": float("inf")}},
        {"concentrated": {"rho": 0.5, "xi": 0.1}},
        {"poisson_sampled": {"rate": 0.1, "event": concentrated(0.5)}},
        {"poisson_sampled": {"rate": 0.1, "event": {"self_composed": {"count": 2, "event": concentrated(0.5)}}}},
        {"sampled_without_replacement": {"size": 1, "of": 2, "event": concentrated(0.5)}},
        {"tree_aggregation": {"noise_multiplier": 1.0, "steps": [1, 2]}},
    ],
)
def test_nothing_else_is_an_event(event: object) -> None:
    with pytest.raises(BadInput):
        from_plain(event)  # type: ignore[arg-type]


def test_depth_is_bounded() -> None:
    event: dict[str, object] = {"no_op": {}}
    for _ in range(DEEPEST - 1):
        event = {"composed": [event]}
    from_plain(event)  # type: ignore[arg-type]
    for _ in range(100_000):
        event = {"composed": [event]}
    with pytest.raises(BadInput, match="nested"):
        from_plain(event)  # type: ignore[arg-type]
    while "composed" in event:  # or freeing it would recurse
        (event,) = event["composed"]  # type: ignore[misc]


def test_events_without_a_plain_form_are_refused() -> None:
    for event in (
        dp.LaplaceDpEvent(1.0),
        dp.ZCDpEvent(1.0, xi=0.1),
        dp.UnsupportedDpEvent(),
        dp.SingleEpochTreeAggregationDpEvent(1.0, [1, 2]),
    ):
        with pytest.raises(BadInput, match="no plain form"):
            to_plain(event)
