"""What `fedelta finetune` does: a table becomes sites, a pre-trained model a task, and both a simulation.

Limits: classification of texts. The whole table is tokenised in this process and held in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt
import torch

from fedelta.algorithms.algorithm import Algorithm
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedOpt, FedYogi
from fedelta.algorithms.fedprox import FedProx
from fedelta.algorithms.sampling import All, Fixed
from fedelta.cli.experiment import Sites
from fedelta.cli.options import RunSettings
from fedelta.cli.simulate import Simulation
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.parameters import Parameters
from fedelta.core.seeds import derive
from fedelta.data.names import in_order
from fedelta.data.partition import IID, Dirichlet, by_column
from fedelta.data.tables import check_column, read_table, text_and_labels
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import AdamW, Constant, Cosine
from fedelta.learning.plan import Plan
from fedelta.learning.pretrained import Pretrained, tokenizer
from fedelta.learning.task import Task
from fedelta.learning.text import encode
from fedelta.learning.training import Training
from fedelta.learning.tuning import Full, Head, LoRA, Tuning

if TYPE_CHECKING:
    import pandas

Rows = npt.NDArray[np.int64]

_LENGTH = 128  # tokens kept of a text, of a model that reads as many
_RATES = {"lora": 5e-4, "full": 5e-5, "head": 1e-3}
_SERVERS = {"fedavgm": FedAvgM, "fedadam": FedAdam, "fedyogi": FedYogi, "fedadagrad": FedAdagrad}
_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Data:
    """The training rows of each site, the test rows if there are any, and the names of the classes."""

    sites: dict[str, Rows]  # into `examples`
    examples: Examples
    test: Examples | None
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The options of the command, under their names."""

    model: str
    data: str
    text: tuple[str, ...]
    label: str
    tune: str
    rounds: int
    epochs: int
    batch: int
    algorithm: str
    bf16: bool
    columns: str | None = None
    split_by: str | None = None
    sites: int | None = None
    alpha: float | None = None
    test: str | None = None
    test_fraction: float = 0.2
    rank: int = 8
    lr: float | None = None
    schedule: str = "constant"
    max_length: int | None = None
    mu: float = 0.01
    server_lr: float | None = None
    per_round: int | None = None
    seed: int = 0

    def run(self, settings: RunSettings) -> None:
        """Simulate it. Raises BadInput, before anything is written, if it cannot be done."""
        training = Training(
            optimizer=AdamW(lr=self.lr or _RATES[self.tune]),
            batch=self.batch,
            epochs=self.epochs,
            clip=1.0,
            schedule=Cosine(rounds=self.rounds, floor=0.1) if self.schedule == "cosine" else Constant(),
        )
        data = self.read()
        federation: Federation[Any] = Federation(
            algorithm=self._algorithm(training, data.classes),
            rounds=self.rounds,
            sampling=self._sampling(len(data.sites)),
            seed=self.seed,
            test=data.test,
            plan=Plan(bf16=self.bf16),
        )
        Simulation(
            title=f"fine-tuning {self.model} ({self.tune})",
            federation=federation,
            sites=Sites(
                load=lambda name: data.examples[torch.from_numpy(data.sites[name])],
                names=list(data.sites),
            ),
            settings=settings,
            classes=data.classes,
        ).run()

    def _algorithm(self, training: Training, classes: tuple[str, ...]) -> Algorithm[Any]:
        task = Task(
            model=Pretrained(source=self.model, labels=classes, tuning=self._tuning()),
            objective=Classification(classes=len(classes)),
        )
        if self.algorithm == "fedprox":
            return FedProx(task=task, training=training, mu=self.mu)
        client: Algorithm[Parameters] = FedAvg(task=task, training=training)
        if self.algorithm == "fedavg":
            return client
        settings = {} if self.server_lr is None else {"lr": self.server_lr}
        return FedOpt(client=client, server=_SERVERS[self.algorithm](**settings))

    def _tuning(self) -> Tuning:
        if self.tune == "lora":
            return LoRA(rank=self.rank)
        return Head() if self.tune == "head" else Full()

    def _sampling(self, sites: int) -> All | Fixed:
        if self.per_round is None:
            return All()
        if self.per_round > sites:
            raise BadInput(f"--per-round {self.per_round} is more than the {sites} sites that there are; ask fewer")
        return Fixed(size=self.per_round)

    def read(self) -> Data:
        """The rows, tokenised, and which site has which. Raises BadInput for anything wrong with them."""
        tokens = tokenizer(self.model)
        reads = tokens.model_max_length
        if self.max_length is not None and self.max_length > reads:
            raise BadInput(f"--max-length {self.max_length} is more than {self.model} reads; give at most {reads}")
        length = self.max_length or min(_LENGTH, reads)
        table = self._table(self.data)
        with _naming(self.data):
            texts, labels, classes = text_and_labels(table, self.text, self.label)
            train, test = self._train_and_test(len(texts))
            sites = self._split(table, labels, train)
            examples = encode(texts, torch.from_numpy(labels), tokens, length)
        held_out = examples[torch.from_numpy(test)] if len(test) else None
        if self.test is not None:
            table = self._table(self.test, split=self._test_split())
            with _naming(self.test):
                texts, labels, _ = text_and_labels(table, self.text, self.label, classes)
                held_out = encode(texts, torch.from_numpy(labels), tokens, length)
        return Data(sites=sites, examples=examples, test=held_out, classes=classes)

    def _table(self, source: str, split: str | None = None) -> "pandas.DataFrame":
        return read_table(source, self.columns.split(",") if self.columns else None, split=split)

    def _test_split(self) -> str | None:
        """The split of --test that is read: "test" where it is the same data set as --data."""
        assert self.test is not None
        test, data = (Path(source).expanduser().resolve() for source in (self.test, self.data))
        if test != data:
            return None
        if test.is_file():
            raise BadInput(f"--test and --data are both {self.test}; leave --test out to hold out a part of the rows")
        return "test"

    def _train_and_test(self, count: int) -> tuple[Rows, Rows]:
        """The rows for training and those held out, in order; without --test the latter are drawn at random."""
        cut = 0 if self.test is not None else round(count * self.test_fraction)
        if cut == count:
            raise BadInput(f"--test-fraction {self.test_fraction} of {count} rows leaves none for training; lower it")
        order = np.random.default_rng(derive(self.seed, "test")).permutation(count)
        return np.sort(order[cut:]), np.sort(order[:cut])

    def _split(self, table: "pandas.DataFrame", labels: Rows, train: Rows) -> dict[str, Rows]:
        """The rows of each site, among the rows `train`."""
        if self.split_by is None:
            assert self.sites is not None
            split = IID() if self.alpha is None else Dirichlet(alpha=self.alpha)
            parts = split(labels[train], self.sites, self.seed)
            width = len(str(self.sites - 1))
            return {f"site-{i:0{width}d}": train[rows] for i, rows in enumerate(parts)}
        check_column(table, self.split_by)
        groups = by_column(table[self.split_by])
        sites = {name: np.intersect1d(groups[name], train, assume_unique=True) for name in in_order(groups)}
        empty = [name for name, rows in sites.items() if not len(rows)]
        if empty:
            shown = ", ".join(empty[:_NAMES_SHOWN]) + (", …" if len(empty) > _NAMES_SHOWN else "")
            take, their = ("takes", "its") if len(empty) == 1 else ("take", "their")
            click.echo(f"{len(empty)} of {len(sites)} sites {take} no part, all {their} rows being test rows: {shown}")
        return {name: rows for name, rows in sites.items() if len(rows)}


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Begin the message of an error in a table with where the table is from."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from error
