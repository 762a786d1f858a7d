"""The bridge to Hugging Face: a pre-trained model is built for a task, and saved for plain `transformers` and `peft`.

Limits: weights are loaded in float32; code that a repository carries is never run (`trust_remote_code` stays off).
"""

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from fedelta.core.errors import BadInput
from fedelta.learning.tuning import Full, Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MARK = "fedelta.json"  # a folder that has this file was written by `save`, and may be replaced by it
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")  # of these every tokenizer has one
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Kind(Protocol):
    """A kind of model: which `Auto*` class of transformers loads it, and what it has to know of the labels."""

    def auto_class(self) -> Any: ...

    def settings(self, labels: tuple[str, ...]) -> Mapping[str, object]:
        """Entries of the model's configuration. Raises BadInput for labels that do not suit this kind."""
        ...

    def reads_text(self) -> bool:
        """Whether inputs are rows of tokens, so that the model has to know which token is padding."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TextClassification:
    """One of several labels for a text."""

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def settings(self, labels: tuple[str, ...]) -> Mapping[str, object]:
        if len(labels) < 2 or len(set(labels)) != len(labels):
            raise BadInput(f"classification needs two or more distinct labels, got {labels}")
        return {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }

    def reads_text(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Builds a pre-trained model when called, with what is trained and shared set by `tuning`.

    A head of the checkpoint is kept if it has as many labels as `labels`; otherwise a new one is drawn, like LoRA's
    factors, from PyTorch's global generator: seed it, and two builds are equal.
    """

    source: str  # a local folder, or a name on the Hugging Face hub
    labels: tuple[str, ...]  # class i has label i
    tuning: Tuning = field(default_factory=Full)
    kind: Kind = field(default_factory=TextClassification)

    def __post_init__(self) -> None:
        self.kind.settings(self.labels)

    def __call__(self) -> nn.Module:
        """A new module, in evaluation mode. Raises BadInput if `source` is not a model of this kind."""
        source = _located(self.source)
        _check_model_folder(source)
        with _quiet(), _sentence(f"no model for {type(self.kind).__name__} could be loaded from {self.source!r}"):
            model, report = self.kind.auto_class().from_pretrained(
                source,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # the head for other labels; anything else is refused below
                output_loading_info=True,
                **self.kind.settings(self.labels),
            )
        fresh = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        self._check_weights(model, fresh, {key for key, *_ in report["mismatched_keys"]})
        if self.kind.reads_text() and getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer(self.source).pad_token_id
        return self.tuning.apply(model, sorted({key.rpartition(".")[0] for key in fresh}))

    def _check_weights(self, model: "PreTrainedModel", fresh: set[str], mismatched: set[str]) -> None:
        """Refuse a checkpoint whose body is not this model's: transformers draws at random what it does not find."""
        body = [name for name, _ in model.named_parameters() if name.startswith(f"{model.base_model_prefix}.")]
        odd = sorted(mismatched.intersection(body))
        if odd:
            raise BadInput(
                f"the weights in {self.source!r} do not have the shapes of its config.json, first {odd[0]!r}"
            )
        if 2 * len(fresh.intersection(body)) > len(body):
            raise BadInput(
                f"the weights in {self.source!r} are not those of {type(model).__name__}: "
                f"{len(fresh.intersection(body))} of the {len(body)} tensors of its body are missing"
            )


def tokenizer(source: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model; one without a padding token pads with its end-of-text token.

    Its `model_max_length` is no more than the positions in the model's config.json, which many tokenizers do not know.
    Raises BadInput if `source` has no tokenizer.
    """
    from transformers import AutoTokenizer

    with _quiet(), _sentence(f"no tokenizer could be loaded from {source!r}"):
        located = _located(source)
        _check_tokenizer_folder(located)
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(located)
        loaded.model_max_length = min(loaded.model_max_length, _positions(located, loaded.model_max_length))
    if loaded.pad_token is None:
        if loaded.eos_token is None:
            raise BadInput(f"the tokenizer of {source!r} has neither a padding nor an end-of-text token; add one to it")
        loaded.pad_token = loaded.eos_token
    return loaded


def save(
    module: nn.Module,
    folder: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    merged: bool = False,
) -> None:
    """Write `module` into `folder`, which appears whole or not at all.

    A model with LoRA becomes a peft adapter folder, next to the model's configuration; with `merged`, the factors are
    added into the weights and the whole model is written. Any other Hugging Face model is written whole. An existing
    folder is replaced if it is empty or was written by this function. Raises BadInput for another folder or module.
    """
    from peft import PeftModel
    from transformers import PreTrainedModel

    target = Path(folder).expanduser().resolve()
    _check_replaceable(target)
    whole = module
    if isinstance(module, PeftModel):
        base = module.peft_config["default"].base_model_name_or_path
        if not merged and base and Path(base).resolve() == target:
            raise BadInput(f"{target} holds the model that these LoRA factors belong to; save them into another folder")
        # merging in the module itself would change the model that may yet be trained
        whole = copy.deepcopy(module).merge_and_unload() if merged else module.get_base_model()
    if not isinstance(whole, PreTrainedModel):
        raise BadInput(f"only a Hugging Face model is saved as a folder, got {type(whole).__name__}; use torch.save")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with _quiet():
        if isinstance(module, PeftModel) and not merged:
            # "auto" would ask the hub whether the vocabulary has changed, which no tuning does
            module.save_pretrained(str(part), save_embedding_layers=False)
            (part / "README.md").unlink(missing_ok=True)  # peft's template of a model card, not filled in
            whole.config.save_pretrained(part)
        else:
            whole.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    (part / _MARK).write_text(json.dumps({"format": "adapter" if (part / "adapter_config.json").exists() else "model"}))
    _replace(part, target)


def _positions(located: str, unknown: int) -> int:
    """The positions of a model, from its configuration; `unknown` where that is not there or does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(located).get_text_config()
    except (OSError, ValueError):
        return unknown
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else unknown  # XLNet's is -1


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise BadInput(f"{target} is a file; name a folder to save into")
    if target.exists() and any(target.iterdir()) and not (target / _MARK).exists():
        raise BadInput(f"{target} holds files that were not saved by fedelta; name a new folder, or empty this one")


def _replace(part: Path, target: Path) -> None:
    """Rename `part` to `target`. A kill leaves the old folder, the new one or, for a moment, none; never a half one."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(part, target)
    shutil.rmtree(old, ignore_errors=True)


def _located(source: str) -> str:
    """The folder as an absolute path, or the name on the hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if folder.exists():
        raise BadInput(f"{source!r} is a file; give the folder that holds the model's config.json")
    if not _HUB_NAME.fullmatch(source):
        raise BadInput(f"there is no folder {source!r}; give a folder with a model, or a name on the Hugging Face hub")
    return source


def _check_model_folder(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"{source!r} holds LoRA factors, not a model; start from a model that was saved merged")
    if not (folder / "config.json").exists():
        raise BadInput(f"{source!r} is not a model folder, it has no config.json; give the folder that has one")


def _check_tokenizer_folder(source: str) -> None:
    """Refuse a folder with no tokenizer: of a configuration alone, transformers makes one that knows no word."""
    folder = Path(source)
    if folder.is_dir() and not any(next(folder.glob(files), None) for files in _TOKENIZER_FILES):
        raise BadInput(
            f"no tokenizer could be loaded from {source!r}: the folder has no tokenizer files; give the folder of a "
            "model that was saved with its tokenizer"
        )


@contextmanager
def _sentence(what: str) -> Iterator[None]:
    """Turn what transformers raises for a source that it cannot load into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".: ")
        raise BadInput(
            f"{what} ({first}); check the spelling, or download it where there is a network and give its folder"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing a report of new weights and a bar of loaded ones; downloads keep their bars."""
    from transformers.utils import logging as output

    verbosity = output.get_verbosity()
    hook = output.set_tqdm_hook(_without_bar)
    output.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        output.set_verbosity(verbosity)
        output.set_tqdm_hook(hook)


def _without_bar(_: object, args: tuple[Iterable[object], ...], kwargs: Mapping[str, object]) -> Any:
    from transformers.utils.logging import EmptyTqdm

    return EmptyTqdm(*args, **kwargs)  # type: ignore[no-untyped-call]
