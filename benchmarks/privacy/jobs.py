"""One run, and how its settings are chosen."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.privacy.workload import SETTINGS, Data, News, Setting, on_features
from fedelta import (
    SGD,
    ExampleLevel,
    FedAvg,
    Federation,
    FedSB,
    FFALoRA,
    Local,
    Poisson,
    Ridge,
    SiteData,
    SiteLevel,
    Training,
    run,
)
from fedelta.algorithms.algorithm import Algorithm
from fedelta.algorithms.mechanism import Privacy
from fedelta.algorithms.sampling import All
from fedelta.core.release import Ledger

CLOSED_FORM = "closed form"
METHODS = ("FedIT", "FFA-LoRA", "Fed-SB")
LEADING = "FedIT"  # whose clip and share of the budget the others take
EPSILONS = (8.0, math.inf, 4.0, 2.0)  # in the order in which they are measured
CHOSEN_AT = 8.0
TUNING_SEED = 100  # used for nothing else
NEXT_TO_NONE = 1e-3  # noise multiplier where epsilon is infinite: updates are clipped as under the others

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is chosen on rows that are kept for it."""

    lr: float = 1.0
    clip: float = 0.3
    share: float = 0.5  # of epsilon, for the closed-form start


GRIDS: Mapping[str, Sequence[float]] = {"lr": (0.3, 1.0, 3.0), "clip": (0.1, 0.3, 1.0), "share": (0.25, 0.5, 0.75)}
LIMITS = (0.01, 100.0)  # of learning rates: the grid goes on by factors of about 3 until its best is not at an end


@dataclass(frozen=True, kw_only=True)
class Job:
    setting: Setting
    method: str
    epsilon: float
    seed: int
    choice: Choice | None = None  # None: nothing is trained

    @property
    def key(self) -> str:
        """All settings."""
        chosen = {} if self.choice is None else {**asdict(self.choice), "start_noise_at_inf": NEXT_TO_NONE}
        setting = {name: value for name, value in asdict(self.setting).items() if name != "text"}
        if self.choice is None:  # no round is run
            setting = {name: setting[name] for name in ("unit", "sites", "rows", "alpha", "tokens", "delta")}
        own = {"method": self.method, "epsilon": f"{self.epsilon:g}", "seed": self.seed}
        return json.dumps({**own, **setting, **chosen, "optimizer": "SGD"}, sort_keys=True)

    @property
    def name(self) -> str:
        chosen = "" if self.choice is None else " ({lr:g}, {clip:g}, {share:g})".format(**asdict(self.choice))
        return f"{self.setting.name}, {self.method}{chosen}, epsilon {self.epsilon:g}, seed {self.seed}"

    def measured(self, news: News) -> dict[str, Any]:
        """On the rows for choosing under the seed for that, and on those of the test under all others."""
        torch.set_num_threads(1)
        began = time.perf_counter()
        data = news.draw(self.setting, self.seed, "features" if self.choice is None else "tokens")
        held_out = data.validation if self.seed == TUNING_SEED else data.test
        federation = self._federation(news, data)
        program = replace(federation, test=held_out)
        fleet = Local(program, lambda name: SiteData(train=data.sites[name]), list(data.sites))
        reports = [report for _, report in run(program, fleet)]
        return {
            "accuracy": reports[-1].metrics["test_accuracy"],
            "loss": reports[-1].metrics["test_loss"],
            "start": reports[0].metrics["test_accuracy"],
            "noise": noises(program.ledger, self.setting.rounds if self.choice else 0),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _federation(self, news: News, data: Data) -> Federation[Any]:
        setting, rounds = self.setting, 0 if self.choice is None else self.setting.rounds
        return Federation(
            algorithm=self._algorithm(news, data),
            rounds=rounds,
            start=Ridge(),
            sampling=All() if setting.rate is None else Poisson(rate=setting.rate),
            privacy=self._privacy(),
            seed=self.seed,
            evaluate_every=max(1, rounds),
        )

    def _algorithm(self, news: News, data: Data) -> Algorithm[Any]:
        setting = self.setting
        if self.choice is None:
            return FedAvg(task=on_features(news), training=Training(optimizer=SGD(lr=1.0), batch=1))
        training = Training(
            optimizer=SGD(lr=self.choice.lr),
            batch=setting.batch,
            steps=setting.steps,
            epochs=None if setting.steps else 1,
        )
        if self.method == "Fed-SB":
            return FedSB(task=news.task, training=training, public=data.public)
        return (FFALoRA if self.method == "FFA-LoRA" else FedAvg)(task=news.task, training=training)

    def _privacy(self) -> Privacy | None:
        bounded = math.isfinite(self.epsilon)
        if self.choice is None and not bounded:
            return None
        choice = self.choice or Choice()
        amount: dict[str, Any] = {
            "delta": self.setting.delta,
            "epsilon": self.epsilon if bounded else None,
            "noise": None if bounded else NEXT_TO_NONE,
            "start_share": choice.share,
        }
        if self.setting.unit == "example":
            return ExampleLevel(clip=choice.clip, **amount)
        return SiteLevel(clip=choice.clip, **amount)


def noises(ledger: Ledger, rounds: int) -> dict[str, float]:
    """The noise multipliers of round zero and of the first round, as the ledger has them."""
    first = {release.round: release.event for release in reversed(ledger.releases()) if release.round <= min(1, rounds)}
    return {("start" if round == 0 else "round"): _multiplier(event) for round, event in first.items()}


def _multiplier(event: Any) -> float:
    while "noise_multiplier" not in event:
        event = event["event"] if "event" in event else next(iter(event.values()))
    return float(event["noise_multiplier"])


def chosen(setting: Setting, method: str, results: Mapping[str, Any]) -> Choice | list[Job]:
    """What is best for a method on the rows for choosing, or, while that is not known, what has to be run for it.

    One after the other: the learning rate; then, for FedIT alone, the clip, and the share of round zero.
    """
    base: Choice | list[Job] = Choice() if method == LEADING else chosen(setting, LEADING, results)
    if isinstance(base, list):
        return base
    for name in ("lr", "clip", "share") if method == LEADING else ("lr",):
        found = _best(setting, method, base, name, results)
        if isinstance(found, list):
            return found
        base = found
    return base


def _best(setting: Setting, method: str, base: Choice, name: str, results: Mapping[str, Any]) -> Choice | list[Job]:
    grid = list(GRIDS[name])
    while True:
        jobs = [_tuning(setting, method, replace(base, **{name: value})) for value in grid]
        missing = [job for job in jobs if job.key not in results]
        if missing:
            return missing
        best = max(jobs, key=lambda job: (results[job.key]["accuracy"], -results[job.key]["loss"])).choice
        assert best is not None
        value = getattr(best, name)
        if name == "lr" and value == grid[0] and value > LIMITS[0]:
            grid.insert(0, _next(value, -1))
        elif name == "lr" and value == grid[-1] and value < LIMITS[1]:
            grid.append(_next(value, 1))
        else:
            return best


def _next(rate: float, places: int) -> float:
    """The rate that is so many places further in the row 0.1, 0.3, 1, 3, ..."""
    return float(f"{10 ** ((round(2 * math.log10(rate)) + places) / 2):.0e}")


def _tuning(setting: Setting, method: str, choice: Choice) -> Job:
    return Job(setting=setting, method=method, epsilon=CHOSEN_AT, seed=TUNING_SEED, choice=choice)


def closed_forms(settings: Sequence[Setting], seeds: int) -> list[Job]:
    return [
        Job(setting=setting, method=CLOSED_FORM, epsilon=epsilon, seed=seed)
        for seed in range(seeds)
        for epsilon in EPSILONS
        for setting in settings
    ]


def trained(choices: Mapping[tuple[Setting, str], Choice], seeds: int) -> list[Job]:
    """All seeds of everything, of which an interrupted run leaves what is most wanted."""
    return [
        Job(setting=setting, method=method, epsilon=epsilon, seed=seed, choice=choice)
        for seed in range(seeds)
        for epsilon in EPSILONS
        for (setting, method), choice in choices.items()
    ]


def scaled(rows: int | None, sites: int | None) -> list[Setting]:
    """The settings, or smaller ones to try the benchmark itself."""
    smaller: dict[str, Any] = {name: value for name, value in (("rows", rows), ("sites", sites)) if value is not None}
    return [replace(setting, **smaller) for setting in SETTINGS]
