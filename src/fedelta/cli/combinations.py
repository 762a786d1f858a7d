"""`fedelta combinations`: which algorithms, guarantees and parts go together, found out by building each federation.

Every cell is a Federation over a tiny model, built and begun up to where the first request would be sent. Nothing is
written down by hand: what is refused, and why, is what the refusal said.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import click
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from fedelta.adapters.fed_sb import FedSB
from fedelta.adapters.fedbpt import FedBPT
from fedelta.adapters.fedex_lora import FedExLoRA
from fedelta.adapters.fedkseed import FedKSeed
from fedelta.adapters.fedsa_lora import FedSALoRA
from fedelta.adapters.ffa_lora import FFALoRA
from fedelta.adapters.flexlora import FlexLoRA
from fedelta.adapters.flora import FLoRA
from fedelta.adapters.flora_na import FLoRANA, NearestCombination
from fedelta.adapters.hetlora import HetLoRA
from fedelta.adapters.lora_fair import LoRAFAIR
from fedelta.adapters.offsite import Ends, OffsiteTuning
from fedelta.adapters.rolora import RoLoRA
from fedelta.aggregation.norm_bound import NormBound
from fedelta.algorithms.algorithm import Algorithm
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedOpt, FedYogi
from fedelta.algorithms.fedprox import FedProx
from fedelta.algorithms.parts import Clear, Collect
from fedelta.algorithms.sampling import All, Cyclic, Fixed, Poisson
from fedelta.algorithms.stopping import Target
from fedelta.core.errors import FedeltaError
from fedelta.core.examples import Examples
from fedelta.core.seeds import seeded
from fedelta.learning.closed_form import LDA, Ridge
from fedelta.learning.lora import LoRA
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.prompts import Prompt
from fedelta.learning.task import Task
from fedelta.learning.training import Training
from fedelta.privacy.clipping import AdaptiveClip
from fedelta.privacy.distributed import DistributedDP
from fedelta.privacy.example_level import ExampleLevel
from fedelta.privacy.local_dp import LocalDP
from fedelta.privacy.site_level import SiteLevel
from fedelta.secure.aggregation import SecureAggregation
from fedelta.secure.homomorphic import HomomorphicEncryption

SITES = tuple(f"site-{number}" for number in range(6))
INPUTS, CLASSES, TOKENS = 4, 2, 12
# whole weights of this tiny model, which HetLoRA sends, are larger than the bound of an encrypted difference
COLLECTS: tuple[Collect, ...] = (Clear(), SecureAggregation(), HomomorphicEncryption(bound=64.0))
YES, NOT_APPLICABLE = "✓", "–"
_WIDE = 140  # characters of a terminal in which all of COLLECTS have their place in a cell
_TRAINING = Training(optimizer=SGD(lr=0.1), batch=4)

Build = Callable[[], Algorithm[Any]]
Settings = Mapping[str, Any]  # of a Federation
Change = Callable[[Settings], Settings | None]  # None: there is nothing to change in these


@dataclass(frozen=True, kw_only=True)
class Protection:
    """A guarantee, or none, and the sampling that it is asked for with."""

    name: str
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is combined with every protection: an algorithm, or a change to a federation."""

    name: str
    change: Change


@dataclass(frozen=True, kw_only=True)
class Part:
    """One table."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """For each collect why the combination is refused, None if it is not; empty where there is no such thing."""

    refusals: tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What was found out, the parts with their cells, and each different refusal under a number."""

    parts: Sequence[tuple[Part, Sequence[Sequence[Cell]]]]
    numbers: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for _, lines in self.parts:
            for refusal in (refusal for line in lines for cell in line for refusal in cell.refusals):
                if refusal is not None:
                    self.numbers.setdefault(refusal, len(self.numbers) + 1)

    def shown(self, cell: Cell, collects: slice = slice(None)) -> str:
        found = [YES if refusal is None else str(self.numbers[refusal]) for refusal in cell.refusals[collects]]
        return " / ".join(found) if len(found) else NOT_APPLICABLE


PROTECTIONS = tuple(
    Protection(name=name, settings={"privacy": privacy, "sampling": sampling})
    for name, privacy, sampling in (
        ("none", None, All()),
        ("SiteLevel, All()", SiteLevel(clip=0.5, noise=0.01), All()),
        ("SiteLevel, Poisson()", SiteLevel(clip=0.5, noise=0.01), Poisson(rate=0.9)),
        ("SiteLevel, Fixed()", SiteLevel(clip=0.5, noise=0.01, accountant="rdp"), Fixed(size=4)),
        ("SiteLevel, Cyclic()", SiteLevel(clip=0.5, noise=0.01), Cyclic(groups=2)),
        ("DistributedDP", DistributedDP(clip=0.5, noise=0.1), All()),
        ("LocalDP", LocalDP(clip=0.5, noise=0.01), All()),
        ("ExampleLevel", ExampleLevel(clip=1.0, noise=0.01), All()),
    )
)
_MEANING = (
    f"{YES}: it is built, and begins. A number: it is refused, with that sentence below. {NOT_APPLICABLE}: there is no "
    "such thing. First with Clear(), where the coordinator gets each update, then with SecureAggregation() and with "
    "HomomorphicEncryption(), where it gets their sum. Columns are guarantees, with the sampling where one rests on it."
)


@click.command(short_help="Tell which algorithms, guarantees and parts go together, and why others do not.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print it as Markdown.")
def command(as_markdown: bool) -> None:
    """Build a federation for each algorithm and each protection, and tell which ones are refused, and why."""
    with Console(stderr=True).status("building federations"):
        found = matrix()
    if as_markdown:
        click.echo(markdown(found), nl=False)
    else:
        _show(found, Console(highlight=False))


@cache
def matrix() -> Matrix:
    """All parts, each of their cells built."""
    return Matrix(parts=[(part, [list(cells(row)) for row in part.rows]) for part in parts()])


def cells(row: Row) -> Iterator[Cell]:
    for protection in PROTECTIONS:
        yield Cell(refusals=tuple(refusal(settings) for settings in combined(row, protection)))


def combined(row: Row, protection: Protection) -> list[Settings]:
    """The settings of a row under a protection, for each collect; empty where there is no such thing."""
    found = row.change(protection.settings)
    return [] if found is None else [{"rounds": 2, **found, "collect": collect} for collect in COLLECTS]


def refusal(settings: Settings) -> str | None:
    """Why there is no federation with these settings, None if there is one. Nothing is sent."""
    try:
        program: Federation[Any] = Federation(**settings)
        program.begun(program.init(), SITES)
    except FedeltaError as error:
        return str(error)
    return None


def parts() -> list[Part]:
    """Every algorithm by itself and with a closed-form start, and what else can be set, with FedAvg."""
    algorithms = [Row(name=name, change=_with(build)) for name, build in _algorithms().items()]
    started = [Row(name=row.name, change=_then(row.change, start=Ridge())) for row in algorithms]
    others = [Row(name=name, change=_then(_with(_fedavg), **own)) for name, own in _settings().items()]
    return [
        Part(title="Algorithm", rows=algorithms),
        Part(title="With start=Ridge()", rows=started),
        Part(title="FedAvg with", rows=[*others, *_bounds()]),
    ]


def _algorithms() -> Mapping[str, Build]:
    """What builds each of them: not before it is asked for, as peft takes its time to be imported."""
    servers = (FedAvgM(), FedAdagrad(), FedAdam(), FedYogi())
    on_factors = (FFALoRA, RoLoRA, FedSALoRA, HetLoRA, FlexLoRA, FLoRA, FedExLoRA, LoRAFAIR, FLoRANA)
    public = Examples({"x": torch.eye(INPUTS)}, torch.arange(INPUTS) % CLASSES)
    lora: dict[str, Any] = {"task": _task(_lora), "training": _TRAINING}
    return {
        "FedAvg": _fedavg,
        "FedProx": lambda: FedProx(task=_task(_plain), training=_TRAINING, mu=0.1),
        **{f"FedOpt, {type(server).__name__}": partial(FedOpt, client=_fedavg(), server=server) for server in servers},
        "FedAvg on LoRA (FedIT)": partial(FedAvg, **lora),
        **{method.__name__: partial(method, **lora) for method in on_factors},
        "FedSB": partial(FedSB, **lora),
        "FedSB, public=…": partial(FedSB, **lora, public=public),
        "FedKSeed": partial(
            FedKSeed, task=lora["task"], training=Training(optimizer=SGD(lr=0.01), batch=4), candidates=8
        ),
        "FedBPT, min_sites=2": lambda: FedBPT(task=_task(_prompted), dimension=3, iterations=1, population=2),
        "OffsiteTuning, FedAvg": lambda: OffsiteTuning(task=_task(_full), client=_fedavg(_emulator)),
    }


def _settings() -> Mapping[str, Settings]:
    """What a federation can have besides."""
    return {
        "start=LDA()": {"start": LDA()},
        "validate_at_sites=True": {"validate_at_sites": True},
        "stop=Target() of a train loss": {"stop": Target(metric="train_loss", value=0.0)},
        "min_sites=2": {"min_sites": 2},
        "Plan(cohort=2)": {"plan": Plan(cohort=2)},
        "Training(clip=1.0)": {"algorithm": replace(_fedavg(), training=replace(_TRAINING, clip=1.0))},
        "rule=NormBound()": {"rule": NormBound(norm=1e3)},
        "rule=NearestCombination()": {"algorithm": _fedavg(_lora), "rule": NearestCombination()},
        "BatchNorm in the model": {"algorithm": _fedavg(_normed)},
    }


def _bounds() -> list[Row]:
    """Other settings of SiteLevel."""
    changes: Mapping[str, Settings] = {
        "SiteLevel(clip=AdaptiveClip())": {"clip": AdaptiveClip(count_noise=2.0), "noise": 1.0},
        "SiteLevel(bands=2)": {"bands": 2},
        'SiteLevel(accountant="pld")': {"accountant": "pld"},
        'SiteLevel(accountant="rdp")': {"accountant": "rdp"},
    }
    return [Row(name=name, change=partial(_sited, own)) for name, own in changes.items()]


def _sited(own: Settings, settings: Settings) -> Settings | None:
    privacy = settings["privacy"]
    if not isinstance(privacy, SiteLevel):
        return None
    return {**settings, "algorithm": _fedavg(), "privacy": replace(privacy, **own)}


def _with(build: Build) -> Change:
    """Its algorithm, built once; min_sites as it needs."""
    build = cache(build)

    def change(settings: Settings) -> Settings:
        algorithm = build()
        least = {"min_sites": 2} if isinstance(algorithm, FedBPT) else {}
        return {**settings, "algorithm": algorithm, **least}

    return change


def _then(change: Change, **own: Any) -> Change:
    def both(settings: Settings) -> Settings | None:
        found = change(settings)
        return None if found is None else {**found, **own}

    return both


def _fedavg(model: Callable[[], nn.Module] | None = None) -> FedAvg:
    return FedAvg(task=_task(_plain if model is None else model), training=_TRAINING)


def _task(model: Callable[[], nn.Module]) -> Task:
    return Task(model=model, objective=Classification(classes=CLASSES))


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 3), nn.Tanh(), nn.Linear(3, CLASSES))


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 3), nn.BatchNorm1d(3), nn.Linear(3, CLASSES))


def _lora() -> nn.Module:
    """Its frozen weights are the same for every seed, as those of a pre-trained model are."""
    with seeded(0, "pretrained"):
        pretrained = _plain()
    return LoRA(rank=2, targets=("0",)).apply(pretrained)


class _Blocks(nn.Module):
    """Blocks and a head."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Tanh()) for _ in range(count)))
        self.head = nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def _full() -> nn.Module:
    return Ends(count=1).apply(_Blocks(4))


def _emulator() -> nn.Module:
    return Ends(count=1).apply(_Blocks(3))


def _prompted() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    sizes |= {"vocab_size": TOKENS, "max_position_embeddings": 8, "num_labels": CLASSES}
    config = BertConfig.from_dict(sizes)
    return Prompt(tokens=1).apply(BertForSequenceClassification(config))


def markdown(found: Matrix) -> str:
    """All tables, and under them the refusals."""
    lines = [_MEANING, ""]
    for part, own_lines in found.parts:
        lines += [f"| {part.title} | {' | '.join(protection.name for protection in PROTECTIONS)} |"]
        lines += [f"|---|{'---|' * len(PROTECTIONS)}"]
        for row, own in zip(part.rows, own_lines, strict=True):
            lines.append(f"| {row.name} | {' | '.join(found.shown(cell) for cell in own)} |")
        lines.append("")
    lines += [f"{number}. {sentence}" for sentence, number in found.numbers.items()]
    return "\n".join(lines) + "\n"


def _show(found: Matrix, console: Console) -> None:
    console.print(_MEANING, markup=False)
    one_by_one = {f"With {type(collect).__name__}():": slice(at, at + 1) for at, collect in enumerate(COLLECTS)}
    for part, lines in found.parts:
        for heading, chosen in one_by_one.items() if console.width < _WIDE else [("", slice(None))]:
            table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
            table.add_column(part.title, overflow="fold")
            for protection in PROTECTIONS:
                words = re.sub(r"(?<=[a-z])(?=[A-Z])|, ", "\n", protection.name.removesuffix("()"))
                table.add_column(words, no_wrap=True)
            for row, own in zip(part.rows, lines, strict=True):
                table.add_row(escape(row.name), *(found.shown(cell, chosen) for cell in own))
            console.print(f"\n{heading}" if heading else "")
            console.print(table)
    console.print()
    for sentence, number in found.numbers.items():
        console.print(f"{number:3}. {sentence}", markup=False, soft_wrap=not console.is_terminal)
