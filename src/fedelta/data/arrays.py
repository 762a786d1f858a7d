"""Arrays from files: idx (the format of MNIST), npz, and MNIST itself.

Source of the format: LeCun, Cortes and Burges, "The MNIST database of handwritten digits", section "File formats".
"""

import gzip
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.data.hub import from_hub, in_a_line

if TYPE_CHECKING:
    from datasets import Dataset

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MEAN, _STD = 0.1307, 0.3081  # of the pixels of MNIST's training images, scaled to [0, 1]
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(path: str | Path) -> Tensor:
    """The array in an idx file, gzipped or not, of the dtype (u)int8, int16, int32, float32 or float64 it declares.

    Raises BadInput if the file is missing, is not idx, or is longer or shorter than its header says.
    """
    raw = _bytes(Path(path))
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES:
        raise BadInput(f"{path} is not an idx file: it begins with {raw[:4].hex(' ') or 'nothing'}")
    dtype, dimensions = np.dtype(_IDX_TYPES[raw[2]]), raw[3]
    start = 4 + 4 * dimensions
    if dimensions == 0 or len(raw) < start:
        raise BadInput(f"{path} has a damaged idx header: {dimensions} dimensions in a file of {len(raw)} bytes")
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4))
    size = dtype.itemsize
    for length in shape:
        size *= length
    if len(raw) - start != size:
        raise BadInput(
            f"{path} should hold {size} bytes for the shape {shape}, and holds {len(raw) - start}; copy it anew"
        )
    return _tensor(np.frombuffer(raw, dtype, offset=start).reshape(shape))


def mnist(folder: str | Path | None) -> tuple[Examples, Examples]:
    """MNIST's training and test examples: x float32 [n, 1, 28, 28] with mean 0 and deviation 1, y int64 [n] in 0..9.

    Reads the four idx files, gzipped or not, from `folder`; without one, the data set "ylecun/mnist" of the Hugging
    Face hub. Raises BadInput for a file that is missing or holds something else, and without a network.
    """
    if folder is None:
        train, test = (_from_hub(from_hub("ylecun/mnist", split)) for split in ("train", "test"))
        return train, test
    where = Path(folder).expanduser()
    train, test = (_from_files(_find(where, images), _find(where, labels)) for images, labels in _FILES.values())
    return train, test


def read_npz(path: str | Path) -> dict[str, Tensor]:
    """The arrays of an npz file by name, of the same dtype.

    Pickled objects are refused. Raises BadInput if the file is missing or damaged, or an array is not of numbers.
    """
    try:
        with Path(path).open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise BadInput(f"{path} is a single array; save it with numpy.savez under a name")
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise BadInput(f"there is no file {str(path)!r}; check the path") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path} cannot be read as npz without pickles: {in_a_line(error)}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biufc":
            raise BadInput(f"array {name!r} of {path} has dtype {array.dtype}; only numbers can become tensors")
    return {name: _tensor(array) for name, array in arrays.items()}


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError as error:
        raise BadInput(f"there is no file {str(path)!r}; check the path") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read: {in_a_line(error)}") from error


def _tensor(array: npt.NDArray[np.generic]) -> Tensor:
    """A tensor with a copy of `array`, in the byte order of this machine."""
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise BadInput(
        f"{folder} lacks {name} (or {name}.gz); put MNIST's four idx files there, or name the folder with them"
    )


def _from_files(images: Path, labels: Path) -> Examples:
    pixels, digits = read_idx(images), read_idx(labels)
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (28, 28):
        raise BadInput(
            f"{images} should hold uint8 images of 28 x 28, and holds {pixels.dtype} of {tuple(pixels.shape)}"
        )
    if digits.dtype != torch.uint8 or digits.shape != pixels.shape[:1] or (digits > 9).any():
        raise BadInput(f"{labels} should hold {len(pixels)} digits from 0 to 9, one for each image in {images.name}")
    return _examples(pixels, digits)


def _from_hub(dataset: "Dataset") -> Examples:
    pixels = np.stack([np.asarray(image, dtype=np.uint8) for image in dataset["image"]])
    return _examples(torch.from_numpy(pixels), torch.tensor(dataset["label"]))


def _examples(pixels: Tensor, digits: Tensor) -> Examples:
    x = pixels.unsqueeze(1).to(torch.float32).div_(255).sub_(_MEAN).div_(_STD)
    return Examples({"x": x}, digits.to(torch.int64))
