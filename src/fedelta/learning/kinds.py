"""Kinds of pre-trained models: which `Auto*` class of transformers loads one, and what it has to know of the labels.

Limits: sequence-to-sequence models of text only; one label an example, or a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fedelta.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDING = 1e-5  # of the largest output


class Kind(Protocol):
    """What is wanted of a model. Any class with these methods is one."""

    def auto_class(self) -> Any:
        """The class of transformers whose `from_pretrained` loads it."""
        ...

    def settings(self, labels: tuple[str, ...]) -> Mapping[str, object]:
        """Entries of the model's configuration. Raises BadInput for labels that do not suit this kind."""
        ...

    def reads_text(self) -> bool:
        """Whether inputs are rows of tokens, so that the model has to know which token is padding."""
        ...

    def check(self, model: "PreTrainedModel") -> None:
        """Raise BadInput for a loaded model, in evaluation mode, that is no use for this."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TextClassification:
    """One of several labels for a text."""

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def settings(self, labels: tuple[str, ...]) -> Mapping[str, object]:
        return {**_named(labels), "problem_type": "single_label_classification"}

    def reads_text(self) -> bool:
        return True

    def check(self, model: "PreTrainedModel") -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenClassification:
    """One of several labels for each token of a text: names, parts of speech, …"""

    def auto_class(self) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def settings(self, labels: tuple[str, ...]) -> Mapping[str, object]:
        return _named(labels)

    def reads_text(self) -> bool:
        return True

    def check(self, model: "PreTrainedModel") -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalLanguageModel:
    """The next token of a text, from those before it."""

    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def settings(self, labels: tuple[str, ...]) -> Mapping[str, object]:
        return _without(labels, self)

    def reads_text(self) -> bool:
        return True

    @torch.no_grad()
    def check(self, model: "PreTrainedModel") -> None:
        """Refuse a model that sees the tokens that it is to predict; transformers loads BERT and XLNet as that."""
        ids = torch.tensor([[0, 0], [0, 1]])
        first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
        if not torch.allclose(first, second, rtol=0, atol=_ROUNDING * float(first.abs().max())):
            raise BadInput(
                f"{type(model).__name__} reads the tokens that it is to predict; start from a model that continues "
                "texts (GPT-2, Llama, …), or use MaskedLanguageModel()"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedLanguageModel:
    """The tokens of a text that are masked, from those around them."""

    def auto_class(self) -> Any:
        from transformers import AutoModelForMaskedLM

        return AutoModelForMaskedLM

    def settings(self, labels: tuple[str, ...]) -> Mapping[str, object]:
        return _without(labels, self)

    def reads_text(self) -> bool:
        return True

    def check(self, model: "PreTrainedModel") -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceToSequence:
    """A text from another: translation, summary, answer."""

    def auto_class(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def settings(self, labels: tuple[str, ...]) -> Mapping[str, object]:
        return _without(labels, self)

    def reads_text(self) -> bool:
        return True

    def check(self, model: "PreTrainedModel") -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageClassification:
    """One of several labels for an image; the input is `pixel_values`, float32 [n, channels, height, width]."""

    def auto_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def settings(self, labels: tuple[str, ...]) -> Mapping[str, object]:
        return {**_named(labels), "problem_type": "single_label_classification"}

    def reads_text(self) -> bool:
        return False

    def check(self, model: "PreTrainedModel") -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioClassification:
    """One of several labels for a sound; of most models the input is `input_values`, float32 [n, samples]."""

    def auto_class(self) -> Any:
        from transformers import AutoModelForAudioClassification

        return AutoModelForAudioClassification

    def settings(self, labels: tuple[str, ...]) -> Mapping[str, object]:
        return _named(labels)

    def reads_text(self) -> bool:
        return False

    def check(self, model: "PreTrainedModel") -> None:
        pass


def _named(labels: tuple[str, ...]) -> dict[str, object]:
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise BadInput(f"classification needs two or more distinct labels, got {labels}")
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def _without(labels: tuple[str, ...], kind: Kind) -> dict[str, object]:
    if labels:
        raise BadInput(f"{type(kind).__name__} predicts tokens and has no labels, got {labels}; leave them out")
    return {}
