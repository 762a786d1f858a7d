"""DP-SGD against plain training, and against the statistics that it claims."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from scipy import stats
from tests.learning.plain_nets import cnn, mlp
from torch import Tensor, nn
from torch.nn import functional

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.noise import SeededNoise
from fedelta.learning.dp_sgd import PrivateSteps, number_of_steps, sampling_rate, train_private
from fedelta.learning.flat import FlatModel
from fedelta.learning.objectives import Classification, LanguageModel, Regression
from fedelta.learning.optimizers import SGD, AdamW
from fedelta.learning.plan import Plan
from fedelta.learning.training import Training, proximal_term, train

PLAIN = Plan().plain
CLASSES = Classification(classes=3)


class TestTraining:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("optimizer", [SGD(lr=0.1, momentum=0.9), AdamW(lr=0.01)])
    def test_without_noise_and_bound_it_is_plain_training_on_all_rows(
        self, optimizer: SGD | AdamW, channels_last: bool
    ) -> None:
        torch.manual_seed(0)
        net = cnn()
        examples = Examples({"x": torch.randn(12, 2, 10, 10)}, torch.arange(12) % 3)
        training = Training(optimizer=optimizer, batch=12, epochs=3)
        plan = Plan(cohort=1, channels_last=channels_last)
        private, plain = FlatModel(net, channels_last=channels_last), None
        start = private.read()
        term = proximal_term(private, 0.1)
        sums = self._train(private, examples, training, 1e9, 0.0, plan=plan, penalty=term)
        assert sums == {"steps": 3.0}
        found = private.read().vector
        plain = private
        plain.load(start)
        train(plain, examples, CLASSES, training, plan, round=1, seed=0, penalty=proximal_term(plain, 0.1))
        torch.testing.assert_close(found, plain.read().vector, rtol=1e-4, atol=1e-5)

    def test_tokens_of_a_row_count_as_one(self) -> None:
        """A row's loss is the mean over its own tokens; a row without targets adds nothing."""
        torch.manual_seed(0)

        class Tagger(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words, self.head = nn.Embedding(20, 4), nn.Linear(4, 20)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.head(self.words(x))
                return out

        x = torch.randint(0, 20, (4, 6))
        targets = x.clone()
        targets[0, 3:] = -100
        targets[3] = -100
        model = FlatModel(Tagger())
        before = model.read().vector
        losses = [functional.cross_entropy(model.module(x[i]), targets[i]) for i in range(3)]
        found = [torch.autograd.grad(loss, list(model.module.parameters())) for loss in losses]
        each = torch.stack([torch.cat([g.flatten() for g in one]) for one in found])
        total = (each * (0.1 / each.norm(dim=1, keepdim=True)).clamp(max=1.0)).sum(0)
        training = Training(optimizer=SGD(lr=1.0), batch=4, epochs=None, steps=1)
        self._train(model, Examples({"x": x}, targets), training, 0.1, 0.0, objective=LanguageModel(shift=False))
        torch.testing.assert_close(model.read().vector, before - total / 4, rtol=1e-4, atol=1e-6)

    def test_an_empty_batch_is_a_step_of_noise(self) -> None:
        model = FlatModel(mlp())
        before = model.read().vector
        examples = Examples({"x": torch.randn(5, 6)}, torch.arange(5) % 3)
        training = Training(optimizer=SGD(lr=1.0), batch=2, epochs=None, steps=3)
        noise = Nobody()
        assert self._train(model, examples, training, 1.0, 2.0, noise=noise) == {"steps": 3.0}
        assert noise.std == 2.0
        torch.testing.assert_close(model.read().vector, before - 3 * 1.0 / (5 / 3))  # noise of 1; 5 rows in 3 batches

    def test_the_same_seeds_give_the_same_weights_and_dropout_is_drawn(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 30), nn.Dropout(0.5), nn.Linear(30, 3))
        model = FlatModel(net)
        start = model.read()
        examples = Examples({"x": torch.randn(20, 6)}, torch.arange(20) % 3)
        training = Training(optimizer=SGD(lr=1.0), batch=10, epochs=2)
        found = []
        for seed in (1, 1, 2):
            model.load(start)
            self._train(model, examples, training, 1.0, 0.0, seed=seed)
            found.append(model.read().vector)
        assert torch.equal(found[0], found[1])
        assert not torch.allclose(found[0], found[2])

    def test_steps_and_rates(self) -> None:
        training = Training(optimizer=SGD(lr=1.0), batch=10, epochs=3)
        assert [sampling_rate(n, training) for n in (5, 10, 11, 40)] == [1.0, 1.0, 0.5, 0.25]
        assert [number_of_steps(n, training) for n in (5, 10, 11, 40)] == [3, 3, 6, 12]
        assert number_of_steps(99, replace(training, epochs=None, steps=7)) == 7

    @pytest.mark.parametrize(
        ("net", "change", "plan", "sentence"),
        [
            (nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), {}, PLAIN, "BatchNorm"),
            (mlp(), {"clip": 1.0}, PLAIN, "Training.clip"),
            (mlp(), {}, replace(PLAIN, bf16=True), "bf16"),
            (nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(),
                           nn.Linear(6, 3)), {}, PLAIN, "buffer"),
        ],
        ids=["batch norm", "clip", "bf16", "statistics"],
    )  # fmt: skip
    def test_what_does_not_hold_is_refused(
        self, net: nn.Module, change: dict[str, float], plan: Plan, sentence: str
    ) -> None:
        examples = Examples({"x": torch.randn(8, 6)}, torch.arange(8) % 3)
        training = replace(Training(optimizer=SGD(lr=0.1), batch=4), **change)
        with pytest.raises(BadInput, match=sentence):
            self._train(FlatModel(net), examples, training, 1.0, 0.0, plan=plan)

    def test_no_examples_and_bad_settings_are_refused(self) -> None:
        training = Training(optimizer=SGD(lr=0.1), batch=4)
        with pytest.raises(BadInput, match="no training examples"):
            self._train(FlatModel(mlp()), Examples({"x": torch.zeros(0, 6)}, torch.arange(0)), training, 1.0, 0.0)
        for clip, noise in ((0.0, 1.0), (math.inf, 1.0), (math.nan, 1.0), (1.0, -1.0), (1.0, math.nan)):
            with pytest.raises(BadInput):
                PrivateSteps(clip=clip, noise=noise)

    def _train(
        self, model: FlatModel, examples: Examples, training: Training, clip: float, std: float, **more: object
    ) -> dict[str, float]:
        named: dict[str, object] = {"seed": 0, "noise": SeededNoise(0), **more}
        objective, plan = named.pop("objective", CLASSES), named.pop("plan", PLAIN)
        private = PrivateSteps(clip=clip, noise=std)
        return train_private(model, examples, objective, training, plan, round=1, private=private, **named)


class Nobody:
    """Chooses no row, and its noise is 1."""

    std = 0.0

    def add_normal(self, values: Tensor, std: float) -> None:
        self.std = std
        values.add_(1.0)

    def chosen(self, n: int, rate: float) -> Tensor:
        return torch.empty(0, dtype=torch.int64)


@dataclass
class Spoilt:
    """A source of noise that is right, or wrong in one way."""

    inner: SeededNoise
    loud: float = 1.0
    often: float = 1.0

    def add_normal(self, values: Tensor, std: float) -> None:
        self.inner.add_normal(values, self.loud * std)

    def chosen(self, n: int, rate: float) -> Tensor:
        return self.inner.chosen(n, self.often * rate)


class TestMechanism:
    """One step at weights 0, where the gradient of every row is known, so that the distribution of the output is.

    The model is y = w x with the loss (w x - y)^2, whose gradient at w = 0 is -2 x y. The first input is 3, the others
    are 0, and targets are -1: every row has the gradient (6, 0, 0, ...), clipped to (1, 0, 0, ...).
    """

    CLIP, STD, ROWS, BATCH, WIDTH, STEPS = 1.0, 1.5, 200, 20, 400, 120
    CHANCE = 1e-6

    RIGHT = PrivateSteps(clip=CLIP, noise=STD)

    def test_the_right_mechanism_passes(self) -> None:
        assert all(chance > self.CHANCE for chance in self._chances(Spoilt(SeededNoise(1)), self.RIGHT).values())

    @pytest.mark.parametrize(
        ("loud", "often", "private", "seen"),
        [
            (0.5, 1.0, RIGHT, "noise"),
            (1.1, 1.0, RIGHT, "noise"),
            (1.0, 1.3, RIGHT, "sum"),
            (1.0, 0.0, RIGHT, "sum"),
            (1.0, 1.0, PrivateSteps(clip=100.0, noise=STD * CLIP / 100), "sum"),
        ],
        ids=["half the noise", "a tenth more noise", "a third more rows", "no row", "no clip, and the same noise"],
    )
    def test_a_broken_one_is_caught(self, loud: float, often: float, private: PrivateSteps, seen: str) -> None:
        assert self._chances(Spoilt(SeededNoise(1), loud, often), private)[seen] < self.CHANCE

    def test_what_each_row_adds_without_noise(self) -> None:
        clipped = self._outputs(Spoilt(SeededNoise(1)), PrivateSteps(clip=self.CLIP, noise=0.0))[:, 0]
        taken = clipped * self.BATCH / self.CLIP
        torch.testing.assert_close(taken, taken.round(), rtol=0, atol=1e-4)
        chance = stats.binomtest(int(taken.sum().round()), self.STEPS * self.ROWS, self.BATCH / self.ROWS).pvalue
        assert chance > self.CHANCE
        numbers = taken.var() / (self.BATCH * (1 - self.BATCH / self.ROWS))  # of a binomial: not a batch of one size
        assert 0.5 < float(numbers) < 2

    def _chances(self, noise: Spoilt, private: PrivateSteps) -> dict[str, float]:
        """How likely outputs that lie this far out are, if noise, clip and sampling are as claimed."""
        outputs = self._outputs(noise, private).double() * self.BATCH
        silent = outputs[:, 1:].flatten() / (self.STD * self.CLIP)
        square = stats.chi2(len(silent))
        total = float(silent.square().sum())
        spread = 2 * min(square.cdf(total), square.sf(total))
        mean = 2 * stats.norm.sf(abs(float(silent.sum())) / math.sqrt(len(silent)))
        # the first output is the number of rows taken, and noise: binomial and normal, close to a normal over all steps
        rate = self.BATCH / self.ROWS
        variance = self.STEPS * (self.ROWS * rate * (1 - rate) + self.STD**2) * self.CLIP**2
        far = abs(float(outputs[:, 0].sum()) - self.STEPS * self.BATCH * self.CLIP) / math.sqrt(variance)
        return {"noise": min(spread, mean), "sum": 2 * float(stats.norm.sf(far))}

    def _outputs(self, noise: Spoilt, private: PrivateSteps) -> Tensor:
        """How each of the steps moves the weights, [steps, width], all of them from weights 0."""
        net = nn.Linear(self.WIDTH, 1, bias=False)
        nn.init.zeros_(net.weight)
        model = FlatModel(net)
        start = model.read()
        x = torch.zeros(self.ROWS, self.WIDTH)
        x[:, 0] = 3.0
        examples = Examples({"x": x}, torch.full((self.ROWS,), -1.0))
        training = Training(optimizer=SGD(lr=1.0), batch=self.BATCH, epochs=None, steps=1)
        moved = []
        for _ in range(self.STEPS):
            model.load(start)
            train_private(model, examples, Regression(), training, PLAIN, round=1, seed=0, private=private, noise=noise)
            moved.append(-model.read().vector)
        return torch.stack(moved)
