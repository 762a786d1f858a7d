"""A federation whose updates are added up encrypted, against the same federation in the clear."""

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.forecasting import forecast
from fedelta.algorithms.parts import Clear
from fedelta.algorithms.sampling import Fixed
from fedelta.core.digest import digest
from fedelta.core.errors import BadInput, RoundLost, TooFewSites, UnsoundCombination
from fedelta.core.examples import Examples
from fedelta.core.grid import Terms
from fedelta.core.messages import PartyId, Replies, Reply, Request, Requests
from fedelta.core.program import Report, Site, SiteData, run
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Workers
from fedelta.learning.closed_form import Ridge
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.task import Task
from fedelta.learning.training import Training
from fedelta.privacy.example_level import ExampleLevel
from fedelta.privacy.ledger import MemoryLedger
from fedelta.privacy.site_level import SiteLevel
from fedelta.secure import ckks
from fedelta.secure.homomorphic import CIPHERTEXTS, FORM, HomomorphicEncryption
from fedelta.secure.key_party import KeyParty, new_keys

pytest.importorskip("tenseal")
NAMES = [f"site-{i}" for i in range(6)]
COLLECT = HomomorphicEncryption(most=8, weight_bound=16.0)
TRAINING = Training(optimizer=SGD(lr=0.3), batch=8)


def rows(name: str) -> SiteData:
    place = int(name.rpartition("-")[2])
    x = torch.randn(13 + place, 6, generator=torch.Generator().manual_seed(place))
    examples = Examples.of((x, (x.sum(dim=1) > 0).long()))
    return SiteData(train=examples[:10], validation=examples[10:] if place else None)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


TASK = Task(model=network, objective=Classification(classes=2))


def federation(**changes: Any) -> Federation[Any]:
    parts = {"algorithm": FedAvg(task=TASK, training=TRAINING), "rounds": 1, "seed": 3, "collect": COLLECT}
    return Federation(**{**parts, **changes})


def in_the_clear(program: Federation[Any]) -> Federation[Any]:
    return replace(program, collect=Clear(), ledger=MemoryLedger())


def ended(program: Federation[Any], fleet: Any = None) -> tuple[Tensor, list[Report]]:
    """The weights after the last round, and all reports."""
    found = list(run(program, Local(program, rows, NAMES) if fleet is None else fleet))
    return program.algorithm.parameters(found[-1][0].algorithm).vector, [report for _, report in found]


def off(weights: Tensor, others: Tensor) -> float:
    return float((weights.double() - others.double()).abs().max())


@dataclass
class Altering:
    """A fleet in which something happens to replies on their way."""

    fleet: Local
    change: Callable[[Reply], Reply]

    def parties(self) -> Sequence[PartyId]:
        return self.fleet.parties()

    def submit(self, request: Request) -> None:
        self.fleet.submit(request)

    def submit_many(self, requests: Requests, together: int) -> None:
        self.fleet.submit_many(requests, together)

    def next_reply(self, timeout_s: float | None = None) -> Reply | Replies | None:
        reply = self.fleet.next_reply(timeout_s)
        return self.change(reply) if isinstance(reply, Reply) else reply

    def cancel(self, request_id: str) -> None:
        self.fleet.cancel(request_id)


def failing(*sites: str) -> Callable[[Reply], Reply]:
    def change(reply: Reply) -> Reply:
        return replace(reply, body={}, error="the line is dead") if reply.sender in sites else reply

    return change


def in_body(sites: Sequence[str], **tensors: Tensor) -> Callable[[Reply], Reply]:
    def change(reply: Reply) -> Reply:
        return replace(reply, body={**reply.body, **tensors}) if reply.sender in sites else reply

    return change


@pytest.mark.parametrize("changes", [{}, {"start": Ridge()}, {"validate_at_sites": True}, {"sampling": Fixed(size=4)}])
def test_a_round_ends_where_one_in_the_clear_does(changes: dict[str, Any]) -> None:
    coarse = replace(COLLECT, weight_bound=2.0**14)  # so that it is seen beside the rounding to float32
    program = federation(collect=coarse, **changes)
    (weights, reports), (plain, expected) = ended(program), ended(in_the_clear(program))
    sites = len(reports[0].cohort)
    assert 0 < off(weights, plain) <= coarse.error(sites, 10.0 * sites) + 2**-23
    for report, known in zip(reports, expected, strict=True):
        assert report.metrics == pytest.approx(known.metrics, rel=1e-5)
        assert (report.absent, report.unmeasured, report.per_site) == ({}, {}, {})


def test_round_zero_is_as_exact_as_in_the_clear() -> None:
    """The head is solved from sums in float64; nothing is trained after it."""
    program = federation(start=Ridge(), algorithm=FedAvg(task=TASK, training=replace(TRAINING, optimizer=SGD(lr=1e-9))))
    assert off(ended(program)[0], ended(in_the_clear(program))[0]) <= COLLECT.error(6, 60.0) + 2**-23


def test_evaluations_are_exact() -> None:
    program = federation(validate_at_sites=True, rounds=1)
    program = replace(program, algorithm=FedAvg(task=TASK, training=replace(TRAINING, optimizer=SGD(lr=1e-20))))
    (_, (report,)), (_, (known,)) = ended(program), ended(in_the_clear(program))
    for name, value in known.metrics.items():
        assert report.metrics[name] == pytest.approx(value, rel=1e-12)


def test_noise_leaves_no_trace_in_the_result() -> None:
    program = federation(rounds=2)
    other = federation(rounds=2, collect=replace(COLLECT, least=4))  # another key, too
    assert torch.equal(ended(program)[0], ended(program)[0])
    assert torch.equal(ended(program)[0], ended(other)[0])


def test_workers_have_the_public_key_alone() -> None:
    program = federation(plan=Plan(cohort=1, channels_last=False), rounds=2)
    with Workers(program, rows, NAMES, workers=2) as fleet:
        weights, reports = ended(program, fleet)
    assert not any(report.absent for report in reports)
    assert torch.equal(weights, ended(program)[0])


def test_a_program_travels_without_the_secret_key() -> None:
    program = federation()
    travelled = pickle.loads(pickle.dumps(program))
    assert travelled.collect.public == COLLECT._key_bytes
    assert travelled.collect.opener is None
    assert "_own" not in travelled.collect.__dict__
    site = Site(id="site-0", data=lambda: rows("site-0"))
    reply = travelled.handle(_training(program), site)
    assert reply.error is None
    assert COLLECT._simulated.opened(_statement(), reply.body[CIPHERTEXTS]).any()
    with pytest.raises(BadInput, match="give the key party as the opener"):
        list(travelled.collect.gather(Local(program, rows, NAMES), _requests(), 1, Terms()))


def _training(program: Federation[Any]) -> Request:
    shared, _ = program.broadcast(program.begun(program.init(), NAMES), NAMES)
    return Request(to="site-0", op="train", round=1, shared=shared)


def _requests(count: int = 6) -> Requests:
    return Requests(to=[f"site-{i}" for i in range(count)], op="train", round=1)


def _statement() -> Any:
    from fedelta.secure.key_party import Statement

    return Statement(job="", round=1, op="train", attempt=0, sites=3)


@pytest.mark.parametrize(
    "privacy", [SiteLevel(clip=0.5, noise=1e-6), ExampleLevel(clip=0.5, noise=1e-6)], ids=["site", "example"]
)
def test_a_guarantee_is_the_same_over_sums(privacy: Any) -> None:
    program = federation(
        privacy=privacy,
        collect=COLLECT,
        algorithm=FedAvg(task=TASK, training=replace(TRAINING, batch=10)),  # all rows: none is drawn
    )
    clear = in_the_clear(program)
    (weights, (report,)), (plain, (known,)) = ended(program), ended(clear)
    assert torch.allclose(weights, plain, atol=1e-3)
    assert {release.of for release in report.releases} == {release.of for release in known.releases}


def test_the_mean_is_that_of_the_sites_that_answer() -> None:
    program = federation()
    weights, (report,) = ended(program, Altering(Local(program, rows, NAMES), failing("site-2")))
    assert report.absent == {"site-2": "the line is dead"}
    clear = in_the_clear(program)
    plain, _ = ended(clear, Altering(Local(clear, rows, NAMES), failing("site-2")))
    assert off(weights, plain) <= COLLECT.error(5, 50.0) + 2**-22


def test_a_sum_of_too_few_is_not_opened_and_the_round_is_given_up() -> None:
    program = federation(rounds=2)
    fleet = Altering(Local(program, rows, NAMES), lambda reply: reply)
    fleet.change = lambda reply: failing(*NAMES[:4])(reply) if reply.round == 1 else reply
    _, reports = ended(program, fleet)
    assert set(reports[0].absent) == set(NAMES)
    assert "2 of 6 sites sent updates that can be added up, and a sum of fewer than 3" in reports[0].absent["site-5"]
    assert not reports[1].absent


def test_too_few_from_the_start_end_the_run() -> None:
    program = federation()
    with pytest.raises(TooFewSites, match="the line is dead") as caught:
        ended(program, Altering(Local(program, rows, NAMES), failing(*NAMES)))
    assert not isinstance(caught.value, RoundLost)
    with pytest.raises(TooFewSites, match="2 sites were asked"):
        list(COLLECT.gather(Local(program, rows, NAMES), _requests(2), 1, Terms()))
    with pytest.raises(BadInput, match=r"9 sites were asked, .* adds up 8; raise most"):
        list(COLLECT.gather(Local(program, rows, NAMES), _requests(9), 1, Terms()))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({CIPHERTEXTS: torch.full((1, ckks.WIDTH), 255, dtype=torch.uint8)}, "a ciphertext is malformed"),
        ({CIPHERTEXTS: torch.zeros(1, ckks.WIDTH, dtype=torch.uint8)}, "a ciphertext is transparent"),
        ({CIPHERTEXTS: torch.zeros(2, ckks.WIDTH, dtype=torch.uint8)}, "its ciphertexts are torch.uint8 of shape"),
        ({CIPHERTEXTS: torch.zeros(0)}, "its ciphertexts are torch.float32 of shape"),
        ({FORM: torch.zeros(3, dtype=torch.uint8)}, "what it says that it consists of cannot be read"),
        ({FORM: torch.tensor(list(b'[{}, {}, ["weight", 3]]'), dtype=torch.uint8)}, "consists of cannot be read"),
        ({"more": torch.zeros(3)}, "does not consist of ciphertexts and what they are of"),
    ],
)
def test_a_site_that_sends_something_else_is_left_out(tensors: dict[str, Tensor], sentence: str) -> None:
    program = federation()
    weights, (report,) = ended(program, Altering(Local(program, rows, NAMES), in_body(["site-0"], **tensors)))
    assert list(report.absent) == ["site-0"]
    assert sentence in report.absent["site-0"]
    clear = in_the_clear(program)
    plain, _ = ended(clear, Altering(Local(clear, rows, NAMES), failing("site-0")))
    assert off(weights, plain) <= COLLECT.error(5, 50.0) + 2**-22


def test_a_site_of_another_form_is_left_out_even_if_it_is_the_first() -> None:
    from fedelta.secure.ring import Form

    program = federation()
    other = Form(float32={"difference": 5}, float64={}, numbers=("weight",)).to_tensor()
    _, (report,) = ended(program, Altering(Local(program, rows, NAMES), in_body(["site-0"], **{FORM: other})))
    assert report.absent == {"site-0": "its encrypted update is of another form than most"}


def test_a_sum_with_a_ciphertext_of_another_key_is_not_used() -> None:
    program = federation(rounds=2)
    foreign = KeyParty(most=8)._public.encrypted(torch.ones(100, dtype=torch.float64).numpy())

    def change(reply: Reply) -> Reply:
        wrong = in_body(["site-1"], **{CIPHERTEXTS: torch.from_numpy(foreign)})
        return wrong(reply) if reply.round == 1 else reply

    _, reports = ended(program, Altering(Local(program, rows, NAMES), change))
    assert "does not decrypt to whole numbers" in reports[0].absent["site-0"]
    assert not reports[1].absent


def test_a_sum_that_is_beyond_its_sites_is_not_used() -> None:
    """Of a key party that does not look itself."""
    party = KeyParty(most=8, once=False)

    class Careless:
        def opened(self, statement: Any, ciphertexts: Tensor) -> Tensor:
            found = party.opened(statement, ciphertexts)
            found[0, 0] = statement.sites * 2**COLLECT.precision.bits + 1
            return found

    program = federation(collect=replace(COLLECT, public=party.public, opener=Careless()))
    _, (report,) = ended(program)
    assert "beyond what such sites can add up to" in report.absent["site-0"]


def test_a_copy_keeps_the_key_party() -> None:
    for again in (copy.copy(COLLECT), copy.deepcopy(COLLECT), copy.deepcopy({"collect": COLLECT})["collect"]):
        assert again._opener is COLLECT._simulated
        assert again.fingerprint == COLLECT.fingerprint
    assert replace(COLLECT).fingerprint != COLLECT.fingerprint


def test_an_update_leaves_once_for_a_round_however_often_it_is_asked_for() -> None:
    program = federation(rounds=2)
    fleet = Local(program, rows, NAMES)
    rounds = run(program, fleet)
    first, _ = next(rounds)
    next(rounds)
    ((_, again),) = list(run(program, fleet, first))  # the coordinator has lost round 2, and asks for it again
    assert set(again.absent) == set(NAMES)
    assert "has worked on this round already" in again.absent["site-0"]


def test_what_is_out_of_bounds_stays_at_the_site() -> None:
    program = federation(collect=replace(COLLECT, bound=2.0**-30))
    with pytest.raises(TooFewSites, match=r"site-0: its difference goes beyond 9\.31323e-10; lower"):
        ended(program)


def test_a_deployment_has_a_key_party_apart(tmp_path: Path) -> None:
    public = new_keys(tmp_path / "keys", most=8)
    party = KeyParty.read(tmp_path / "keys")
    site = replace(COLLECT, public=public)
    collect = replace(COLLECT, public=str(public), opener=party)
    assert site.public == collect.public == public.read_bytes()
    assert digest(site) == digest(collect)  # the same experiment at all parties
    assert digest(site) != digest(replace(COLLECT, public=party.public[:-1]))
    assert site.fingerprint == collect.fingerprint != COLLECT.fingerprint
    program = federation(collect=collect)
    weights, _ = ended(program)
    assert torch.equal(weights, ended(federation())[0])
    _, (report,) = ended(program)  # a coordinator that has forgotten, and sites that have, too
    assert "the key party has opened a sum of round 1 (train) before" in report.absent["site-0"]


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"least": 2}, "least must be from 3"),
        ({"least": 9}, "to most=8, got 9"),
        ({"most": 100_000}, "3 to 10,000 sites at most, got most=100000"),
        ({"bound": 0.0}, "bound must be from"),
        ({"opener": COLLECT._simulated}, "needs the public key that goes with it"),
        ({"public": "none/public.key"}, "the public key none/public.key cannot be read"),
    ],
)
def test_parts_are_checked(parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        replace(COLLECT, **parts)


def test_a_key_for_sums_over_more_sites_is_refused() -> None:
    party = KeyParty(most=20)
    collect = replace(COLLECT, public=party.public, opener=party)
    with pytest.raises(BadInput, match=r"is for sums over at most 20 sites, .* give most=20"):
        ended(federation(collect=collect))


def test_what_needs_single_updates_is_refused() -> None:
    from fedelta.algorithms.parts import Float32

    with pytest.raises(UnsoundCombination, match="use a linear encoding"):
        federation(encoding=Float32(linear=False))


def test_a_missing_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fedelta.core.extras", "fedelta.secure.homomorphic"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    collect = HomomorphicEncryption()  # which may be looked at
    with pytest.raises(BadInput, match=r"tenseal is not installed; run: pip install 'fedelta\[homomorphic\]'"):
        list(collect.gather(Local(federation(), rows, NAMES), _requests(), 1, Terms()))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    weights=st.lists(st.floats(0.125, 16.0), min_size=3, max_size=8),
    size=st.integers(1, 5000),
)
def test_the_error_of_a_mean_is_within_its_bound(seed: int, weights: list[float], size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = [(8 * torch.rand(size, generator=generator) - 4).clamp(-4, 4) for _ in weights]
    names = [f"site-{i}" for i in range(len(weights))]

    @dataclass
    class Sites:
        def init(self) -> None: ...

        def handle(self, request: Request, site: Site) -> Reply:
            place = names.index(site.id)
            update = {"difference": vectors[place], "weight": torch.tensor(weights[place], dtype=torch.float64)}
            return COLLECT.handle(request, site, lambda: update, Terms())

    fleet = Local(Sites(), rows, names)
    (found,) = COLLECT.gather(fleet, Requests(to=names, op="train", round=1), 1, Terms())
    exact = sum(vector.double() * weight for vector, weight in zip(vectors, weights, strict=True)) / sum(weights)
    assert float(found.body["weight"]) == pytest.approx(sum(weights), rel=1e-15)
    bound = COLLECT.error(len(weights), sum(weights)) + 2.0**-24 * 4  # half a unit in the last place of a float32
    assert off(found.body["difference"], exact) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("changes", [{}, {"start": Ridge(), "validate_at_sites": True, "rounds": 2}])
def test_the_bytes_are_those_of_the_plan(changes: dict[str, Any]) -> None:
    program = federation(**changes)
    told = forecast(program, rows, NAMES, seconds=0.01)
    _, reports = ended(program)
    assert [(each.bytes_down, each.bytes_up) for each in told.rounds] == [
        (report.bytes_down, report.bytes_up) for report in reports
    ]
    (check,) = [check for check in told.checks if check.what == "a sum hides single updates"]
    assert check.found == "the key party opens one of a round, over 3 to 8 sites"
