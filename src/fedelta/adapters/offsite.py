"""Offsite-tuning (Xiao, Lin & Han, "Offsite-Tuning: Transfer Learning without Full Model", 2023, arXiv 2302.04870): the
owner of a model keeps most of it, and the sites train its two ends through a weak stand-in for the rest.

The first and the last blocks are the adapters, which are trained. Of the blocks between them some are kept, frozen,
evenly spread from the first to the last of them; the others are dropped. What goes out is this emulator, as the
folder of a smaller model of the same architecture. What comes back is plugged into the full model.

    emulator = Emulator(model=Pretrained(source="full", ...), ends=2, kept=8)
    emulator.hand_out("emulator")                                 # the owner, once
    ends = Ends(count=2)
    small = Task(model=Pretrained(source="emulator", ..., tuning=ends), objective=...)
    whole = Task(model=Pretrained(source="full", ..., tuning=ends), objective=...)
    Federation(algorithm=OffsiteTuning(task=whole, client=FedAvg(task=small, training=...)), ...)

A site builds `small` alone, and needs no more than that folder. `test` of a federation is measured at the coordinator,
on the full model with the trained ends; `validate_at_sites` measures the emulator, at the sites. The numbers of the
paper's tables, both models before and after, are those of `OffsiteTuning.measured`.

What is trained, which blocks are kept and what is measured is as in the authors' program (mit-han-lab/offsite-tuning:
setup_teacher_student, uniform_choose_layers, run_clm.py), which was the source. There one site tunes the ends; here
many do, by whatever algorithm `client` is.

Limits: there is no distillation of the emulator from the full model, which the paper has besides. A federation with
`start` would ask the sites for features of the full model, which they do not have. Sites are trained one by one.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from fedelta.aggregation.rule import Rule
from fedelta.algorithms.algorithm import Algorithm, Incoming, IncomingMany
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.messages import Kind, PartyId, Tensors, Update, Updates
from fedelta.core.parameters import Layout, Parameters, trainable, travelling_buffers
from fedelta.core.program import Site
from fedelta.learning.flat import FlatModel
from fedelta.learning.plan import Plan
from fedelta.learning.quantised import bits_of
from fedelta.learning.saving import Preprocessor, save
from fedelta.learning.structure import blocks_of, is_hugging_face, is_language_model, new_head_of, within
from fedelta.learning.task import Task
from fedelta.learning.training import Training, evaluate

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """A tuning: the first `count` blocks of a transformer, the last `count`, and the head of a classifier are trained.

    The embeddings, what follows the last block and the head of a language model are frozen, as in the paper.
    """

    count: int = 2

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BadInput(f"Ends.count must be >= 1, got {self.count}")

    def apply(self, module: nn.Module, fresh: Sequence[str] = ()) -> nn.Module:
        blocks = _blocks(module)
        if len(blocks) <= 2 * self.count:
            raise BadInput(
                f"{self} leaves nothing between the ends of the {len(blocks)} blocks of {type(module).__name__}; lower "
                "the count, or use Full()"
            )
        trained = [*blocks[: self.count], *blocks[-self.count :], *new_head_of(module), *fresh]
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(within(name, trained))
        return module


@dataclass(frozen=True, kw_only=True)
class Emulator:
    """Builds the emulator of what `model` builds: its ends, `kept` of the blocks between them, and all around them.

    The module is a new one of the same class, tuned by `Ends(count=ends)`; it shares no tensor with the full model.
    """

    model: Callable[[], nn.Module]
    ends: int = 2
    kept: int = 8

    def __post_init__(self) -> None:
        for name in ("ends", "kept"):
            if getattr(self, name) < 1:
                raise BadInput(f"Emulator.{name} must be >= 1, got {getattr(self, name)}")

    def __call__(self) -> nn.Module:
        full: Any = self.model()
        if not is_hugging_face(full) or hasattr(full, "get_base_model"):
            raise BadInput(
                f"an emulator is made of a plain Hugging Face model, got {type(full).__name__}; leave tunings that add "
                "to a model out of Emulator.model"
            )
        if bits_of(full) is not None:
            raise BadInput("an emulator has the weights of the full model, and not rounded ones; leave `bits` out")
        blocks = _blocks(full)
        _check_alike(full, blocks)
        kept = self._kept(len(blocks))
        small = type(full)(_shorter(full.config, len(blocks), kept))
        new = dict(zip((blocks[number] for number in kept), blocks, strict=False))  # a kept block -> its new name
        missing, unknown = small.load_state_dict(_renamed(full.state_dict(), blocks, new), strict=False)
        if missing or unknown:
            raise BadInput(
                f"a {type(full).__name__} of {len(kept)} blocks has other tensors than those that are left of one of "
                f"{len(blocks)}, first {[*missing, *unknown][0]!r}; it has no emulator"
            )
        return Ends(count=self.ends).apply(small.eval())

    def hand_out(self, folder: str | Path, tokenizer: Preprocessor | None = None) -> None:
        """Write the emulator into `folder`, as `fedelta.save` does: all that a site has to get of the model."""
        save(self(), folder, tokenizer)

    def _kept(self, total: int) -> list[int]:
        """The numbers of the blocks that are kept, in order."""
        between = total - 2 * self.ends
        if not self.kept < between:
            raise BadInput(
                f"of {total} blocks, {max(0, between)} are between {self.ends} and {self.ends} at the ends, and an "
                f"emulator keeps fewer of them, got kept={self.kept}; lower it"
            )
        stride = (between - 1) / (self.kept - 1) if self.kept > 1 else 0.0
        middle = [round(number * stride) for number in range(self.kept)] if stride else [(between - 1) // 2]
        return [*range(self.ends), *(self.ends + number for number in middle), *range(total - self.ends, total)]


@dataclass(frozen=True, kw_only=True)
class OffsiteState(Generic[S]):
    client: S
    parameters: Parameters  # of the full model at the start: what is plugged in has its names


@dataclass(frozen=True, kw_only=True)
class OffsiteTuning(Generic[S]):
    """`client` (FedAvg, FedOpt, …) trains the ends of an emulator, and `task` has the full model, which only its owner
    builds. Both are tuned alike: as many tensors of the same shapes are trained, in the same order.
    """

    at_once: ClassVar[bool] = False  # who trains sites at once asks for the layout of `task`, which sites cannot build

    task: Task
    client: Algorithm[S]

    def __post_init__(self) -> None:
        if self.client.personal:
            raise BadInput(
                f"{type(self.client).__name__} leaves a part of what is learned at the sites, which cannot be plugged "
                "into the full model; use FedAvg or FedOpt"
            )

    @property
    def training(self) -> Training:
        return self.client.training

    @property
    def kind(self) -> Kind:
        return self.client.kind

    @property
    def rule(self) -> Rule:
        return self.client.rule

    @property
    def personal(self) -> bool:
        return False

    @property
    def by_gradient(self) -> bool:
        return self.client.by_gradient

    @property
    def steady(self) -> bool:
        return self.client.steady

    def init(self, parameters: Parameters) -> OffsiteState[S]:
        own, small = parameters.layout, self._emulated
        same = [(entry.shape, entry.dtype) for entry in own.entries] == [(e.shape, e.dtype) for e in small.entries]
        if not same or own.trained != small.trained:
            raise BadInput(
                f"{own.size} numbers are trained of the full model and {small.size} of the emulator, or not alike; "
                "tune both by the same Ends()"
            )
        return OffsiteState(client=self.client.init(Parameters(small, parameters.vector)), parameters=parameters)

    def parameters(self, state: OffsiteState[S]) -> Parameters:
        return state.parameters.like(self.client.parameters(state.client).vector)

    def broadcast(self, state: OffsiteState[S], to: Mapping[PartyId, int]) -> tuple[Tensors, dict[PartyId, Tensors]]:
        return self.client.broadcast(state.client, to)

    def layout(self, state: OffsiteState[S], party: PartyId) -> Layout:
        return self.client.layout(state.client, party)

    def received(self, incoming: Incoming, site: Site, examples: Examples) -> tuple[FlatModel, Examples]:
        return self.client.received(incoming, site, examples)

    def local(self, incoming: Incoming, site: Site) -> Update:
        return self.client.local(incoming, site)

    def local_many(self, incoming: IncomingMany, sites: Sequence[Site]) -> tuple[Updates, dict[PartyId, str]]:
        raise BadInput("OffsiteTuning trains its sites one by one")

    def step(self, state: OffsiteState[S], total: Update, round: int) -> OffsiteState[S]:
        return replace(state, client=self.client.step(state.client, total, round))

    def measured(
        self, state: OffsiteState[S], examples: Examples, seed: int = 0, plan: Plan | None = None
    ) -> dict[str, float]:
        """The columns of the paper's tables, with the metrics of the objective on the owner's `examples`.

        "zero_shot_…" is of the full model as it was, "plug_in_…" with the trained ends; "emulator_zero_shot_…" and
        "emulator_…" are of the emulator with the same ends. The paper asks of the plug-in to be better than both the
        full model as it was, so that there is a gain, and the trained emulator, so that the owner is still needed.
        """
        plan = (plan or Plan()).plain
        trained = self.parameters(state)
        numbers: dict[str, float] = {}
        for task, names in (
            (self.task, ("zero_shot", "plug_in")),
            (self.client.task, ("emulator_zero_shot", "emulator")),
        ):
            task.check(examples)
            model, rows = task.flat_on(examples, seed, plan)
            for name, parameters in zip(names, (state.parameters, trained), strict=True):
                model.load(Parameters(model.layout, parameters.vector))
                found = task.objective.summarise(evaluate(model, rows, task.objective, plan))
                numbers |= {f"{name}_{metric}": value for metric, value in found.items()}
        return numbers

    @cached_property
    def _emulated(self) -> Layout:
        """Of what is trained of the emulator; the seed decides values, and no shapes."""
        module = self.client.task.build(0)
        return Layout.of(trainable(module), travelling_buffers(module))


def _blocks(module: nn.Module) -> list[str]:
    """The blocks of a transformer in order: the elements of one list of modules."""
    output: Sequence[str] = ()
    if is_language_model(module):
        last = module.get_output_embeddings()  # type: ignore[operator]
        output = [name for name, part in module.named_modules() if part is last]
    blocks = blocks_of(module, new_head_of(module) or output)
    lists = {name.rpartition(".")[0] for name in blocks}
    numbered = [name.rpartition(".")[2] for name in blocks] == [str(number) for number in range(len(blocks))]
    if len(lists) != 1 or not numbered:
        raise BadInput(
            f"the blocks of {type(module).__name__} are not one list ({', '.join(sorted(lists)[:3])}), so there are no "
            "first and last ones; use a transformer that is an encoder or a decoder alone"
        )
    return blocks


def _check_alike(module: nn.Module, blocks: Sequence[str]) -> None:
    """Refuse blocks that cannot follow each other in another order."""
    forms = [{n: t.shape for n, t in module.get_submodule(block).state_dict().items()} for block in blocks]
    odd = next((block for block, form in zip(blocks, forms, strict=True) if form != forms[0]), None)
    if odd is not None:
        raise BadInput(
            f"block {odd!r} of {type(module).__name__} has other tensors than {blocks[0]!r}, so none can be dropped; "
            "use a model whose blocks are alike"
        )


def _shorter(config: Any, total: int, kept: Sequence[int]) -> Any:
    """The configuration of a model that has the kept blocks alone, of `total`."""
    short = copy.deepcopy(config)
    short.num_hidden_layers = len(kept)
    for name, value in vars(config).items():  # such as layer_types, which has an entry for each block
        if isinstance(value, list | tuple) and len(value) == total and "layer" in name:
            setattr(short, name, type(value)(value[number] for number in kept))
    return short


def _renamed(
    tensors: Mapping[str, torch.Tensor], blocks: Sequence[str], new: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The tensors outside of blocks, and those of kept blocks under their new names."""
    block = re.compile(rf"({re.escape(blocks[0].rpartition('.')[0])}\.\d+)\.")
    found = {}
    for name, tensor in tensors.items():
        inside = block.match(name)
        if inside is None:
            found[name] = tensor
        elif inside[1] in new:
            found[new[inside[1]] + name[inside.end(1) :]] = tensor
    return found
