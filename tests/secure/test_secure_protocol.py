"""Sums that come out, and sums that do not: dropouts, orders, what leaves a site, what the coordinator refuses."""

import copy
import pickle
import random
import re

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fedelta.core.errors import BadInput, BadTensors, FedeltaError, TooFewSites
from fedelta.secure.graph import Shape, quorum
from fedelta.secure.protocol_coordinator import STEPS, CoordinatorSum
from fedelta.secure.protocol_site import SiteSum, _drawn


def gone_through(summed, leaves: dict[str, str], seed: int) -> list[str]:
    """Each site of `leaves` is silent from that step on, the others answer in random order; who has sent its input.

    Ends before the total; raises TooFewSites where the coordinator does.
    """
    order, sent = random.Random(seed), []
    for step in STEPS:
        asked = summed.coordinator.ask()
        there = [name for name in summed.names if STEPS.index(leaves.get(name, "reveal")) > STEPS.index(step)]
        there += [name for name in summed.names if name not in leaves and step == "reveal"]
        answered = summed.answer_all(asked, order.sample(there, len(there)))
        sent = list(answered) if step == "masked" else sent
    return sent


def total_of(summed, leaves: dict[str, str], seed: int) -> object:
    gone_through(summed, leaves, seed)
    return summed.coordinator.total()


@st.composite
def dropouts(draw, sites: int, count: int) -> dict[str, str]:
    who = draw(st.permutations(range(sites)))[:count]
    return {f"site {i}": draw(st.sampled_from(STEPS)) for i in who}


@settings(max_examples=30)
@given(data=st.data(), sites=st.integers(2, 9), seed=st.integers(0, 2**32))
def test_up_to_the_threshold_any_dropouts_leave_the_sum_of_the_survivors(new_sum, data, sites, seed):
    leaves = data.draw(dropouts(sites, data.draw(st.integers(0, sites - quorum(sites)))))
    summed = new_sum(sites)
    summed.check_total(gone_through(summed, leaves, seed))


@settings(max_examples=30)
@given(data=st.data(), sites=st.integers(2, 9), seed=st.integers(0, 2**32))
def test_with_one_more_nothing_comes_of_it(new_sum, data, sites, seed):
    leaves = data.draw(dropouts(sites, sites - quorum(sites) + 1))
    summed = new_sum(sites)
    with pytest.raises(TooFewSites):
        total_of(summed, leaves, seed)
    with pytest.raises(FedeltaError):
        summed.coordinator.total()
    if summed.coordinator._sums:  # what the coordinator has is masked still
        in_it = [summed.coordinator._graph.listed.names[i] for i in summed.coordinator._survivors]
        for name, expected in summed.expected(in_it).items():
            assert not set(expected) & set(summed.coordinator._sums[name].tolist())


@settings(max_examples=25)
@given(data=st.data(), sites=st.integers(8, 13), seed=st.integers(0, 2**32))
def test_a_sparse_graph_bears_as_many_as_its_threshold_allows(new_sum, data, sites, seed):
    neighbours = data.draw(st.integers(3, sites - 2))
    count = data.draw(st.integers(0, min(sites - quorum(sites), neighbours - 1)))
    leaves = data.draw(dropouts(sites, count))
    summed = new_sum(sites, Shape(neighbours, neighbours - count))
    summed.check_total(gone_through(summed, leaves, seed))


@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_a_sparse_graph_gives_the_sum_or_nothing(new_sum, data, seed):
    sites = 12
    leaves = data.draw(dropouts(sites, data.draw(st.integers(1, 5))))
    summed = new_sum(sites, Shape(3, data.draw(st.integers(1, 3))))
    try:
        sent = gone_through(summed, leaves, seed)
        summed.check_total(sent)
    except TooFewSites:
        with pytest.raises(FedeltaError):
            summed.coordinator.total()


def test_a_site_whose_neighbours_are_gone_is_left_out_before_it_masks(new_sum):
    summed = new_sum(20, Shape(2, 1))
    asked = summed.until("shares")
    answers = {name: summed.answer(name, asked) for name in summed.names}
    gone = {summed.names[j] for j in answers["site 0"]["neighbours"].tolist()}
    for name in set(summed.names) - gone:
        summed.coordinator.take(name, answers[name])
    asked = summed.coordinator.ask()
    assert "site 0" not in asked.bodies
    assert not gone & asked.bodies.keys()
    survivors = list(summed.answer_all(asked))
    for _ in ("survivors", "reveal"):
        summed.answer_all(summed.coordinator.ask())
    summed.check_total(survivors)


def test_fewer_than_t_with_shares_are_found_before_anything_is_revealed(new_sum):
    summed = new_sum(12, Shape(4, 4))
    asked = summed.until("shares")
    gone = summed.names[summed.answer_all(asked)["site 0"]["neighbours"][0]]
    summed.answer_all(summed.coordinator.ask(), [name for name in summed.names if name != gone])
    with pytest.raises(TooFewSites, match=r"3 sites are left .* 4 are needed"):
        summed.coordinator.ask()


def looks_uniform(octets: bytes) -> bool:
    counts = np.bincount(np.frombuffer(octets, np.uint8), minlength=256)
    return chisquare(counts).pvalue > 1e-9


@pytest.mark.parametrize("value", [0, -1, 12345])
def test_what_one_site_sends_is_uniform_whatever_its_input(new_sum, value):
    sent = []
    for _ in range(2):
        summed = new_sum(3, size=2**15)
        for vectors in summed.inputs.values():
            for vector in vectors.values():
                vector[:] = value
        asked = summed.until("masked")
        sent.append({name: summed.answer(name, asked) for name in summed.names})
    one, other = sent[0]["site 0"], sent[0]["site 1"]
    again = sent[1]["site 0"]
    for name in ("wide", "narrow"):
        for seen in (one[name], one[name] - again[name], one[name] - other[name], one[name] + other[name]):
            assert looks_uniform(seen.numpy().tobytes())
            assert (seen != 0).float().mean() > 0.999
        everything = sum(answer[name] for answer in sent[0].values())
        assert looks_uniform(everything.numpy().tobytes())  # self masks hide it still, as pairs have cancelled
    assert not (one["wide"].view(torch.int32)[: 2**15] == one["narrow"]).any()  # no keystream is used twice


def test_the_test_of_uniformity_sees_a_missing_mask(new_sum):
    assert not looks_uniform(np.full(2**15, 12345).tobytes())
    assert not looks_uniform(np.random.default_rng(0).integers(0, 2**31, 2**15, np.int32).tobytes())


def secrets_of(site: SiteSum) -> set[bytes]:
    state = site._state
    own = getattr(state, "own", state)
    found = {own.encryption.private_bytes_raw(), own.masking.private_bytes_raw(), getattr(state, "seed", None)}
    found |= set(getattr(state, "agreed", {}).values())
    return {secret for secret in found if secret}


def test_no_secret_is_in_a_message_or_a_repr(new_sum):
    summed, hidden, seen = new_sum(5), set(), []
    for _ in STEPS:
        asked = summed.coordinator.ask()
        answers = summed.answer_all(asked)
        seen += [asked.shared, *asked.bodies.values(), *answers.values()]
        if asked.step in ("keys", "shares"):
            hidden |= {secret for site in summed.site.values() for secret in secrets_of(site)}
        texts = [repr(summed.coordinator)]
        for site in summed.site.values():
            texts += [repr(site), repr(vars(site))]
        for secret in hidden:
            assert not any(secret.hex() in text or repr(secret)[2:-1] in text for text in texts)
    assert len(hidden) == 5 * 3 + 5 * 4 / 2  # those agreed on are the same for both
    everything = [tensor.numpy().tobytes() for message in seen for tensor in message.values()]
    assert not any(secret in octets for secret in hidden for octets in everything)
    summed.check_total(summed.names)


@pytest.mark.parametrize("step", STEPS)
def test_a_site_half_is_neither_pickled_nor_copied(new_sum, step):
    summed = new_sum(3)
    summed.until(step)
    site = summed.site["site 0"]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="neither stored nor copied"):
            pickle.dumps(site, protocol)
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither stored nor copied"):
            copied(site)


def test_secrets_are_dropped_when_the_sum_is_over_or_was_refused(new_sum):
    summed = new_sum(3)
    asked = summed.until("reveal")
    with pytest.raises(FedeltaError):
        summed.answer("site 0", asked, signers=torch.zeros(1, dtype=torch.int32))
    summed.answer("site 1", asked)
    for name in ("site 0", "site 1"):
        assert summed.site[name]._state.__slots__ == ()
        with pytest.raises(FedeltaError, match="the sum is over"):
            summed.answer(name, asked)


def test_inputs_stay_as_they_are_and_may_be_read_only(new_sum):
    summed = new_sum(3)
    asked = summed.until("masked")
    before = copy.deepcopy(summed.inputs)
    for vectors in summed.inputs.values():
        for vector in vectors.values():
            vector.flags.writeable = False
    summed.answer_all(asked)
    for name, vectors in summed.inputs.items():
        assert all((vectors[key] == before[name][key]).all() for key in vectors)


@pytest.mark.parametrize(
    "vector", [np.zeros(5), np.zeros((5, 1), np.int32), np.zeros(5, ">i4"), np.zeros(5, np.uint32)]
)
def test_only_integer_vectors_are_masked(new_sum, vector):
    summed = new_sum(3)
    asked = summed.until("masked")
    summed.inputs["site 0"] = {"wide": vector}
    with pytest.raises(BadTensors, match="int32 or int64 with one dimension"):
        summed.answer("site 0", asked)


def test_neighbours_are_drawn_uniformly_from_the_others():
    counts = np.zeros(12, int)
    for _ in range(3000):
        found = _drawn(3, 12, Shape(4, 2))
        assert len(set(found)) == 4
        assert found == sorted(found)
        counts[found] += 1
    assert counts[3] == 0
    assert chisquare(np.delete(counts, 3)).pvalue > 1e-9


def test_terms_are_checked():
    rule, identity = (lambda listed: Shape(listed - 1, 1)), Ed25519PrivateKey.generate()
    with pytest.raises(BadInput, match="ask more sites"):
        SiteSum(name="a", context=b"x", cohort=1, shape=rule, identity=identity)
    with pytest.raises(BadInput, match="context"):
        CoordinatorSum(context=b"", cohort=2, shape=rule, names=["a", "b"])
    for names in (["a", "a"], ["a", "b", "c"]):
        with pytest.raises(BadInput, match="distinct names"):
            CoordinatorSum(context=b"x", cohort=2, shape=rule, names=names)


def test_without_a_registry_identities_are_those_of_the_list(new_sum):
    summed = new_sum(4)
    terms = summed.terms | {"registry": None}
    summed.site = {name: SiteSum(name=name, identity=Ed25519PrivateKey.generate(), **terms) for name in summed.names}
    summed.coordinator = CoordinatorSum(names=summed.names, **terms)
    summed.answer_all(summed.until("reveal"))
    summed.check_total(summed.names)


def spoilt(tensors: dict, name: str) -> list[dict]:
    """Messages that have not the form of `tensors`, by what is wrong with one of them."""
    good = tensors[name]
    return [
        {key: value for key, value in tensors.items() if key != name},
        {**tensors, "more": good},
        {**tensors, name: good[:-1]},
        {**tensors, name: torch.cat([good, good[-1:]])},
        {**tensors, name: good[None]},
        {**tensors, name: good.to(torch.int8)},
        {**tensors, name: good.to(torch.bfloat16)},
    ]


def could_be_added(message: dict) -> bool:
    """Whether these are masked vectors of some form, with a signature."""
    vectors = [tensor for name, tensor in message.items() if name != "signature"]
    signature = message.get("signature", torch.empty(0))
    whole = all(vector.ndim == 1 and vector.dtype in (torch.int16, torch.int32, torch.int64) for vector in vectors)
    return whole and signature.shape == (64,) and signature.dtype == torch.uint8


@pytest.mark.parametrize("step", STEPS)
def test_a_site_with_a_malformed_answer_has_dropped_out(new_sum, step):
    summed = new_sum(4)
    asked = summed.until(step)
    answer = summed.answer("site 3", asked)
    for message in [message for name in answer for message in spoilt(answer, name)]:
        summed.coordinator._waiting.add("site 3")
        if step == "masked" and could_be_added(message):  # of another form than that of the others, who outvote it
            summed.coordinator.take("site 3", message)
            continue
        with pytest.raises(BadTensors) as raised:
            summed.coordinator.take("site 3", message)
        assert re.fullmatch(r"[^\n]+", str(raised.value))
    with pytest.raises(BadTensors, match="has answered"):
        summed.coordinator.take("site 3", answer)
    summed.answer_all(asked, summed.names[:3])
    while asked.step != "reveal":
        asked = summed.coordinator.ask()
        assert "site 3" not in asked.bodies
        summed.answer_all(asked)
    in_it = STEPS.index(step) > STEPS.index("masked")
    summed.check_total(summed.names if in_it else summed.names[:3])


def test_nobody_answers_who_was_not_asked_nor_twice(new_sum):
    summed = new_sum(3)
    with pytest.raises(BadTensors, match="was not asked"):
        summed.coordinator.take("site 0", summed.site["site 0"].keys())
    summed = new_sum(3)
    answers = summed.answer_all(summed.coordinator.ask())
    for name in ("site 0", "somebody"):
        with pytest.raises(BadTensors, match="was not asked"):
            summed.coordinator.take(name, answers["site 0"])
    with pytest.raises(FedeltaError, match="after its last step"):
        summed.coordinator.total()


@pytest.mark.parametrize("lie", ["length", "label"])
def test_the_form_of_most_counts_and_not_that_of_the_first(new_sum, lie):
    summed = new_sum(4)
    asked = summed.until("masked")
    if lie == "length":
        summed.inputs["site 0"]["wide"] = np.zeros(6, np.int64)
    for name in summed.names:
        label = "mine" if lie == "label" and name == "site 0" else "ours"
        summed.coordinator.take(name, summed.answer(name, asked), label)
    for _ in ("survivors", "reveal"):
        summed.answer_all(summed.coordinator.ask())
    assert summed.coordinator.label == "ours"
    summed.check_total(summed.names[1:])
