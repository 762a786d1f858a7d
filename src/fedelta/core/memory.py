"""What a site keeps between rounds: control variates, error feedback, personal heads.

Versioned by round, so that a coordinator that goes back to an earlier round (a resume, a reply that never arrived)
finds the site as it was: a request says from which round the site continues. Two versions are kept.

In this process, or in files (the layout of `core/codec.py`), so that thousands of sites need little memory and any
process can go on with a site. Files are replaced in full or not at all, but not flushed to the disk: they survive the
end of a process, not a power cut.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fedelta.core import codec
from fedelta.core.errors import BadInput

_EMPTY = -1  # the round of the memory that every site starts with


class Memory:
    """Named tensors per round, in the order of their names; round -1 is the empty memory that every site starts with.

    With a `folder` of this site's own, each version is a file in it, made when something is kept for the first time;
    the tensors are then mapped, and on the CPU. One process at a time may work with it.
    """

    __slots__ = ("_kept",)

    def __init__(self, folder: Path | None = None) -> None:
        self._kept: _Versions = _Here() if folder is None else _Files(folder)

    def at(self, round: int) -> Mapping[str, Tensor]:
        """The memory as it was left by `round`. Raises BadInput if that version is no longer (or not yet) there."""
        self._check(round)
        return self._kept.read(round)

    def commit(self, base: int, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` as the version that `round` leaves, and `base`, from which it was made; forget the others.

        Raises BadInput as `at(base)` does, and BadTensors for what the codec cannot hold.
        """
        self._check(base)
        codec.size(tensors)  # so that what can be kept does not depend on where
        self._kept.replace(base, round, tensors)

    def _check(self, round: int) -> None:
        rounds = self._kept.rounds()
        if round not in rounds:
            raise BadInput(f"this site has no memory of round {round}, only of {sorted(rounds)}")


class _Versions(Protocol):
    def rounds(self) -> Collection[int]: ...

    def read(self, round: int) -> Mapping[str, Tensor]:
        """A version that is there."""
        ...

    def replace(self, base: int, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep `base`, which is there, and `tensors` as `round`; nothing else."""
        ...


class _Here:
    """Versions in this process."""

    __slots__ = ("_versions",)

    def __init__(self) -> None:
        self._versions: dict[int, dict[str, Tensor]] = {_EMPTY: {}}

    def rounds(self) -> Collection[int]:
        return self._versions.keys()

    def read(self, round: int) -> Mapping[str, Tensor]:
        return self._versions[round]

    def replace(self, base: int, round: int, tensors: Mapping[str, Tensor]) -> None:
        copies = {name: tensors[name].detach().clone() for name in sorted(tensors)}
        self._versions = {base: dict(self._versions[base]), round: copies}


class _Files:
    """Versions in files, each named by its round."""

    __slots__ = ("_folder",)

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rounds(self) -> Collection[int]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            names = []
        return {int(name) for name in names if not name.startswith(".")} or {_EMPTY}

    def read(self, round: int) -> Mapping[str, Tensor]:
        path = self._folder / str(round)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            if round == _EMPTY:  # nothing was ever kept
                return {}
            raise
        # A private mapping: loaded where it is looked at, writes into it stay in this process, no descriptor is open.
        raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        tensors, _ = codec.decode(raw.numpy().data)
        return {name: tensors[name] for name in sorted(tensors)}

    def replace(self, base: int, round: int, tensors: Mapping[str, Tensor]) -> None:
        self._folder.mkdir(exist_ok=True)
        if base == _EMPTY and base != round and not (self._folder / str(base)).exists():
            self._write(base, {})
        self._write(round, tensors)
        for other in set(self.rounds()) - {base, round}:
            (self._folder / str(other)).unlink()

    def _write(self, round: int, tensors: Mapping[str, Tensor]) -> None:
        """In full or not at all; a process that was killed here leaves a file that the next one writes over."""
        part = self._folder / ".part"
        with part.open("wb") as file:
            codec.write(file, tensors)
        part.replace(self._folder / str(round))
