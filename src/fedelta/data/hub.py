"""Data sets of the Hugging Face hub, or saved by `datasets.save_to_disk`, one split of each.

Limits: a data set with several configurations cannot be named; save the one you need with `save_to_disk` and read that.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedelta.core.errors import BadInput

if TYPE_CHECKING:
    from datasets import Dataset


def from_hub(name: str, split: str | None = None) -> "Dataset":
    """The split of the data set `name`, downloaded or from the cache; see `chosen` for None.

    Raises BadInput if it does not exist, cannot be reached, or lacks the split.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise BadInput(
            f"cannot load {name!r} from the Hugging Face hub, and no file or folder has this name: {in_a_line(error)}; "
            "check the name and the network, or give a local path"
        ) from error
    return chosen(loaded, split, name)


def from_folder(folder: Path, split: str | None = None) -> "Dataset":
    """The split of what `datasets.save_to_disk` wrote to `folder`. Raises BadInput if it is anything else."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"{folder} is not a folder that datasets.save_to_disk wrote ({in_a_line(error)}); give a file in it"
        ) from error
    return chosen(loaded, split, str(folder))


def chosen(loaded: Any, split: str | None, name: str) -> "Dataset":
    """One split; for None "train", or the only one. Raises BadInput if there is no such split."""
    if not isinstance(loaded, dict):
        if split is not None:
            raise BadInput(f"{name!r} has no splits, and {split!r} was asked for; leave the split out")
        return loaded
    wanted = split if split is not None else next(iter(loaded)) if len(loaded) == 1 else "train"
    if wanted not in loaded:
        raise BadInput(f"{name!r} has no split {wanted!r}; it has {', '.join(map(repr, loaded))}")
    return loaded[wanted]


def in_a_line(error: BaseException) -> str:
    """The message of an exception without line breaks and final full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
