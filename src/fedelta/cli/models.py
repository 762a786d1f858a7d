"""What comes of a run as files: models, in the form in which others load them, with their cards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import click
from torch import nn

from fedelta import __version__
from fedelta.algorithms.federation import Federation
from fedelta.cli.guarantees import amount, collected
from fedelta.cli.privacy import SIMULATED
from fedelta.core import codec
from fedelta.learning.adapted import origin, ranks
from fedelta.learning.pretrained import Pretrained, processor, tokenizer
from fedelta.learning.saving import base_moves, frozen_digest, loaded_by, save
from fedelta.observe.card import Card
from fedelta.observe.files import replace_file

_UNBOUNDED = "not bounded: no noise was accounted for"


@dataclass(frozen=True, kw_only=True)
class Models:
    """Of the run `title` of a federation; `privacy` is what a card says can be learned about the sites' rows."""

    title: str
    federation: Federation[Any]
    sites: int  # 0: not known
    privacy: str
    classes: tuple[str, ...] = ()  # names of the labels

    def write(self, module: nn.Module, out: Path, name: str, card: Callable[[Card], str]) -> Path:
        """Write a folder that transformers or peft loads, or the state dict of another module; in full or not at all.

        `card` makes the text of the folder's model card. Raises BadInput and OSError.
        """
        source = origin(self.federation.algorithm.task.model)
        if isinstance(source, Pretrained):
            beside = tokenizer(source.source) if source.kind.reads_text else processor(source.source)
            save(module, out / name, beside, card=card(self._card(source, module)))
            return out / name
        path = out / f"{name}.safetensors"
        replace_file(path, codec.encode({name: tensor.detach() for name, tensor in module.state_dict().items()}))
        return path

    def _card(self, source: Pretrained, module: nn.Module) -> Card:
        algorithm = self.federation.algorithm
        folder = Path(source.source).expanduser()
        base = folder.resolve().name if folder.is_dir() else source.source
        return Card(
            title=self.title.replace(source.source, base),  # a path says nothing elsewhere
            base=base,
            updates=collected(self.federation),
            privacy=self.privacy,
            base_digest=frozen_digest(module),
            tuning=str(source.tuning),
            algorithm=type(algorithm).__name__,
            sites=self.sites,
            library=loaded_by(module),
            ranks={} if base_moves(module) else ranks(module),
            tiers=getattr(algorithm, "ranks", {}),
            classes=self.classes,
        )


def kept_by(
    site: str, folder: Path, title: str, federation: Federation[Any], sites: Sequence[str]
) -> Callable[[nn.Module, int], None]:
    """For Site.keep: write the model into the folder of a site that takes part, and say where it is.

    One that this process did not write is not replaced, whenever a coordinator hands over another: it is set aside.
    """
    models = Models(title=title, federation=federation, sites=len(sites), privacy=promised(federation))
    own = False  # whether the model that is there is of this process

    def keep(module: nn.Module, round: int) -> None:
        nonlocal own
        if not own:
            _set_aside(site, folder, "model")
        path, own = models.write(module, folder, "model", lambda card: card.at_site(site, round, __version__)), True
        what = "its model" if federation.algorithm.personal else "the model"
        click.echo(f"{site}: {what} is in {path}.")

    return keep


def _set_aside(site: str, folder: Path, name: str) -> None:
    """Give the models that are there under this name, as folders or files, another one."""
    for path in (folder / name, folder / f"{name}.safetensors"):
        if path.exists():
            others = (path.with_name(f"{name}-{number}{path.suffix}") for number in count(1))
            free = next(other for other in others if not other.exists())
            path.rename(free)
            click.echo(f"{site}: the model of before is in {free}.")


def guaranteed(federation: Federation[Any]) -> str:
    """The guarantee of a model, by the ledger of the coordinator."""
    privacy = federation.privacy
    if privacy is None:
        return _UNBOUNDED
    assert federation.guard is not None
    spent = federation.guard.spent()
    text = f"{privacy.unit}-level differential privacy, epsilon {spent:.4g} at delta {privacy.delta:g}"
    return text if federation.entropy == "system" else f"{text}, {SIMULATED}"


def promised(federation: Federation[Any]) -> str:
    """The guarantee of a model, as a site knows it that has no ledger of the whole run."""
    privacy = federation.privacy
    if privacy is None:
        return _UNBOUNDED
    return f"{privacy.unit}-level differential privacy, as the experiment promises it: {amount(privacy)}"
