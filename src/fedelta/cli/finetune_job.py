"""What `fedelta finetune` does: a table becomes sites, a pre-trained model a task, and both a simulation.

What is read of the table, task by task, is in `finetune_data`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

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
from fedelta.algorithms import round_zero
from fedelta.algorithms.algorithm import Algorithm
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedOpt, FedYogi
from fedelta.algorithms.fedprox import FedProx
from fedelta.algorithms.mechanism import Entropy
from fedelta.algorithms.parts import Clear
from fedelta.algorithms.sampling import All, Fixed, Poisson, Sampling
from fedelta.cli.experiment import Sites
from fedelta.cli.finetune_data import Continued, Images, Masked, Numbers, Reading, Recordings, Texts, Words
from fedelta.cli.options import RunSettings
from fedelta.cli.privacy import Asked
from fedelta.cli.secure import Masks
from fedelta.cli.simulate import Simulation
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.parameters import Parameters
from fedelta.core.program import SiteData
from fedelta.core.seeds import derive
from fedelta.data.audio import AudioFormat, audio_format
from fedelta.data.images import image_format
from fedelta.data.names import in_order
from fedelta.data.partition import IID, Dirichlet, by_column
from fedelta.data.tables import check_column, class_table, read_table
from fedelta.learning.bottleneck import Bottleneck
from fedelta.learning.closed_form import LDA, ClosedForm, Ridge
from fedelta.learning.kinds import CAUSAL_LANGUAGE_MODEL
from fedelta.learning.lora import IA3, LoRA
from fedelta.learning.optimizers import AdamW, Constant, Cosine
from fedelta.learning.plan import Plan
from fedelta.learning.pretrained import Pretrained, language_kind, processor, tokenizer
from fedelta.learning.prompts import Prefix, Prompt
from fedelta.learning.quantised import Bits
from fedelta.learning.structure import listing
from fedelta.learning.task import Task
from fedelta.learning.training import Training
from fedelta.learning.tuning import BitFit, Full, Head, HeadAndNorms, LastLayers, Tuning
from fedelta.privacy.distributed import DistributedDP
from fedelta.privacy.example_level import ExampleLevel
from fedelta.privacy.local_dp import LocalDP
from fedelta.secure.aggregation import SecureAggregation

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedTokenizerBase

_LENGTH = 128  # tokens kept of a text, of a model that reads as many
_RATES = {
    "full": 5e-5,
    "last": 2e-4,
    "lora": 5e-4,
    **dict.fromkeys(("head", "norms", "adapter"), 1e-3),
    "bitfit": 2e-3,
    **dict.fromkeys(("ia3", "prefix"), 1e-2),
    "prompt": 3e-2,
}
_SERVERS = {"fedavgm": FedAvgM, "fedadam": FedAdam, "fedyogi": FedYogi, "fedadagrad": FedAdagrad}
_RANKED: dict[str, Callable[..., Algorithm[Any]]] = {"hetlora": HetLoRA, "flexlora": FlexLoRA, "flora": FLoRA}
_OF_LORA: dict[str, Callable[..., Algorithm[Any]]] = {
    "ffa-lora": FFALoRA,
    "rolora": RoLoRA,
    "fedsa-lora": FedSALoRA,
    "fed-sb": FedSB,
    "fedex-lora": FedExLoRA,
    "lora-fair": LoRAFAIR,
    "flora-na": FLoRANA,
}
_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Data:
    """The training rows of each site, the test rows if there are any, the names of the classes, and the task."""

    sites: dict[str, Examples]
    test: Examples | None
    classes: tuple[str, ...]
    task: Reading

    def personal(self, name: str) -> SiteData:
        """A site that measures its own model, on the test rows."""
        return SiteData(train=self.sites[name], validation=self.test)


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The options of the command, under their names."""

    model: str
    data: str
    tune: str
    rounds: int
    epochs: int
    batch: int
    algorithm: str
    bf16: bool
    text: tuple[str, ...] = ()
    tokens: str | None = None
    image: str | None = None
    audio: str | None = None
    label: str | None = None
    task: str | None = None  # of a language model: "causal" or "masked"
    folders: bool = False  # --data and --test are folders of classes, not tables
    columns: str | None = None
    split_by: str | None = None
    sites: int | None = None
    alpha: float | None = None
    test: str | None = None
    test_fraction: float = 0.2
    rank: int = 8
    rslora: bool = False
    width: int = 64
    virtual_tokens: int = 20
    layers: int = 1
    bits: Bits | None = None
    lr: float | None = None
    schedule: str = "constant"
    max_length: int | None = None
    max_seconds: float | None = None
    start: str | None = None
    features: Path | None = None
    ranks: str = ""
    mu: float = 0.01
    server_lr: float | None = None
    per_round: int | None = None
    sample_rate: float | None = None
    privacy: Asked = Asked()
    masks: Masks = Masks()
    entropy: Entropy = "system"
    seed: int = 0

    def run(self, settings: RunSettings) -> None:
        """Simulate it. Raises BadInput, before anything is written, if it cannot be done."""
        privacy = self.privacy.guarantee(fixed=self.per_round is not None)
        training = Training(
            optimizer=AdamW(lr=self.lr or _RATES[self.tune]),
            batch=self.batch,
            epochs=self.epochs,
            clip=None if isinstance(privacy, ExampleLevel) else 1.0,  # it bounds the gradient of each row
            schedule=Cosine(rounds=self.rounds, floor=0.1) if self.schedule == "cosine" else Constant(),
        )
        data = self.read()
        tuning, kind = self._tuning(), data.task.kind
        task = Task(
            model=Pretrained(source=self.model, labels=data.classes, tuning=tuning, kind=kind, bits=self.bits),
            objective=data.task.objective(len(data.classes)),
            features=self.features or settings.out / "features",
        )
        algorithm = self._algorithm(task, training, list(data.sites))
        federation: Federation[Any] = Federation(
            algorithm=algorithm,
            rounds=self.rounds,
            start=None if isinstance(privacy, LocalDP) else self._start(task, next(iter(data.sites.values()))[:8]),
            privacy=privacy,
            entropy=self.entropy,
            sampling=self._sampling(len(data.sites)),
            collect=SecureAggregation() if isinstance(privacy, DistributedDP) else Clear(),
            seed=self.seed,
            test=None if algorithm.personal else data.test,
            validate_at_sites=algorithm.personal,
            plan=Plan(bf16=self.bf16),
        )
        sites = Sites(load=data.personal if algorithm.personal else data.sites.__getitem__, names=list(data.sites))
        Simulation(
            title=f"fine-tuning {self.model} ({self.tune})",
            federation=self.masks.on(federation, sites),
            sites=sites,
            settings=settings,
            classes=data.classes,
        ).run()

    def _start(self, task: Task, rows: Examples) -> ClosedForm | None:
        if self.start is None:
            return round_zero.usual(task, rows, self.seed, Plan(bf16=self.bf16).plain)
        starts: dict[str, ClosedForm | None] = {"lda": LDA(), "ridge": Ridge(), "drawn": None}
        return starts[self.start]

    def _algorithm(self, task: Task, training: Training, sites: Sequence[str]) -> Algorithm[Any]:
        if self.algorithm == "fedprox":
            return FedProx(task=task, training=training, mu=self.mu)
        if self.algorithm in _RANKED:
            return _RANKED[self.algorithm](task=task, training=training, ranks=self._ranks(sites))
        if self.algorithm in _OF_LORA:
            return _OF_LORA[self.algorithm](task=task, training=training)
        client: Algorithm[Parameters] = FedAvg(task=task, training=training)
        if self.algorithm == "fedavg":
            return client
        settings = {} if self.server_lr is None else {"lr": self.server_lr}
        return FedOpt(client=client, server=_SERVERS[self.algorithm](**settings))

    def _ranks(self, sites: Sequence[str]) -> dict[str, int]:
        """tier -> rank."""
        found: dict[str, int] = {}
        for part in filter(None, self.ranks.split(",")):
            tier, _, rank = (word.strip() for word in part.partition("="))
            if not tier or not rank.isdecimal() or tier in found:
                raise BadInput(f"--ranks {self.ranks!r} is not of the form phone=4,tablet=8")
            if not any(name.startswith(tier) for name in sites):
                raise BadInput(f"--ranks {self.ranks!r}: no site's name begins with {tier!r}; {listing(sites)}")
            found[tier] = int(rank)
        return found

    def _tuning(self) -> Tuning:
        tunings: dict[str, Tuning] = {
            "full": Full(),
            "head": Head(),
            "last": LastLayers(count=self.layers),
            "norms": HeadAndNorms(),
            "bitfit": BitFit(),
            "lora": LoRA(rank=self.rank, rslora=self.rslora),
            "ia3": IA3(),
            "adapter": Bottleneck(width=self.width),
            "prompt": Prompt(tokens=self.virtual_tokens),
            "prefix": Prefix(tokens=self.virtual_tokens),
        }
        return tunings[self.tune]

    def _sampling(self, sites: int) -> Sampling:
        if self.sample_rate is not None:
            return Poisson(rate=self.sample_rate)
        if self.per_round is None:
            return All()
        if self.per_round > sites:
            raise BadInput(f"--per-round {self.per_round} is more than the {sites} sites that there are; ask fewer")
        return Fixed(size=self.per_round)

    def read(self) -> Data:
        """What the model learns, and from what. Raises BadInput for anything wrong with the rows."""
        reading = self._reading()
        table = self._table(self.data)
        with _naming(self.data):
            rows = reading.rows(table, _folder(self.data), None)
            train, drawn = self._train_and_test(len(rows.labels))
            sites = self._split(table, rows.labels, train)
            examples = rows.deal([*sites.values(), *([drawn] if len(drawn) else [])])
        held_out = examples[len(sites)] if len(drawn) else None
        if self.test is not None:
            table = self._table(self.test, split=self._test_split())
            with _naming(self.test):
                others = reading.rows(table, _folder(self.test), rows.classes or None)
                (held_out,) = others.deal([np.arange(len(others.labels))])
        own = dict(zip(sites, examples[: len(sites)], strict=True))
        return Data(sites=own, test=held_out, classes=rows.classes, task=reading)

    def _reading(self) -> Reading:
        """The task, which follows from the columns that are named. Raises BadInput if the model is no use for it."""
        if self.image is not None:
            with _of_the_model():
                images = image_format(self._processor("images"))
            return Images(column=self.image, label=self._label, format=images)
        if self.audio is not None:
            with _of_the_model():
                sound = audio_format(self._processor("recordings"))
            return Recordings(column=self.audio, label=self._label, format=self._shortened(sound))
        words = tokenizer(self.model)
        text: dict[str, Any] = {"tokenizer": words, "length": self._length(words)}
        if self.tokens is not None:
            return Words(column=self.tokens, label=self._label, **text)
        if self.label is not None:
            return Texts(columns=self.text, label=self.label, **text)
        if self._causal():
            return Continued(columns=self.text, **text)
        return Masked(columns=self.text, seed=self.seed, **text)

    @property
    def _label(self) -> str:
        assert self.label is not None  # the command asks for it
        return self.label

    def _processor(self, what: str) -> Path:
        found = processor(self.model)
        if found is None:
            raise BadInput(f"{self.model} has no preprocessor_config.json, which says how {what} become its inputs")
        return found.file

    def _shortened(self, format: AudioFormat) -> AudioFormat:
        if self.max_seconds is not None and self.max_seconds * format.rate < 1:
            raise BadInput(
                f"--max-seconds {self.max_seconds:g} is less than one sample, of which {self.model} reads "
                f"{format.rate:,} a second; give more"
            )
        return replace(format, seconds=self.max_seconds)

    def _length(self, words: "PreTrainedTokenizerBase") -> int:
        """How many tokens are kept of a text."""
        taken = self.virtual_tokens if self.tune in ("prompt", "prefix") else 0
        reads = words.model_max_length - taken
        if self.max_length is not None and self.max_length > reads:
            besides = f" besides {taken} virtual tokens" if taken else ""
            raise BadInput(
                f"--max-length {self.max_length} is more than {self.model} reads{besides}; give at most {reads}"
            )
        if reads < 1:
            raise BadInput(f"--virtual-tokens {taken} leave no room in {self.model}; give fewer than {taken + reads}")
        return self.max_length or min(_LENGTH, reads)

    def _causal(self) -> bool:
        """Whether the model is to learn the next token, and not masked ones."""
        if self.task is not None:
            return self.task == "causal"
        kind = language_kind(self.model)
        if kind is None:
            raise BadInput(
                f"the config.json of {self.model} does not say what it learns of texts without labels; give --task "
                "causal for the next token, --task masked for masked ones, or --label COLUMN for classes"
            )
        return kind == CAUSAL_LANGUAGE_MODEL

    def _table(self, source: str, split: str | None = None) -> "pandas.DataFrame":
        if self.folders:
            return class_table(source, "image" if self.audio is None else "recording")
        return read_table(source, self.columns.split(",") if self.columns else None, split=split)

    def _test_split(self) -> str | None:
        """The split of --test that is read: "test" where it is the same data set as --data."""
        assert self.test is not None
        test, data = (Path(source).expanduser().resolve() for source in (self.test, self.data))
        if test != data:
            return None
        if test.is_file() or self.folders:
            raise BadInput(f"--test and --data are both {self.test}; leave --test out to hold out a part of the rows")
        return "test"

    def _train_and_test(self, count: int) -> tuple[Numbers, Numbers]:
        """The rows for training and those held out, in order; without --test the latter are drawn at random."""
        cut = 0 if self.test is not None else round(count * self.test_fraction)
        if cut == count:
            raise BadInput(f"--test-fraction {self.test_fraction} of {count} rows leaves none for training; lower it")
        order = np.random.default_rng(derive(self.seed, "test")).permutation(count)
        return np.sort(order[cut:]), np.sort(order[:cut])

    def _split(self, table: "pandas.DataFrame", labels: Numbers, train: Numbers) -> dict[str, Numbers]:
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


def _folder(source: str) -> Path | None:
    """What paths in a table are relative to: the folder that it is, or is in; None for a table from the hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    return path.parent if path.exists() else None


@contextmanager
def _of_the_model() -> Iterator[None]:
    """End the message of an error in what a model comes with by what can be done about it with the options."""
    try:
        yield
    except BadInput as error:
        said = str(error).rpartition("; ")
        raise BadInput(
            f"{said[0] or said[2]}; choose another --model, or give as --model a copy of its folder with a "
            "preprocessor_config.json that will do"
        ) from error


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Begin the message of an error in a table with where the table is from."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from error
