"""Files of one example each: class folders, and the places and bytes that stand in a column of a table."""

import json
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeGuard

from fedelta.core.errors import BadInput
from fedelta.data.hub import in_a_line

FILE, CLASS = "file", "class"  # columns of a table that is made of class folders

_CONFIG = "preprocessor_config.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Something to read one example from, and what to call it in a message."""

    name: str
    file: Path | BytesIO


def check_rows(items: Sequence[object], targets: Sized, what: str) -> None:
    """Raise BadInput unless there is something to read, with as many targets; `what` is "image" or "recording"."""
    if len(items) != len(targets):
        raise BadInput(f"{len(items)} {what}s have {len(targets)} targets; give one target for each")
    if not len(items):
        raise BadInput(f"there is no {what} to read; give at least one")


def source_of(item: object, row: int, folder: str | Path | None, what: str) -> Source:
    """What `item` stands for: a path, relative to `folder`; the bytes of a file; or a dictionary with one of the two.

    The last, with keys "bytes" and "path", is what data sets of Hugging Face have in a column of images or audio.
    Raises BadInput for anything else, and for a file that does not exist; `what` is "image" or "recording".
    """
    if isinstance(item, Mapping):
        content = item.get("bytes")
        item = item.get("path") if content is None else content
    if _is_bytes(item):
        return Source(name=f"the {what} of row {row}", file=BytesIO(item))
    if not isinstance(item, str | Path):
        raise BadInput(
            f"the {what} of row {row} is {_shown(item)}, neither a path nor the bytes of a file; drop that row"
        )
    path = Path(folder or "", item).expanduser()
    if not path.is_file():
        raise BadInput(
            f"there is no file {str(path)!r} for the {what} of row {row}; check the path, or name the folder"
        )
    return Source(name=str(path), file=path)


def class_folders(folder: str | Path, what: str) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Files, the class index of each, and the names of the classes: the sub-folders of `folder`, sorted.

    Files are sorted within a class, and those in deeper folders belong to it; hidden ones are left out. Raises BadInput
    unless there are two classes or more, each with a file; `what` is "image" or "recording".
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise BadInput(f"there is no folder {str(folder)!r}; check the path")
    classes = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if len(classes) < 2:
        raise BadInput(
            f"the folder {str(folder)!r} has {len(classes)} sub-folders; classification needs two or more, one with "
            f"the {what}s of each class"
        )
    files: list[Path] = []
    targets: list[int] = []
    for number, name in enumerate(classes):
        inside = sorted(path for path in (root / name).rglob("*") if path.is_file() and not _hidden(path, root))
        if not inside:
            raise BadInput(f"the folder {str(root / name)!r} has no {what}; fill it, or remove it")
        files += inside
        targets += [number] * len(inside)
    return files, targets, classes


def read_config(source: str | Path, instead: str) -> tuple[Mapping[str, Any], str]:
    """What a Hugging Face model's folder, or the file itself, says of the form of inputs; and its name for messages.

    Raises BadInput if there is no such file; `instead` is what to give in its place.
    """
    path = Path(source).expanduser()
    path = path / _CONFIG if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"there is no file {str(path)!r}; give an {instead}") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{str(path)!r} cannot be read as json ({in_a_line(error)}); give an {instead}") from error
    if not isinstance(config, Mapping):
        raise BadInput(f"{str(path)!r} is no configuration of a processor; give an {instead}")
    return config, repr(str(path))


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _is_bytes(item: object) -> TypeGuard[bytes]:
    return isinstance(item, bytes | bytearray | memoryview)


def _shown(item: object) -> str:
    text = repr(item)
    return text if len(text) <= 40 else text[:37] + "..."
