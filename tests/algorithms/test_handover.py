"""What sites are handed at the end of a run, and what a request for that can do."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import dense_lora
from tests.algorithms.small_task import plain_task, site_data, task
from torch import nn

from fedelta.adapters.fedex_lora import FedExLoRA
from fedelta.adapters.fedsa_lora import FedSALoRA
from fedelta.adapters.hetlora import HetLoRA
from fedelta.algorithms import handover
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.state import FederationState
from fedelta.core.errors import BadTensors
from fedelta.core.messages import Reply, Request
from fedelta.core.parameters import Parameters
from fedelta.core.program import Site, SiteData, run
from fedelta.fleet.answer import Sites, answer
from fedelta.fleet.local import Local
from fedelta.learning.optimizers import SGD
from fedelta.learning.task import Task
from fedelta.learning.training import Training
from fedelta.secure.aggregation import SecureAggregation

DATA = site_data()
NAMES = [*DATA]
SIZE = Parameters.of(task().build(0)).layout.size


@dataclass
class Kept:
    """What `Site.keep` was given."""

    models: list[tuple[nn.Module, int]] = field(default_factory=list)

    def __call__(self, model: nn.Module, round: int) -> None:
        self.models.append((model, round))


def federation(own: Task | None = None, **options: Any) -> Federation[Any]:
    algorithm = FedAvg(task=own or task(), training=Training(optimizer=SGD(lr=0.1), batch=4))
    return Federation(algorithm=algorithm, rounds=2, seed=3, **options)


def ended(
    program: Federation[Any], load: Callable[[str], Any], names: list[str], spill: Path | None = None
) -> FederationState[Any]:
    *_, (state, _) = run(program, Local(program, load, names, spill=spill))
    return state


def asked(program: Federation[Any], state: FederationState[Any], names: list[str]) -> list[Request]:
    return list(handover.requests(program.algorithm, state, names))


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def handed(program: Federation[Any], request: Request, site: Site) -> nn.Module:
    kept = Kept()
    site.keep = kept
    given = dict(site.given)
    assert answer(program, request, site) == Reply.to_request(request, {})
    assert site.given == given
    ((model, round),) = kept.models
    assert round == request.round
    return model


@pytest.mark.parametrize("masks", [False, True])
def test_every_site_is_handed_the_model_of_the_coordinator(masks: bool) -> None:
    program = federation(plain_task(), collect=SecureAggregation()) if masks else federation()
    state = ended(program, DATA.__getitem__, NAMES)
    start = program.model(program.init())
    for request in asked(program, state, NAMES):
        site = Site(id=request.to, data=lambda: pytest.fail("the global model needs no data"))
        model = handed(program, request, site)
        assert same(model, program.model(state))
        assert not same(model, start)


@pytest.mark.parametrize("method", [HetLoRA, FedExLoRA])
def test_a_site_of_a_lower_rank_or_without_the_moved_base_gets_all_of_it(method: Any) -> None:
    options = {"ranks": {"phone": 2}} if method is HetLoRA else {}
    program = dense_lora.federation(method(task=dense_lora.task(), training=dense_lora.training(), **options))
    state = ended(program, dense_lora.data, list(dense_lora.NAMES))
    for request in asked(program, state, ["phone-1", "new"]):
        site = Site(id=request.to, data=lambda: dense_lora.data("phone-1"))
        assert same(handed(program, request, site), program.model(state))


def test_of_a_personal_model_each_site_gets_its_own(tmp_path: Path) -> None:
    program = dense_lora.federation(FedSALoRA(task=dense_lora.task(), training=dense_lora.training()))
    names = list(dense_lora.NAMES)
    state = ended(program, dense_lora.data, names, tmp_path)
    sites, models = Sites(dense_lora.data, tmp_path), []
    for request in asked(program, state, names):
        model = handed(program, request, sites.of(request))
        assert same(model, program.model_at(state, sites.of(request)))
        models.append(model)
    assert not any(same(models[0], other) for other in models[1:])
    first = {name: value.clone() for name, value in models[0].state_dict().items()}
    ended(program, dense_lora.data, names)  # the working copy goes on to be used
    assert all(torch.equal(value, models[0].state_dict()[name]) for name, value in first.items())


def test_sites_that_keep_none_are_named() -> None:
    program = federation()
    fleet = Local(program, DATA.__getitem__, NAMES)
    *_, (state, _) = run(program, fleet)
    assert program.hand_over(state, fleet) == dict.fromkeys(NAMES, "this site keeps no model")


def test_each_time_it_is_another_request() -> None:
    program = federation()
    state = program.init()
    assert asked(program, state, ["a"])[0].id != asked(program, state, ["a"])[0].id


@pytest.mark.parametrize(
    ("shared", "why"),
    [
        ({}, "lacks 'parameters'"),
        ({"parameters": torch.zeros(3)}, "1-D and has"),
        ({"parameters": torch.zeros(10, 10)}, "1-D and has"),
        ({"parameters": torch.zeros(SIZE, dtype=torch.int64)}, "floating-point"),
    ],
)
def test_a_request_that_does_not_fit_leaves_what_is_there(shared: dict[str, torch.Tensor], why: str) -> None:
    program, kept = federation(), Kept()
    site = Site(id="a", data=lambda: SiteData.of(DATA["site-0"]), keep=kept)
    (request,) = asked(program, program.init(), ["a"])
    with pytest.raises(BadTensors, match=why):
        program.handle(replace(request, shared=shared), site)
    assert kept.models == []


def test_what_goes_wrong_on_its_disk_is_for_the_site_alone(caplog: pytest.LogCaptureFixture) -> None:
    def refuses(model: nn.Module, round: int) -> None:
        raise OSError("no space left in /home/someone")

    program = federation()
    (request,) = asked(program, program.init(), ["a"])
    reply = answer(program, request, Site(id="a", data=lambda: SiteData.of(DATA["site-0"]), keep=refuses))
    assert reply.error == "it could not keep its model; why is in its own log"
    assert "a has not kept its model: no space left in /home/someone" in caplog.text


def test_in_the_middle_of_a_run_it_changes_nothing(tmp_path: Path) -> None:
    whole = dense_lora.federation(FedSALoRA(task=dense_lora.task(), training=dense_lora.training()))
    names = list(dense_lora.NAMES)
    undisturbed = ended(whole, dense_lora.data, names)
    fleet, state = Local(whole, dense_lora.data, names, spill=tmp_path), whole.init()
    for state, _ in run(whole, fleet):
        assert whole.hand_over(state, fleet).keys() == {*names}
        for request in asked(whole, state, names):
            handed(whole, request, Sites(dense_lora.data, tmp_path).of(request))
    assert torch.equal(state.algorithm.vector, undisturbed.algorithm.vector)
