import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.algorithms.small_task import plain_task, site_data
from tests.algorithms.small_task import task as normalised_task
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from fedelta.adapters.fedkseed import FedKSeed, _Walk, fill, rebuilt
from fedelta.algorithms.algorithm import Incoming
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.sampling import Fixed
from fedelta.core import codec
from fedelta.core.errors import BadInput, TooFewSites
from fedelta.core.examples import Examples
from fedelta.core.messages import Update
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site, SiteData, run
from fedelta.core.seeds import derive, generator
from fedelta.fleet.local import Local
from fedelta.learning.batches import batches
from fedelta.learning.closed_form import Ridge
from fedelta.learning.lora import LoRA
from fedelta.learning.objectives import Classification, Regression
from fedelta.learning.optimizers import SGD, AdamW, Exponential
from fedelta.learning.plan import Plan
from fedelta.learning.pretrained import Pretrained, tokenizer
from fedelta.learning.saving import load, save
from fedelta.learning.task import Task
from fedelta.learning.text import encode
from fedelta.learning.training import Training
from fedelta.learning.tuning import Full
from fedelta.privacy.site_level import SiteLevel

PLAN = Plan().plain
SITES = site_data(3)


def algorithm(task=None, **more):
    training = more.pop("training", Training(optimizer=SGD(lr=0.02), batch=4, epochs=2))
    return FedKSeed(task=task or plain_task(), training=training, **{"candidates": 32, **more})


def states(program, sites=None):
    sites = SITES if sites is None else sites
    found = list(run(program, Local(program, sites.__getitem__, list(sites))))
    assert not any(report.absent for _, report in found)
    return found


def directions(seed, candidates, size):
    """All of them, [candidates, size], without the code under test: one stream each, in pieces of 65,536."""
    rows = []
    for index in range(candidates):
        stream = generator(seed, "direction", index)
        sizes = [min(2**16, size - first) for first in range(0, size, 2**16)]
        rows.append(torch.cat([torch.empty(part).normal_(generator=stream) for part in sizes]))
    return (torch.stack(rows) * 2**16).round() / 2**16


def test_directions_are_gaussian_and_independent_of_threads():
    z = torch.empty(3, 70_000)
    for row in range(3):
        fill(z[row], 1, row)
    assert torch.equal(z, directions(1, 3, 70_000))
    torch.testing.assert_close(z.double() @ z.double().T / 70_000, torch.eye(3).double(), rtol=0, atol=0.03)
    assert abs(float((z.abs() < 1).double().mean()) - 0.6827) < 0.01
    threads, other = torch.get_num_threads(), torch.empty(70_000)
    try:
        torch.set_num_threads(1 + threads % 2)
        fill(other, 1, 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(other, z[2])
    fill(other, 2, 2)
    assert not torch.equal(other, z[2])


@settings(max_examples=20)
@given(size=st.integers(1, 40), candidates=st.integers(1, 9), seed=st.integers(0, 99))
def test_weights_are_the_start_and_the_directions(size, candidates, seed):
    """Whatever was there before, to the last bit; and in float64 by a product of matrices."""
    g = torch.Generator().manual_seed(seed)
    task = plain_task()
    layout = Layout.of({"w": torch.empty(size)}, {"buffer": torch.empty(2)})
    start = Parameters(layout, torch.randn(size + 2, generator=g))
    scalars = torch.randn(candidates, generator=g) * (torch.rand(candidates, generator=g) < 0.7)
    found = rebuilt(task, start, scalars, seed)
    exact = start.trained.double() + scalars.double() @ directions(seed, candidates, size).double()
    torch.testing.assert_close(found.trained.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.buffers, start.buffers)
    rebuilt(task, start, scalars + 1, seed)
    again = rebuilt(task, start, scalars.clone(), seed)
    assert again is not found
    assert torch.equal(again.vector, found.vector)
    assert rebuilt(task, start, scalars, seed) is again
    assert not torch.equal(rebuilt(task, start, scalars, seed + 1).trained, found.trained) or not scalars.any()
    few = scalars * (torch.arange(candidates) == 0)
    rebuilt(task, start, few, seed)  # fewer draws from here than from the start, and the other way round
    assert torch.equal(rebuilt(task, start, scalars, seed).vector, found.vector)
    other = start.like(start.vector + 1)
    assert torch.equal(rebuilt(task, other, scalars, seed).buffers, other.buffers)
    assert candidates == 1 or not torch.equal(rebuilt(task, start, scalars + 1, seed).vector, found.vector)


@settings(max_examples=10)
@given(seed=st.integers(0, 99), regression=st.booleans())
def test_the_slope_is_that_of_the_gradient(seed, regression):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(9, 6, generator=g), torch.randint(0, 3, (9,), generator=g)
    if regression:
        y = torch.randn(9, 3, generator=g)
    task = Task(
        model=lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        objective=Regression() if regression else Classification(classes=3),
    )
    model = task.flat(seed, PLAN)
    at = Parameters.of(task.build(seed))
    z = torch.randn(at.layout.trained, generator=g)
    wide = {name: values.double().requires_grad_(True) for name, values in at.items()}
    outputs = functional_call(task.build(seed).double(), wide, (x.double(),))
    loss = functional.mse_loss(outputs, y.double()) if regression else functional.cross_entropy(outputs, y)
    gradient = torch.cat([found.flatten() for found in torch.autograd.grad(loss, list(wide.values()))])
    walk = _Walk(model=model, objective=task.objective, plan=PLAN, epsilon=1e-3)
    slope, sums = walk.slope(at, z, Examples({"x": x}, y))
    assert slope == pytest.approx(float(gradient @ z.double()), rel=1e-2, abs=2e-3)
    assert sums["examples"] == 9
    assert sums["loss"] / 9 == pytest.approx(float(loss.detach()), rel=1e-4)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_one_site_by_hand(clip):
    """Three rounds of steps, one after the other, on weights that are moved in place of being rebuilt."""
    data = SITES["site-1"]
    training = Training(
        optimizer=SGD(lr=0.02), batch=5, epochs=None, steps=7, clip=clip, schedule=Exponential(decay=0.5)
    )
    own = algorithm(training=training, seed=3)
    program = Federation(algorithm=own, rounds=3, seed=11)
    state, report = states(program, {"site-1": data})[-1]
    module = own.task.build(11)
    z = directions(3, 32, Parameters.of(module).layout.trained)
    weights = Parameters.of(module).vector.double()
    names = dict(module.named_parameters())

    def loss(vector, rows):
        parts = vector.split([values.numel() for values in names.values()])
        tensors = {name: part.view(names[name].shape) for name, part in zip(names, parts, strict=True)}
        outputs = functional_call(module.double(), tensors, (data.inputs["x"][rows].double(),))
        return functional.cross_entropy(outputs, data.targets[rows])

    for number in (1, 2, 3):
        seed = derive(11, number, "site-1", "local")
        choices = generator(seed, "candidates")
        for rows in batches(len(data), 5, None, 7, seed):
            direction = z[int(torch.randint(32, (), generator=choices))].double()
            with torch.no_grad():
                slope = (loss(weights + 1e-3 * direction, rows) - loss(weights - 1e-3 * direction, rows)) / 2e-3
            step = slope * direction
            if clip is not None:
                step *= min(1.0, clip / float(step.norm()))
            weights -= 0.02 * 0.5 ** (number - 1) * step
    torch.testing.assert_close(own.parameters(state.algorithm).vector.double(), weights, rtol=1e-3, atol=1e-4)
    assert report.metrics["train_loss"] > 0


def incoming_to(own, site, state, round, seed=11):
    shared, bodies = own.broadcast(state, {site: -1})
    tensors = {**shared, **bodies.get(site, {})}
    return Incoming(tensors=tensors, round=round, base=-1, seed=seed, local_seed=round, plan=PLAN)


def test_the_mean_of_the_scalars_is_that_of_the_models():
    own = algorithm()
    state = own.init(Parameters.of(own.task.build(11)))
    updates = []
    for name, data in SITES.items():
        site = Site(id=name, data=lambda data=data: SiteData(train=data))
        updates.append(own.local(incoming_to(own, name, state, 1), site))
    ends = [own.parameters(own.step(state, update, 1)).vector.double() for update in updates]
    weights = [update.weight for update in updates]
    exact = sum(weight / sum(weights) * end for weight, end in zip(weights, ends, strict=True))
    total = own.rule(iter(updates), len(updates))
    found = own.parameters(own.step(state, total, 1)).vector
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert (found - state.start.vector).abs().max() > 1e-2


@pytest.mark.parametrize("privacy", [None, SiteLevel(clip=1.0, noise=1.0)])
def test_under_a_guarantee_for_sites_it_is_not_told_that_training_diverged(privacy):
    first = next(iter(SITES))
    wild = Examples.of((SITES[first].inputs["x"] * 1e30, SITES[first].targets))
    program = Federation(algorithm=algorithm(), rounds=1, privacy=privacy)
    [(state, report)] = run(program, Local(program, {**SITES, first: wild}.__getitem__, list(SITES)))
    assert list(report.absent) == ([first] if privacy is None else [])
    assert program.algorithm.parameters(state.algorithm).vector.isfinite().all()


def test_a_round_is_less_than_20_kB_for_a_model_of_any_size():
    task = Task(
        model=lambda: nn.Sequential(nn.Linear(6, 3000), nn.Linear(3000, 3)), objective=Classification(classes=3)
    )
    own = FedKSeed(task=task, training=Training(optimizer=SGD(lr=1e-4), batch=10))
    state = own.init(Parameters.of(task.build(0)))
    site = Site(id="site-0", data=lambda: SiteData(train=SITES["site-0"]))
    update = own.local(incoming_to(own, "site-0", state, 1, seed=0), site)
    assert codec.size(update.to_tensors()) < 20_000
    assert update.values.layout == own.layout(state, "site-0")
    assert codec.size(own.broadcast(state, {"site-0": 4})[0]) < 20_000
    assert own.broadcast(state, {"site-0": 4})[1] == {}


@pytest.mark.parametrize("sampling", [None, Fixed(size=1)])
def test_after_round_zero_all_have_the_head_that_it_gave(sampling):
    """To the last bit, whenever a site comes for the first time."""
    more = {} if sampling is None else {"sampling": sampling}
    own = algorithm()
    program = Federation(algorithm=own, rounds=6, start=Ridge(), seed=11, **more)
    sites = {
        name: Site(id=name, data=lambda data=data: SiteData(train=data, validation=data))
        for name, data in SITES.items()
    }
    fleet = Local(program, lambda name: sites[name].data(), list(sites))
    built, seen = Parameters.of(own.task.build(11)), set()
    for state, report in run(program, fleet):
        if report.round == 0:
            assert not torch.equal(state.algorithm.start["2.weight"], built["2.weight"])
            assert torch.equal(state.algorithm.start["0.weight"], built["0.weight"])
        expected = own.parameters(state.algorithm)
        for name in SITES:
            base = state.bases.get(name, -1)
            shared, bodies = own.broadcast(state.algorithm, {name: base})
            assert (name in bodies) == (base < 0)
            seen |= {name} if base >= 0 else set()
            if base < 0:
                incoming = Incoming(
                    tensors={**shared, **bodies[name]}, round=9, base=-1, seed=11, local_seed=0, plan=PLAN
                )
                model, _ = own.received(incoming, sites[name], SITES[name])
                assert torch.equal(model.read().vector, expected.vector)
    assert len(seen) >= 2


def test_sites_and_coordinator_evaluate_the_same_model():
    data = SITES["site-2"]
    program = Federation(
        algorithm=algorithm(),
        rounds=4,
        start=Ridge(),
        seed=11,
        test=data,
        validate_at_sites=True,
        sampling=Fixed(size=1),
    )
    sites = {"site-2": SiteData(train=data, validation=data), "other": SiteData(train=SITES["site-0"])}
    for _, report in run(program, Local(program, sites.__getitem__, list(sites))):
        assert report.metrics["test_loss"] == report.metrics["validation_loss"]


@pytest.mark.parametrize("kind", ["full", "lora", "batch norm and dropout"])
def test_it_learns(kind):
    def with_factors():
        return LoRA(rank=2, targets=("0",)).apply(plain_task().model())

    tasks = {
        "full": plain_task(),
        "lora": Task(model=with_factors, objective=Classification(classes=3)),
        "batch norm and dropout": normalised_task(),
    }
    rate = 0.004 if kind == "lora" else 0.03  # a product of two factors that both move is less smooth
    own = algorithm(tasks[kind], candidates=64, training=Training(optimizer=SGD(lr=rate), batch=8, epochs=12))
    found = states(Federation(algorithm=own, rounds=4, seed=2))
    losses = [report.metrics["train_loss"] for _, report in found]
    assert losses[-1] < 0.8 * losses[0]
    start, end = found[0][0].algorithm.start, own.parameters(found[-1][0].algorithm)
    assert torch.equal(start.buffers, end.buffers)  # statistics are not learned


def test_what_is_saved_is_the_model(bert, tmp_path):
    texts = ["a good film", "a bad story", "the plot was very dull", "not bad"]
    data = encode(texts, [1, 0, 0, 1], tokenizer(str(bert)), 12)
    task = Task(
        model=Pretrained(source=str(bert), labels=("bad", "good"), tuning=Full()), objective=Classification(classes=2)
    )
    own = algorithm(task, candidates=8, training=Training(optimizer=SGD(lr=1e-3), batch=2, epochs=3))
    program = Federation(algorithm=own, rounds=2, start=Ridge(), test=data)
    state, report = states(program, {"a": data, "b": data[:2]})[-1]
    save(program.model(state), tmp_path / "out")
    with torch.no_grad():
        found = load(tmp_path / "out")(**data.inputs).logits
        start = task.build(0).eval()(**data.inputs).logits
    assert float(functional.cross_entropy(found, data.targets)) == pytest.approx(report.metrics["test_loss"], rel=1e-4)
    assert (found - start).abs().max() > 1e-2


def test_what_cannot_work_is_refused():
    for optimizer in (AdamW(lr=0.1), SGD(lr=0.1, momentum=0.9), SGD(lr=0.1, weight_decay=0.1)):
        with pytest.raises(BadInput, match="use SGD"):
            algorithm(training=Training(optimizer=optimizer))
    with pytest.raises(BadInput, match="candidates must be >= 1, got 0"):
        algorithm(candidates=0)
    with pytest.raises(BadInput, match="epsilon must be > 0 and finite, got nan"):
        algorithm(epsilon=float("nan"))
    wild = Federation(algorithm=algorithm(training=Training(optimizer=SGD(lr=1e4), batch=4)), rounds=1)
    with pytest.raises(TooFewSites, match=r"lower (the learning rate|it)"):
        states(wild)
    with pytest.raises(BadInput, match="gone too far"):
        rebuilt(plain_task(), Parameters.of(plain_task().build(0)), torch.full((300,), -1.0), 0)
    half = Federation(algorithm=algorithm(), rounds=1, plan=Plan(bf16=True))
    with pytest.raises(TooFewSites, match="without bf16"):
        states(half)


def test_updates_have_the_form_that_a_federation_expects():
    own = algorithm()
    state = own.init(Parameters.of(own.task.build(11)))
    site = Site(id="site-0", data=lambda: SiteData(train=SITES["site-0"]))
    update = own.local(incoming_to(own, "site-0", state, 1), site)
    read = Update.from_tensors(update.to_tensors(), own.layout(state, "site-0"))
    assert read.kind == own.kind
    assert read.sums["steps"] == 6  # two epochs of 11 rows in batches of 4
    assert read.sums["examples"] == 22
