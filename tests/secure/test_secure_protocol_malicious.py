"""What each party does about another that lies: a site about the coordinator, the coordinator about a site."""

import re

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.core.errors import BadInput, BadTensors, FedeltaError, TooFewSites
from fedelta.secure.agreement import keys_text, survivors_text
from fedelta.secure.graph import Shape
from fedelta.secure.messages import PublicKeys, bytes_of
from fedelta.secure.protocol_coordinator import STEPS, Asked, CoordinatorSum
from fedelta.secure.protocol_site import SiteSum


def flags(*members: int, sites: int) -> torch.Tensor:
    return torch.tensor([index in members for index in range(sites)], dtype=torch.uint8)


def octets(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def refused(summed, name, asked, match, kind=FedeltaError, **altered) -> None:
    """The site refuses, in one sentence that does not tell its secrets, and nothing more comes of it in this sum."""
    with pytest.raises(kind, match=match) as raised:
        summed.answer(name, asked, **altered)
    assert re.fullmatch(r"[^\n]{20,500}", str(raised.value))
    with pytest.raises(FedeltaError, match="the sum is over"):
        summed.answer(name, asked)


def keys_of(context: bytes, name: str, identity: Ed25519PrivateKey, *publics: bytes) -> dict[str, torch.Tensor]:
    """What a site sends first; fresh keys unless they are given."""
    publics = publics or tuple(X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(2))
    return PublicKeys(
        encryption=publics[0],
        masking=publics[1],
        identity=identity.public_key().public_bytes_raw(),
        signature=identity.sign(keys_text(context, name, *publics)),
    ).to_tensors()


def row_replaced(asked, row: int, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    altered = {name: asked.shared[name].clone() for name in tensors}
    for name, tensor in tensors.items():
        altered[name][row] = tensor
    return altered


def test_a_key_that_was_replaced(new_sum):
    for column in ("encryption", "masking"):
        summed = new_sum(4)
        asked = summed.until("shares")
        other = octets(X25519PrivateKey.generate().public_key().public_bytes_raw())
        refused(summed, "site 0", asked, "'site 2' are not signed", **row_replaced(asked, 2, **{column: other}))
        refused(summed, "site 2", asked, "with the keys that it sent", **row_replaced(asked, 2, **{column: other}))


def test_all_keys_of_a_site_replaced_by_an_impostor(new_sum):
    summed = new_sum(4)
    asked = summed.until("shares")
    impostor = keys_of(summed.terms["context"], "site 2", Ed25519PrivateKey.generate())
    refused(summed, "site 0", asked, "'site 2' is not the one in the registry", **row_replaced(asked, 2, **impostor))


def test_keys_that_a_site_signed_for_another_sum_or_another_name(new_sum):
    for context, name in ((b"job/1/train/1", "site 2"), (b"job/1/train/0", "site 3")):
        summed = new_sum(4)
        asked = summed.until("shares")
        replayed = keys_of(context, name, summed.identities["site 2"])
        refused(summed, "site 0", asked, "'site 2' are not signed", **row_replaced(asked, 2, **replayed))


def test_an_identity_that_is_not_in_the_registry(new_sum):
    summed = new_sum(4)
    asked = summed.until("shares")
    del summed.registry["site 2"]
    refused(summed, "site 0", asked, "'site 2' is not in the registry")


def test_a_list_without_the_site_or_twice_with_another(new_sum):
    summed = new_sum(4)
    asked = summed.until("shares")
    others = {name: tensor[1:] for name, tensor in asked.shared.items()}
    others["names"] = octets(b'["site 1","site 2","site 3"]')
    refused(summed, "site 0", asked, "site 0 is not on the list", **others)
    summed.site["site 1"]._registry = None  # else the registry has refused it
    twice = {name: asked.shared[name][[0, 1, 2, 2]] for name in ("encryption", "masking", "identity", "signature")}
    refused(summed, "site 1", asked, "twice on the list", **twice)
    refused(summed, "site 2", asked, "twice on the list", names=octets(b'["site 0","site 1","site 2","site 2"]'))


def test_a_list_of_too_few_or_of_more_than_were_asked(new_sum):
    summed = new_sum(5)
    asked = summed.until("shares")
    few = {name: tensor[:3] for name, tensor in asked.shared.items()}
    few["names"] = octets(b'["site 0","site 1","site 2"]')
    refused(summed, "site 0", asked, "3 of 5 sites", TooFewSites, **few)
    many = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in asked.shared.items()}
    many["names"] = octets(b'["site 0","site 1","site 2","site 3","site 4","x"]')
    refused(summed, "site 1", asked, "list of 6 sites, where 5", BadTensors, **many)


def test_a_list_with_fewer_others_than_must_hold_shares(new_sum):
    summed = new_sum(4, Shape(3, 3))
    asked = summed.until("shares")
    few = {name: tensor[:3] for name, tensor in asked.shared.items()}
    few["names"] = octets(b'["site 0","site 1","site 2"]')
    refused(summed, "site 0", asked, "each of 3 sites has fewer than 3 others", TooFewSites, **few)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[",
        b"{}",
        b"[1,2,3,4]",
        b'["a", "b"]',
        b'["\\ud800"]',
        b"\xff",
        b"[" * 4000,
        b"1" * 4096,
        b'"' + b"x" * 9999,
    ],
)
def test_names_that_are_none(new_sum, text):
    summed = new_sum(4)
    asked = summed.until("shares")
    refused(summed, "site 0", asked, "'names'", BadTensors, names=octets(text))


@pytest.mark.parametrize("place", [0, 1])
def test_a_public_key_that_agrees_on_zero(new_sum, place):
    """The coordinator leaves its site out; from one that does not, no site takes it."""
    summed = new_sum(4)
    context = summed.terms["context"]
    publics = [X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(2)]
    publics[place] = bytes(32)
    sent = keys_of(context, "site 1", summed.identities["site 1"], *publics)
    asked = summed.coordinator.ask()
    with pytest.raises(BadTensors, match="'site 1' is none that keys are agreed on with"):
        summed.coordinator.take("site 1", sent)
    summed.coordinator._keys["site 1"] = PublicKeys.from_tensors(sent)
    summed.answer_all(asked, ["site 0", "site 2", "site 3"])
    asked = summed.coordinator.ask()
    if place == 0:
        refused(summed, "site 0", asked, "'site 1' is none that keys are agreed on with")


def test_each_step_is_done_once_and_asking_twice_does_not_spoil_the_sum(new_sum):
    summed = new_sum(3)
    for step in STEPS:
        asked = summed.coordinator.ask()
        summed.answer_all(asked)
        with pytest.raises(FedeltaError, match=f"asked for '{step}' of a secure sum out of order"):
            summed.answer("site 0", asked)
    summed.check_total(summed.names)


def test_steps_cannot_be_left_out(new_sum):
    summed = new_sum(3)
    asked = summed.until("survivors")
    reveal = Asked(step="reveal", shared={}, bodies=asked.bodies)
    with pytest.raises(FedeltaError, match="'reveal' of a secure sum out of order, where the next step is 'survivors'"):
        summed.answer("site 0", reveal)
    summed.answer("site 0", asked)


def test_shares_that_were_swapped_or_altered_or_are_another_sums(new_sum):
    for change in ("swapped", "altered", "other"):
        summed, other = new_sum(4), new_sum(4)
        asked, theirs = summed.until("masked"), other.until("masked")
        sealed = asked.bodies["site 0"]["shares"].clone()
        if change == "swapped":
            sealed[[0, 1]] = sealed[[1, 0]]
        elif change == "altered":
            sealed[0, 40] ^= 1
        else:
            sealed[0] = theirs.bodies["site 0"]["shares"][0]
        refused(summed, "site 0", asked, "shares from 'site 1' were not made for this site", shares=sealed)


def test_shares_made_for_another_site(new_sum):
    summed = new_sum(4)
    asked = summed.until("masked")
    sealed = asked.bodies["site 0"]["shares"].clone()
    sealed[2] = asked.bodies["site 1"]["shares"][2]  # both are from site 3
    refused(summed, "site 0", asked, "shares from 'site 3' were not made", shares=sealed)


def test_its_own_shares_sent_back_as_those_of_another(new_sum):
    """Both directions agree on one secret, and neither on one key nor on one text."""
    summed = new_sum(4)
    asked = summed.until("masked")
    sealed = asked.bodies["site 0"]["shares"].clone()
    sealed[0] = asked.bodies["site 1"]["shares"][0]  # from site 0 to site 1
    refused(summed, "site 0", asked, "shares from 'site 1' were not made for this site", shares=sealed)


def test_who_is_said_to_be_alive(new_sum):
    summed = new_sum(7)
    asked = summed.until("masked")
    refused(summed, "site 0", asked, "do not fit", alive=flags(1, 2, 3, 4, 5, 6, sites=7))
    refused(summed, "site 1", asked, "do not fit", alive=flags(0, 1, 2, 3, 4, 5, sites=7))  # site 6 sent shares
    refused(summed, "site 2", asked, "4 of 7 sites", TooFewSites, alive=flags(0, 1, 2, 3, sites=7))
    senders = asked.bodies["site 3"]["from"]
    itself = torch.tensor([0, 1, 2, 3, 5, 6])
    refused(summed, "site 3", asked, "do not fit", **{"from": itself})
    refused(summed, "site 4", asked, "ascending", BadTensors, **{"from": senders.flip(0)})
    refused(summed, "site 5", asked, "ascending", BadTensors, **{"from": senders + 1})
    refused(summed, "site 6", asked, "0 and 1", BadTensors, alive=torch.full((7,), 2, dtype=torch.uint8))


def test_too_few_of_its_own_neighbours(new_sum):
    summed = new_sum(8, Shape(3, 3))
    asked = summed.until("shares")
    drawn = summed.answer_all(asked)["site 0"]["neighbours"].tolist()
    asked = summed.coordinator.ask()
    left = [index for index in range(8) if index != drawn[0]]
    senders = asked.bodies["site 0"]["from"].tolist()
    kept = [row for row, sender in enumerate(senders) if sender in left]
    told = {"from": torch.tensor([senders[row] for row in kept], dtype=torch.int64)}
    told |= {"alive": flags(*left, sites=8), "shares": asked.bodies["site 0"]["shares"][kept]}
    refused(summed, "site 0", asked, "2 of the neighbours of site 0 are left", TooFewSites, **told)


def test_a_set_of_survivors_below_the_quorum_or_without_the_site_or_never_alive(new_sum):
    summed = new_sum(6)
    asked = summed.until("masked")
    for name in summed.names[:5]:
        told = dict(asked.bodies[name])
        rows = [row for row, sender in enumerate(told["from"].tolist()) if sender != 5]
        cut = {"alive": flags(0, 1, 2, 3, 4, sites=6), "from": told["from"][rows], "shares": told["shares"][rows]}
        summed.answer(name, asked, **cut)
    asked = Asked(step="survivors", shared={}, bodies={name: {} for name in summed.names})
    for name, members, match in (
        ("site 0", (0, 1, 2, 3), "4 of 6 sites survive"),
        ("site 1", (0, 2, 3, 4), "site 1 is not among the survivors"),
        ("site 2", (0, 1, 2, 3, 4, 5), "had not been alive"),
    ):
        refused(summed, name, asked, match, survivors=flags(*members, sites=6))


def told_apart(summed, first, second):
    """All answer up to their signatures; half of them are told that `first` survived, the others that `second` did."""
    asked = summed.until("survivors")
    signatures = {}
    for index, name in enumerate(summed.names):
        members = first if index % 2 else second
        if index in members:
            told = flags(*members, sites=len(summed.names))
            signatures[index] = summed.answer(name, asked, survivors=told)["signature"]
    return signatures


def test_two_sets_of_survivors_for_two_sites(new_sum):
    """Site 0 would have survived for some, and dropped out for others, who would reveal both of its secrets."""
    summed = new_sum(9)
    everybody, without = range(9), range(1, 9)
    signatures = told_apart(summed, without, everybody)
    signers = torch.tensor(sorted(signatures))
    body = {"signers": signers, "signatures": torch.stack([signatures[i] for i in signers.tolist()])}
    body |= {"alive": torch.empty(0, 64, dtype=torch.uint8)}
    asked = Asked(step="reveal", shared=body, bodies={name: {} for name in summed.names})
    refused(summed, "site 2", asked, "5 sites have signed the survivors .* where 7 must")
    refused(summed, "site 1", asked, "signatures of sites that are not among the survivors")
    kept = [row for row, i in enumerate(signers.tolist()) if i]
    cut = {"signers": signers[kept], "signatures": body["signatures"][kept]}
    refused(summed, "site 3", asked, "4 sites have signed", **cut)


@pytest.mark.parametrize("shape", [None, Shape(8, 5)])
@pytest.mark.parametrize("lie", ["alive", "asked"])
def test_a_site_that_was_told_of_other_sites_or_asked_for_other_work_is_not_unmasked(new_sum, shape, lie):
    """It has no mask with a neighbour that was hidden from it, which must not help to take off the last mask."""
    summed = new_sum(12, shape)
    asked = summed.until("masked")
    victim, told = "site 3", asked.bodies["site 3"]
    if lie == "alive":
        kept = [row for row, i in enumerate(told["from"].tolist()) if i != 7]
        asked.bodies[victim] = {"from": told["from"][kept], "shares": told["shares"][kept]}
        answer = summed.answer(victim, asked, alive=flags(*(i for i in range(12) if i != 7), sites=12))
    else:
        answer = summed.site[victim].masked({**asked.shared, **told}, summed.inputs[victim], b"another model")
    with pytest.raises(BadTensors, match="has not signed the set of sites that it was told are alive, or its task"):
        summed.coordinator.take(victim, answer)
    summed.answer_all(asked, [name for name in summed.names if name != victim])
    # a coordinator that goes on all the same
    (part,) = summed.coordinator._parts.values()
    part.members.add(3)
    summed.coordinator._alike[3] = bytes_of(answer, "signature", 64)
    summed.answer_all(summed.coordinator.ask(), [name for name in summed.names if name != victim])
    asked = summed.coordinator.ask()
    holders = [j for j in asked.bodies if 3 in summed.coordinator._graph.incoming[summed.names.index(j)]]
    assert holders
    for name in holders:
        refused(summed, name, asked, "has not signed that it was told of the same sites, and asked the same")


def test_a_site_signs_one_set(new_sum):
    summed = new_sum(6)
    asked = summed.until("survivors")
    summed.answer("site 1", asked)
    with pytest.raises(FedeltaError, match="out of order"):
        summed.answer("site 1", asked, survivors=flags(0, 1, 2, 3, 4, sites=6))


def test_signatures_of_another_sum_or_set_or_site_or_of_none(new_sum):
    for change in ("sum", "set", "identity", "swapped", "few"):
        summed, other = new_sum(6), new_sum(6)
        asked = summed.until("reveal")
        signatures, signers = asked.shared["signatures"].clone(), asked.shared["signers"]
        digest = summed.coordinator._graph.digest
        if change == "sum":  # signed by the same sites, but for another list
            other.until("shares")
            text = survivors_text(other.coordinator._graph.digest, range(6), 6)
            signatures = torch.stack([octets(summed.identities[name].sign(text)) for name in summed.names])
        elif change == "set":
            text = survivors_text(digest, range(5), 6)
            signatures = torch.stack([octets(summed.identities[name].sign(text)) for name in summed.names])
        elif change == "identity":
            text = survivors_text(digest, range(6), 6)
            signatures = torch.stack([octets(Ed25519PrivateKey.generate().sign(text)) for _ in summed.names])
        elif change == "swapped":
            signatures = signatures.flip(0)
        else:
            signers, signatures = signers[:4], signatures[:4]
        match = f"{4 if change == 'few' else 0} sites have signed"
        refused(summed, "site 0", asked, match, signers=signers, signatures=signatures)


def test_a_quorum_of_signatures_is_enough_though_others_are_false(new_sum):
    summed = new_sum(6)
    asked = summed.until("reveal")
    asked.shared["signatures"][0] = 0
    summed.answer_all(asked)
    summed.check_total(summed.names)


@settings(max_examples=40)
@given(data=st.data(), step=st.sampled_from(["shares", "masked", "survivors", "reveal"]))
def test_one_bit_of_any_message_to_a_site(new_sum, data, step):
    """It is refused, or it is a signature that a quorum can do without, or the sites see that they were told apart."""
    summed = new_sum(6)
    asked = summed.until(step)
    told = {**asked.shared, **asked.bodies["site 0"]}
    name = data.draw(st.sampled_from(sorted(told)))
    flat = told[name].clone().view(torch.uint8).reshape(-1)
    place = data.draw(st.integers(0, len(flat) - 1))
    flat[place] ^= 1 << data.draw(st.integers(0, 7))
    altered = {name: flat.view(told[name].dtype).reshape(told[name].shape)}
    try:
        answer = summed.answer("site 0", asked, **altered)
    except FedeltaError:
        return
    assert (step, name) in {("reveal", "signatures"), ("survivors", "survivors")}
    if step == "survivors":
        with pytest.raises(BadTensors, match="has not signed the set"):
            summed.coordinator.take("site 0", answer)


@settings(max_examples=20)
@given(data=st.data())
def test_a_false_share_is_found_and_left_out(new_sum, data):
    """By the commitment where it is one of a seed, by the public key where it is one of a masking key."""
    summed = new_sum(7)
    asked = summed.until("masked")
    survivors = summed.names[: data.draw(st.sampled_from([6, 7]))]
    summed.answer_all(asked, survivors)
    summed.answer_all(summed.coordinator.ask())
    asked = summed.coordinator.ask()
    answers = {name: summed.answer(name, asked) for name in survivors}
    liar, owner = data.draw(st.permutations(range(7)).filter(lambda drawn: drawn[0] < len(survivors)))[:2]
    shares = answers[f"site {liar}"]["shares"]
    row = owner - (owner > liar)
    shares[row] = data.draw(st.sampled_from([octets(b"\xff" * 33), octets(bytes(33)), shares[row] ^ 1]))
    for name in data.draw(st.permutations(survivors)):
        summed.coordinator.take(name, answers[name])
    summed.check_total(survivors)
    used = [holder for holder in range(len(survivors)) if holder != owner][: summed.threshold]
    assert summed.coordinator.false_shares == ({f"site {liar}": f"site {owner}"} if liar in used else {})


@pytest.mark.parametrize("owner", [0, 6])
def test_more_false_shares_end_the_sum(new_sum, owner):
    """Of a survivor's seed, and of the masking key of one that dropped out."""
    summed = new_sum(7)
    asked = summed.until("masked")
    summed.answer_all(asked, summed.names[:6])
    summed.answer_all(summed.coordinator.ask())
    asked = summed.coordinator.ask()
    for name in summed.names[:6]:
        answer = summed.answer(name, asked)
        if name in ("site 1", "site 2"):
            answer["shares"][0 if owner == 0 else 5, 5] ^= 1
        summed.coordinator.take(name, answer)
    with pytest.raises(TooFewSites, match=f"'site {owner}' has committed itself to"):
        summed.coordinator.total()


def test_the_coordinator_refuses_what_honest_sites_would_refuse(new_sum):
    summed = new_sum(7)
    asked = summed.coordinator.ask()
    context, coordinator = summed.terms["context"], summed.coordinator
    first = summed.answer("site 0", asked)
    coordinator.take("site 0", first)
    with pytest.raises(BadTensors, match="not signed"):
        coordinator.take("site 1", keys_of(b"another", "site 1", summed.identities["site 1"]))
    with pytest.raises(BadTensors, match="not the one in the registry"):
        coordinator.take("site 2", keys_of(context, "site 2", Ed25519PrivateKey.generate()))
    publics = [bytes(first[name].tolist()) for name in ("encryption", "masking")]
    with pytest.raises(BadTensors, match="another site has sent"):
        coordinator.take("site 3", keys_of(context, "site 3", summed.identities["site 3"], *publics))
    summed.answer_all(asked, ["site 4", "site 5", "site 6"])
    with pytest.raises(TooFewSites, match="4 of 7 sites sent keys, and a secure sum needs 5"):
        coordinator.ask()


def test_shares_for_oneself_or_for_too_few(new_sum):
    summed = new_sum(6, Shape(3, 2))
    asked = summed.until("shares")
    answer = summed.answer("site 0", asked)
    with pytest.raises(BadTensors, match="3 others"):
        summed.coordinator.take("site 0", {**answer, "neighbours": torch.tensor([0, 1, 2])})
    answer = summed.answer("site 1", asked)
    with pytest.raises(BadTensors, match="shares with 2 sites"):
        summed.coordinator.take("site 1", {**answer, "neighbours": answer["neighbours"][:2]})


def test_a_rule_that_bears_no_such_list_is_a_matter_of_too_few_sites(new_sum):
    def rule(listed: int) -> Shape:
        if listed < 4:
            raise BadInput("no graph bears this")
        return Shape(listed - 1, 2)

    summed = new_sum(4)
    summed.terms |= {"shape": rule}
    summed.coordinator = CoordinatorSum(names=summed.names, **summed.terms)
    summed.answer_all(summed.coordinator.ask(), summed.names[:3])
    with pytest.raises(TooFewSites, match="3 of 4 sites sent keys, which are too few: no graph"):
        summed.coordinator.ask()
    wrong = SiteSum(name="a", identity=Ed25519PrivateKey.generate(), context=b"x", cohort=2, shape=rule)
    wrong.keys()
