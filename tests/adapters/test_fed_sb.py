import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.learning.small_models import gpt2
from torch import nn
from torch.nn import functional

from fedelta.adapters.fed_sb import FedSB, first_step, initial_factors, mean_gradient
from fedelta.aggregation.mean import Mean
from fedelta.algorithms.algorithm import Incoming
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.sampling import All, Fixed
from fedelta.core import codec
from fedelta.core.errors import BadInput, TrainingFailed
from fedelta.core.examples import Examples
from fedelta.core.messages import Request, Update
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site, SiteData, run
from fedelta.core.seeds import derive
from fedelta.fleet.local import Local
from fedelta.learning.adapted import Adapted, Square, Squared
from fedelta.learning.batches import batches
from fedelta.learning.lora import LoRA, without_noise_of_peft
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD, AdamW, Cosine
from fedelta.learning.plan import Plan
from fedelta.learning.pretrained import Pretrained, tokenizer
from fedelta.learning.saving import save
from fedelta.learning.task import Task
from fedelta.learning.text import encode
from fedelta.learning.training import Training
from fedelta.privacy.example_level import ExampleLevel

PLAN = Plan().plain
LAYERS, HEAD = ("0", "2"), "4"
RANK, ALPHA = 3, 6.0
PREFIX = "base_model.model."


def small(seed=None):
    """Two layers with factors and a trained head; with a `seed`, its weights do not depend on that of the run."""
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        plain = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
        return LoRA(rank=RANK, alpha=ALPHA, targets=LAYERS).apply(plain)


def task(model=small):
    return Task(model=model, objective=Classification(classes=3))


def rows(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g)
    return Examples({"x": x}, (x @ torch.randn(6, 3, generator=torch.Generator().manual_seed(9))).argmax(1))


SITES = {"a": rows(12, 1), "b": rows(17, 2), "c": rows(5, 3)}


def federation(algorithm, **more):
    return Federation(algorithm=algorithm, **{"rounds": 5, "sampling": All(), "seed": 7, **more})


def states(program, sites=None):
    sites = SITES if sites is None else sites
    found = list(run(program, Local(program, sites.__getitem__, list(sites))))
    assert not any(report.absent for _, report in found)
    return found


class Dense:
    """The small model in float64: weights that are moved by s B R A, written out."""

    def __init__(self, module):
        own = {name: values.detach().double() for name, values in module.named_parameters()}
        self.weights = [own[f"{PREFIX}{name}.base_layer.weight"] for name in LAYERS]
        self.biases = [own[f"{PREFIX}{name}.base_layer.bias"] for name in LAYERS]
        self.head = [own[f"{PREFIX}{HEAD}.{part}"] for part in ("weight", "bias")]

    def loss(self, weights, head, examples):
        out = examples.inputs["x"].double()
        for weight, bias in zip(weights, self.biases, strict=True):
            out = torch.tanh(out @ weight.T + bias)
        return functional.cross_entropy(out @ head[0].T + head[1], examples.targets)

    def gradients(self, wanted, loss):
        return [values.detach() for values in torch.autograd.grad(loss, wanted)]


def leaves(tensors):
    return [values.detach().clone().requires_grad_(True) for values in tensors]


def dense_federation(module, cohorts, lr, batch, seed):
    """Fed-SB by the book: the products of the two layers and the head after the last of the `cohorts`."""
    dense, s = Dense(module), ALPHA / RANK
    total = sum(len(SITES[site]) for site in cohorts[0])
    step = [torch.zeros_like(weight) for weight in dense.weights]
    for site in cohorts[0]:
        weights = leaves(dense.weights)
        found = dense.gradients(weights, dense.loss(weights, dense.head, SITES[site]))
        for own, values in zip(step, found, strict=True):
            own -= lr * len(SITES[site]) / total * values
    factors = []
    for own in step:
        u, sigma, vh = torch.linalg.svd(own)
        factors.append((u[:, :RANK], torch.diag(sigma[:RANK]) / s, vh[:RANK]))
    learned = [*(r for _, r, _ in factors), *dense.head]
    for number, cohort in enumerate(cohorts[1:], start=2):
        total = sum(len(SITES[site]) for site in cohort)
        mean = [torch.zeros_like(values) for values in learned]
        for site in cohort:
            own = learned
            for chosen in batches(len(SITES[site]), batch, 2, None, derive(seed, number, site, "local")):
                own = leaves(own)
                moved = [
                    weight + s * b @ r @ a for weight, (b, _, a), r in zip(dense.weights, factors, own[:2], strict=True)
                ]
                found = dense.gradients(own, dense.loss(moved, own[2:], SITES[site][chosen]))
                own = [values.detach() - lr * slope for values, slope in zip(own, found, strict=True)]
            for values, end in zip(mean, own, strict=True):
                values += len(SITES[site]) / total * end
        learned = mean
    return [s * b @ r @ a for (b, _, a), r in zip(factors, learned[:2], strict=True)], learned[2:]


@pytest.mark.parametrize("sampling", [All(), Fixed(size=2)])
def test_a_federation_is_that_of_dense_matrices(sampling):
    """With sites that come late, and sites that miss rounds."""
    algorithm = FedSB(task=task(), training=Training(optimizer=SGD(lr=0.3), batch=4, epochs=2))
    program = federation(algorithm, sampling=sampling)
    found = states(program)
    parameters = algorithm.parameters(found[-1][0].algorithm)
    products, head = dense_federation(
        algorithm.task.build(7), [report.cohort for _, report in found], lr=0.3, batch=4, seed=7
    )
    for name, product in zip(LAYERS, products, strict=True):
        a, b = (parameters[f"{PREFIX}{name}.lora_{half}.default.weight"] for half in "AB")
        torch.testing.assert_close((ALPHA / RANK * b @ a).double(), product, rtol=1e-4, atol=1e-5)
    for part, values in zip(("weight", "bias"), head, strict=True):
        torch.testing.assert_close(parameters[f"{PREFIX}{HEAD}.{part}"].double(), values, rtol=1e-4, atol=1e-5)


def test_the_same_when_the_sites_evaluate_and_after_a_resume():
    algorithm = FedSB(task=task(), training=Training(optimizer=AdamW(lr=0.02), batch=4))
    expected = states(federation(algorithm))[-1][0]
    program = federation(algorithm, validate_at_sites=True, rounds=3)
    data = {name: SiteData(train=own, validation=own[:3]) for name, own in SITES.items()}
    fleet = Local(program, data.__getitem__, list(data))
    found = list(run(program, fleet))
    assert all(report.metrics["validation_loss"] > 0 and not report.unmeasured for _, report in found)
    longer = federation(algorithm)
    last = list(run(longer, fleet, found[1][0]))[-1][0]  # goes back by a round
    assert torch.equal(last.algorithm.parameters.vector, expected.algorithm.parameters.vector)


def test_before_there_are_factors_a_site_has_the_model_without():
    """As it is evaluated after a first round in which nobody was sampled."""
    algorithm = FedSB(task=task(), training=Training(optimizer=SGD(lr=0.3), batch=4))
    module = algorithm.task.build(7)
    shared, _ = algorithm.broadcast(algorithm.init(Parameters.of(module)), {"a": -1})
    site = Site(id="a", data=lambda: SiteData(train=SITES["a"]))
    incoming = Incoming(tensors=shared, round=1, base=-1, seed=7, local_seed=0, plan=PLAN)
    model, examples = algorithm.received(incoming, site, SITES["a"])
    with torch.no_grad():
        torch.testing.assert_close(model.module(examples.inputs["x"]), module(examples.inputs["x"]))


def test_it_learns():
    """And more than the head alone, which it trains besides."""
    algorithm = FedSB(task=task(), training=Training(optimizer=AdamW(lr=0.03), batch=4, epochs=2))
    losses = [report.metrics["train_loss"] for _, report in states(federation(algorithm, rounds=12))]
    assert losses[-1] < 0.5 * losses[0]


@settings(max_examples=30)
@given(
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rank=st.integers(1, 6),
    alpha=st.floats(0.5, 32),
    rslora=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_initial_factors_are_the_best_of_their_rank(sides, rank, alpha, rslora, transposed, seed):
    step = torch.randn(*sides, generator=torch.Generator().manual_seed(seed))
    layer = Adapted(layer="x", rank=rank, alpha=alpha, rslora=rslora, transposed=transposed)
    b, r, a = initial_factors(step.T if transposed else step, layer)
    assert b.shape == (sides[0], rank)
    assert r.shape == (rank, rank)
    assert a.shape == (rank, sides[1])
    s = alpha / (rank**0.5 if rslora else rank)
    u, sigma, vh = torch.linalg.svd(step.double())
    taken = min(rank, *sides)
    best = u[:, :taken] @ torch.diag(sigma[:taken]) @ vh[:taken]
    torch.testing.assert_close(s * b @ r @ a, best)
    torch.testing.assert_close(s * r.diagonal()[:taken], sigma[:taken])
    some = torch.diag((torch.arange(rank) < taken).double())
    torch.testing.assert_close(b.T @ b, some)
    torch.testing.assert_close(a @ a.T, some)


class Picture(nn.Module):
    """A convolution, and a layer that no input reaches."""

    def __init__(self):
        super().__init__()
        self.conv, self.idle, self.out = nn.Conv2d(2, 5, (2, 3)), nn.Linear(4, 4), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.conv(x).tanh().mean((2, 3)))


def test_the_gradient_is_that_of_the_plain_weights():
    """Of a convolution as a matrix; a layer that is not used has none."""
    torch.manual_seed(0)
    plain = Picture().double()
    x, y = torch.randn(7, 2, 4, 5), torch.arange(7) % 3
    found = torch.autograd.grad(functional.cross_entropy(plain(x.double()), y), plain.conv.weight)[0]

    def model():
        copy = Picture()
        copy.load_state_dict(plain.state_dict())
        return LoRA(rank=2, targets=("conv", "idle")).apply(copy)

    own = Task(model=model, objective=Classification(classes=3))
    algorithm = FedSB(task=own, training=Training(optimizer=SGD(lr=0.1), batch=3))
    flat = own.flat(0, PLAN)
    layout = algorithm._forms.weights
    gradient, sums = mean_gradient(flat, Examples({"x": x}, y), layout, own.objective, 3, PLAN)
    torch.testing.assert_close(gradient[f"{PREFIX}conv.base_layer.weight"].double(), found, rtol=1e-4, atol=1e-6)
    assert not gradient[f"{PREFIX}idle.base_layer.weight"].any()
    assert sums["examples"] == 7
    assert not any(values.requires_grad for name, values in flat.module.named_parameters() if "base_layer" in name)
    b, r, a = initial_factors(found, algorithm._forms.layers[f"{PREFIX}conv"])
    u, sigma, vh = torch.linalg.svd(found.flatten(1), full_matrices=False)
    torch.testing.assert_close(8.0 * b @ r @ a, u[:, :2] @ torch.diag(sigma[:2]) @ vh[:2])
    site = {"a": Examples({"x": x}, y)}
    losses = [report.metrics["train_loss"] for _, report in states(federation(algorithm, rounds=3), site)]
    assert losses[2] < losses[0]


def test_the_first_step_is_that_of_the_optimizer():
    values = torch.tensor([0.3, -2.0, 1e-3, -0.04])
    gradient = Parameters(Layout.of({"w": values}), values)
    adam = Training(optimizer=AdamW(lr=0.1, weight_decay=0.5), schedule=Cosine(rounds=4))
    torch.testing.assert_close(first_step(adam, gradient).vector, -0.1 * values.sign(), rtol=1e-4, atol=0)
    sgd = Training(optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=0.5))
    torch.testing.assert_close(first_step(sgd, gradient).vector, -0.1 * values)


def test_the_first_step_may_have_a_rate_of_its_own():
    """With SGD the model after round 1 is moved in proportion to it; R is learned at the other rate."""
    moved = []
    for lr, first in ((0.3, None), (0.3, 0.03), (0.6, 0.03)):
        training = Training(optimizer=SGD(lr=lr), batch=8)
        program = federation(FedSB(task=task(), training=training, first_lr=first), rounds=1)
        ((state, _),) = states(program)
        layer = next(iter(state.algorithm.fixed))
        name = layer.partition("lora_")[0]
        b, a = (state.algorithm.parameters[f"{name}lora_{part}.default.weight"] for part in "BA")
        moved.append(b @ a)
    torch.testing.assert_close(moved[1], 0.1 * moved[0])
    torch.testing.assert_close(moved[2], moved[1])


def test_what_travels():
    """The gradient once, B and A once to each site, and then R and the head."""
    algorithm = FedSB(task=task(), training=Training(optimizer=SGD(lr=0.3), batch=4))
    first, later = (state.algorithm for state, _ in states(federation(algorithm, rounds=2)))
    begin = algorithm.init(Parameters.of(algorithm.task.build(7)))
    head = 3 * 8 + 3
    assert algorithm.layout(begin, "a").size == 6 * 10 + 10 * 8
    assert algorithm.broadcast(begin, {"a": -1})[0]["learned"].numel() == head
    assert algorithm.broadcast(begin, {"a": -1})[1] == {}
    for state in (first, later):
        assert algorithm.layout(state, "a").size == 2 * RANK * RANK + head
    shared, own = algorithm.broadcast(later, {"new": -1, "from-round-1": 1, "known": 2})
    assert shared["learned"].numel() == 2 * RANK * RANK + head
    assert {party: body["fixed"].numel() for party, body in own.items()} == dict.fromkeys(
        ("new", "from-round-1"), RANK * (10 + 6 + 8 + 10)
    )
    update = Update(values=Parameters.zeros(algorithm.layout(later, "a")), sums={"loss": 1.0})
    assert codec.size(update.to_tensors()) < 4 * update.values.layout.size + 500


@settings(max_examples=20)
@given(weights=st.lists(st.integers(1, 100), min_size=1, max_size=5), rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_mean_of_r_is_that_of_the_products(weights, rank, seed):
    g = torch.Generator().manual_seed(seed)
    b, a = torch.randn(7, rank, generator=g).double(), torch.randn(rank, 6, generator=g).double()
    matrices = [torch.randn(rank, rank, generator=g) for _ in weights]
    layout = Layout.of({"r": matrices[0]})
    updates = [
        Update(values=Parameters(layout, r.flatten()), weight=float(w)) for r, w in zip(matrices, weights, strict=True)
    ]
    mean = Mean()(iter(updates), len(updates)).values["r"].double()
    exact = sum(w / sum(weights) * b @ r.double() @ a for r, w in zip(matrices, weights, strict=True))
    torch.testing.assert_close(b @ mean @ a, exact, rtol=1e-5, atol=1e-5)


def test_with_public_examples_a_site_gives_nobody_a_gradient_without_noise(caplog):
    """A coordinator that keeps the factors back would get it in the place of steps of DP-SGD."""
    algorithm = FedSB(task=task(lambda: small(4)), training=Training(optimizer=SGD(lr=0.1), batch=4), public=rows(9, 5))
    program = federation(algorithm, privacy=ExampleLevel(clip=1.0, noise=1.0))
    shared, own = program.broadcast(program.begun(program.init(), list(SITES)), list(SITES))
    site = Site(id="a", data=lambda: SiteData(train=SITES["a"]))
    body = program.handle(Request(to="a", op="train", round=1, shared=shared, body=own["a"]), site).body
    assert body["difference"].shape == shared["learned"].shape
    learned = shared["learned"][: len(shared["learned"]) - sum(RANK * RANK for _ in LAYERS)]
    with pytest.raises(TrainingFailed):
        program.handle(Request(to="a", op="train", round=1, shared={**shared, "learned": learned}), site)
    assert "lacks the factors" in caplog.text


def test_public_examples_give_the_factors_of_round_1():
    """Where they are those of the only site; and nothing of the site is sent for it."""
    training = Training(optimizer=SGD(lr=0.3), batch=4)
    model = task(lambda: small(seed=5))
    private, public = FedSB(task=model, training=training), FedSB(task=model, training=training, public=SITES["a"])
    only = {"a": SITES["a"]}
    state, released = states(federation(private, rounds=1), only)[0]
    expected = state.algorithm
    found = federation(public).init().algorithm
    assert torch.equal(found.fixed.vector, expected.fixed.vector)
    assert torch.equal(found.parameters.vector, expected.parameters.vector)
    assert public.layout(found, "a") == private.layout(expected, "a")
    assert public.broadcast(found, {"a": -1})[1].keys() == {"a"}
    state, report = states(federation(public, rounds=1), only)[0]
    assert not torch.equal(state.algorithm.learned.vector, found.learned.vector)
    assert report.bytes_up < released.bytes_up - 250  # the gradient is 4 * 140, and R and the head are 4 * 45


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_what_is_saved_is_loaded_by_peft_and_predicts_the_same(request, tmp_path, family):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    folder = request.getfixturevalue(family)
    own = Task(
        model=Pretrained(source=str(folder), labels=("bad", "good"), tuning=LoRA(rank=3)),
        objective=Classification(classes=2),
    )
    texts = ["a good film", "a bad story", "the plot was very dull", "not bad"] * 2
    data = encode(texts, [1, 0, 0, 1] * 2, tokenizer(str(folder)), 12)
    algorithm = FedSB(task=own, training=Training(optimizer=AdamW(lr=0.03), batch=4))
    program = federation(algorithm, rounds=3)
    state = states(program, {"a": data, "b": data[:4]})[-1][0]
    with_r = algorithm._local.build(7)
    state.algorithm.learned.load(with_r)
    for name, values in state.algorithm.fixed.items():
        with_r.get_parameter(name).data.copy_(values)
    with torch.no_grad():
        expected = with_r.eval()(**data.inputs).logits
    save(program.model(state), tmp_path / "out")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=0)
    with torch.no_grad(), without_noise_of_peft():
        found = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()(**data.inputs).logits
        start = own.build(7).eval()(**data.inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (start - expected).abs().max() > 1e-2


def test_squared_on_conv1d_computes_the_product():
    torch.manual_seed(0)
    module = Squared(model=lambda: LoRA(rank=2, targets=("c_attn",)).apply(gpt2()))().eval()
    layer = f"{PREFIX}transformer.h.0.attn.c_attn"
    part, names = module.get_submodule(layer), Square(layer)
    own = dict(module.named_parameters())
    trained = {name for name, values in own.items() if values.requires_grad and "lora" in name}
    assert trained == {Square(name.removesuffix(".lora_A.default.weight")).r for name in own if "lora_A" in name}
    a, r, b = own[names.a], own[names.r], own[names.b]
    for values in (r, b):
        nn.init.normal_(values)
    x = torch.randn(5, 16)
    with torch.no_grad():
        found = part(x) - part.base_layer(x)
    torch.testing.assert_close(found, 8.0 * x @ (b @ r @ a).detach().T, rtol=1e-4, atol=1e-4)


def test_what_cannot_work_is_refused():
    training = Training(optimizer=SGD(lr=0.3), batch=4)
    with pytest.raises(BadInput, match="depends on the run's seed"):
        federation(FedSB(task=task(), training=training, public=SITES["a"])).init()
    with pytest.raises(BadInput, match="no public examples"):
        FedSB(task=task(), training=training, public=SITES["a"][:0])
    with pytest.raises(BadInput, match="no factors of LoRA"):
        FedSB(task=task(lambda: nn.Linear(6, 3)), training=training)

    def started():
        module = small()
        nn.init.ones_(module.get_parameter(f"{PREFIX}0.lora_B.default.weight"))
        return module

    with pytest.raises(BadInput, match="add something already"):
        FedSB(task=task(started), training=training)

    def embedded():
        plain = nn.Sequential(nn.Embedding(6, 10), nn.Linear(10, 3))
        return LoRA(rank=2, targets=("0",)).apply(plain)

    with pytest.raises(BadInput, match="is an embedding"):
        FedSB(task=task(embedded), training=training)
