"""What a federation says of itself to a site's policy is what it does."""

import math
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.adapters import dense_lora
from torch import nn

from fedelta import (
    LDA,
    SGD,
    Classification,
    ExampleLevel,
    FedAvg,
    Federation,
    Fixed,
    Local,
    LocalDP,
    Ridge,
    SecureAggregation,
    SiteLevel,
    Task,
    Training,
    run,
)
from fedelta.adapters.fed_sb import FedSB
from fedelta.adapters.fedex_lora import FedExLoRA
from fedelta.adapters.fedsa_lora import FedSALoRA
from fedelta.adapters.ffa_lora import FFALoRA
from fedelta.adapters.flexlora import FlexLoRA
from fedelta.adapters.flora import FLoRA
from fedelta.adapters.flora_na import FLoRANA
from fedelta.adapters.hetlora import HetLoRA
from fedelta.adapters.lora_fair import LoRAFAIR
from fedelta.adapters.rolora import RoLoRA
from fedelta.cli import facts as facts_module
from fedelta.cli.facts import facts, largest_message
from fedelta.core import codec
from fedelta.core.digest import digest
from fedelta.core.messages import Reply, Request
from fedelta.core.program import Site, SiteData
from fedelta.fleet.departures import Departure, Departures, read
from fedelta.fleet.policy import Door
from fedelta.fleet.policy_file import parse
from fedelta.privacy.distributed import DistributedDP
from fedelta.secure.homomorphic import HomomorphicEncryption
from small_task import plain_task, site_data

KEYS = {name: Ed25519PrivateKey.generate() for name in site_data()}
IDENTITIES = {name: key.public_key().public_bytes_raw().hex() for name, key in KEYS.items()}

POLICY = """
experiments.digests = ["{digest}"]
work = {{requests = {requests}, rounds = 2}}
privacy = {{unit = "any", epsilon = "any", delta = "any", noise = "any"}}
secure = {{collect = "any", identities = false, least = 1}}
hours = {{zone = "UTC", open = "any"}}
[leaves]
tensors = ["0.*", "2.*"]
parameters = 83
bytes_per_reply = 1_700
bytes_per_round = 10_000
bytes_per_day = 20_000
"""


class Listening:
    """A federation that keeps the replies of its sites."""

    def __init__(self, federation: Federation[Any]) -> None:
        self._federation, self.replies = federation, list[tuple[Request, Reply]]()

    def handle(self, request: Request, site: Site) -> Reply:
        reply = self._federation.handle(request, site)
        self.replies.append((request, reply))
        return reply


def federation(**parts: Any) -> Federation[Any]:
    algorithm = FedAvg(task=plain_task(), training=Training(optimizer=SGD(lr=0.1), batch=4))
    return Federation(algorithm=algorithm, rounds=1, **parts)


def replies(federation: Federation[Any]) -> list[tuple[Request, Reply]]:
    data, listening = site_data(), Listening(federation)

    def site(name: str) -> SiteData:
        return SiteData(train=data[name], validation=data[name][:3], identity=KEYS[name])

    for _ in run(federation, Local(listening, site, list(data))):  # type: ignore[arg-type]
        pass
    return listening.replies


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"privacy": SiteLevel(clip=1.0, noise=1.0)},
        {"privacy": LocalDP(clip=1.0, noise=1.0)},
        {"privacy": ExampleLevel(clip=1.0, noise=1.0)},
        {"collect": SecureAggregation()},
        {"collect": SecureAggregation(bits=32, identities=IDENTITIES)},
        {"collect": SecureAggregation(), "privacy": DistributedDP(clip=1.0, noise=1.0)},
        {"collect": SecureAggregation(), "privacy": ExampleLevel(clip=1.0, noise=1.0)},
    ],
    ids=str,
)
def test_the_bytes_of_an_update_are_known_before(parts: dict[str, Any]) -> None:
    made = federation(**parts)
    found = [codec.size(reply.body, reply.meta) for request, reply in replies(made) if request.op == "train"]
    assert found == [facts(made, "site-0").update_bytes] * 4


@pytest.mark.parametrize(
    "parts",
    [
        {"validate_at_sites": True},
        {"privacy": LocalDP(clip=1.0, noise=1.0)},
        {"collect": SecureAggregation(bits=32, identities=IDENTITIES), "validate_at_sites": True},
        {"collect": SecureAggregation(), "privacy": ExampleLevel(clip=1.0, noise=1.0)},
    ],
    ids=str,
)
def test_the_bytes_of_a_round_are_known_before(parts: dict[str, Any]) -> None:
    made = federation(**parts)
    left = Counter[str]()
    for request, reply in replies(made):
        left[reply.sender] += Departure.of("", request, reply).bytes if request.round else 0
    assert set(left.values()) == {facts(made, "site-0", [*left]).round_bytes}


class Weighing:
    """A federation that notes the bytes of each message."""

    def __init__(self, federation: Federation[Any]) -> None:
        self._federation, self.largest = federation, 0

    def handle(self, request: Request, site: Site) -> Reply:
        reply = self._federation.handle(request, site)
        for tensors in (request.shared, request.body, reply.body):
            self.largest = max(self.largest, codec.size(tensors))
        return reply


@pytest.mark.parametrize(
    "made",
    [
        federation(),
        federation(start=Ridge(), validate_at_sites=True),
        federation(collect=SecureAggregation()),
        federation(collect=SecureAggregation(bits=32, identities=IDENTITIES), start=Ridge()),
        federation(collect=SecureAggregation(), privacy=DistributedDP(clip=1.0, noise=1.0)),
        *(
            dense_lora.federation(method(task=dense_lora.task(width=40), training=dense_lora.training()))
            for method in (FLoRA, FedExLoRA, FedSB, FlexLoRA, HetLoRA, RoLoRA, FFALoRA, FedSALoRA, LoRAFAIR, FLoRANA)
        ),
    ],
    ids=lambda made: f"{type(made.algorithm).__name__} {made.collect} {made.start} {made.privacy}",
)
def test_what_messages_may_have_by_default_is_more_than_they_have(
    made: Federation[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, weighing, data = not isinstance(made.algorithm, FedAvg), Weighing(made), site_data()

    def site(name: str) -> SiteData:
        return SiteData(train=data[name], validation=data[name][:3], identity=KEYS[name])

    fleet = Local(weighing, *((dense_lora.data, dense_lora.NAMES) if lora else (site, list(data))))  # type: ignore
    assert len(list(run(made, fleet))) == made.rounds + (made.start is not None)
    assert largest_message(made, "site-0") == 2**26 > weighing.largest
    monkeypatch.setattr(facts_module, "_LEAST_MESSAGE", 0)
    assert weighing.largest > 500
    assert largest_message(made, "site-0") > 2 * weighing.largest
    assert largest_message(made, "site-0", 3) == 3 * 2**20


def test_sums_of_features_and_ciphertexts_make_messages_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "_LEAST_MESSAGE", 0)
    wide = Task(model=partial(nn.Linear, 3000, 2), objective=Classification(classes=2))
    algorithm = FedAvg(task=wide, training=Training(optimizer=SGD(lr=0.1), batch=4))
    plain, started = (Federation(algorithm=algorithm, rounds=1, start=start) for start in (None, Ridge()))
    assert 8 * 8 * 6002 < largest_message(plain, "a") < 10 * 8 * 6002
    assert largest_message(started, "a") > 8 * 8 * 3000 * 3000 / 2
    pytest.importorskip("tenseal")
    encrypted = replace(plain, collect=HomomorphicEncryption())
    assert largest_message(encrypted, "a") > 3 * largest_message(plain, "a")


def test_the_bytes_of_a_secure_round_are_those_of_its_largest_cohort() -> None:
    names = [f"site-{i}" for i in range(12)]
    some = federation(collect=SecureAggregation(), sampling=Fixed(size=5))
    everybody = federation(collect=SecureAggregation())
    assert facts(some, "site-0", names).round_bytes == facts(everybody, "site-0", names[:5]).round_bytes
    secret = replace(some, entropy="system")
    assert facts(secret, "site-0", names).round_bytes == facts(everybody, "site-0", names).round_bytes


def test_the_bytes_of_a_secure_round_are_not_known_without_its_sites() -> None:
    assert facts(federation(collect=SecureAggregation()), "site-0").round_bytes is None


def test_requests_are_those_that_come() -> None:
    for parts in ({}, {"validate_at_sites": True}, {"start": LDA()}, {"collect": SecureAggregation()}):
        made = federation(**parts)
        told, asked = facts(made, "site-0"), {request.op for request, _ in replies(made)}
        assert {op.partition("/")[0] for op in asked} == told.work
        assert {op.partition("/")[2] for op in asked} - {""} == told.steps


def test_what_is_trained_is_named() -> None:
    told = facts(federation(), "site-0")
    names = dict(plain_task().build(0).named_parameters())
    assert told.tensors == tuple(names)
    assert told.shapes == tuple(tuple(tensor.shape) for tensor in names.values())
    assert told.parameters == sum(tensor.numel() for tensor in names.values())
    assert "batch=4" in told.training
    assert told.training.startswith("FedAvg, ")


def test_the_guarantee_is_named() -> None:
    bare = facts(federation(), "site-0")
    assert (bare.unit, bare.epsilon, bare.noise, bare.collect, bare.least) == (None, math.inf, None, "clear", 1)
    central = facts(federation(privacy=SiteLevel(clip=1.0, epsilon=3.0, delta=1e-6)), "site-0")
    assert (central.unit, central.epsilon, central.delta, central.noise) == ("site", 3.0, 1e-6, "coordinator")
    made = federation(privacy=ExampleLevel(clip=1.0, noise=1.0), entropy="system")
    own = facts(made, "site-0")
    assert (own.unit, own.epsilon, own.noise, own.secret) == ("example", math.inf, "site", True)
    assert not facts(replace(made, entropy="seed"), "site-0").secret  # of which the digest says nothing
    assert digest(made) == own.experiment == facts(replace(made, entropy="seed"), "site-0").experiment


def test_sums_are_named() -> None:
    masked = facts(federation(collect=SecureAggregation(least=4)), "site-0")
    assert (masked.collect, masked.least, masked.identities) == ("masks", 4, False)
    assert facts(federation(collect=SecureAggregation(identities=IDENTITIES)), "site-0").identities


@pytest.mark.parametrize(
    "parts", [{}, {"collect": SecureAggregation(), "validate_at_sites": True}], ids=["clear", "masks"]
)
def test_a_strict_policy_lets_the_run_pass_and_the_logs_have_every_byte(tmp_path: Path, parts: dict[str, Any]) -> None:
    made = replace(federation(**parts), rounds=2)
    policy = parse(POLICY.format(digest=digest(made), requests=[*facts(made, "site-0").work]))
    data = {name: SiteData(train=rows, validation=rows[:3]) for name, rows in site_data().items()}
    doors = {
        name: Door(policy, facts(made, name), Departures.open(tmp_path / name), lambda: datetime.now(UTC))
        for name in data
    }

    class Guarded:
        def handle(self, request: Request, site: Site) -> Reply:
            door = doors[site.id]
            assert door.refuse(request) is None
            reply = made.handle(request, site)
            door.leaving(request, reply)
            return reply

    reports = [report for _, report in run(made, Local(Guarded(), data.__getitem__, list(data)))]  # type: ignore[arg-type]
    lines = [line.entry for name in data for line in read(tmp_path / name)]
    empty = codec.size({}) * sum(not line.bytes for line in lines)  # a report counts the frame of nothing, too
    assert empty + sum(line.bytes for line in lines) == sum(report.bytes_up for report in reports) > 0
    assert [line.round for line in lines if line.op == "train"] == [1, 2] * 4
    again = Request(to="site-0", op="train", round=2)
    assert "train has been answered 2 times" in (doors["site-0"].refuse(again) or "")
