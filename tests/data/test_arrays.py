"""Arrays: idx files byte by byte, npz files, MNIST."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedelta.core.errors import BadInput
from fedelta.data.arrays import _from_hub, mnist, read_idx, read_npz

CODES = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}
arrays = st.sampled_from(sorted(CODES)).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5))
)


def idx(array: np.ndarray) -> bytes:
    """The idx format, written element by element as its description has it."""
    letter = {"uint8": "B", "int8": "b", "int16": "h", "int32": "i", "float32": "f", "float64": "d"}[array.dtype.name]
    head = bytes([0, 0, CODES[array.dtype.name], array.ndim]) + b"".join(struct.pack(">i", n) for n in array.shape)
    return head + b"".join(struct.pack(f">{letter}", value) for value in array.flatten().tolist())


@given(arrays, st.booleans())
def test_read_idx_gives_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, zipped: bool
) -> None:
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    tensor = read_idx(path)
    assert tensor.dtype == torch.from_numpy(array).dtype
    np.testing.assert_array_equal(tensor.numpy(), array)


GOOD = idx(np.arange(6, dtype=np.int16).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an idx file: it begins with nothing"),
        (b"\0\0\x08", "begins with 00 00 08"),
        (b"\x01" + GOOD[1:], "is not an idx file"),
        (b"\0\0\x07\x01" + GOOD[4:], "begins with 00 00 07 01"),
        (b"\0\0\x08\0", "damaged idx header"),
        (GOOD[:10], "2 dimensions in a file of 10 bytes"),
        (GOOD[:-1], r"should hold 12 bytes for the shape \(2, 3\), and holds 11"),
        (GOOD + b"\0", "and holds 13"),
        (b"\0\0\x0e\x04" + b"\xff" * 16, "should hold"),
        (gzip.compress(GOOD, mtime=0)[:-5], "cannot be read"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"\xff\xff" + gzip.compress(GOOD, mtime=0)[14:], "cannot be read"),
    ],
)
def test_read_idx_refuses_anything_else(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_idx(tmp_path / "file")


@given(st.binary(max_size=40))
def test_read_idx_survives_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(b"\0\0" + content)
    try:
        tensor = read_idx(path)
    except BadInput:
        return
    assert (
        path.read_bytes()[4 + 4 * tensor.ndim :]
        == tensor.numpy().astype(tensor.numpy().dtype.newbyteorder(">")).tobytes()
    )


def write_mnist(folder: Path, train: int, test: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    written = {}
    for name, count in (("train", train), ("t10k", test)):
        written[f"{name}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        written[f"{name}-labels-idx1-ubyte"] = random.integers(0, 10, count, dtype=np.uint8)
    for name, array in written.items():
        (folder / name).write_bytes(idx(array))
    return written


def test_mnist_from_plain_and_gzipped_files(tmp_path: Path) -> None:
    written = write_mnist(tmp_path, 5, 3)
    plain = tmp_path / "train-images-idx3-ubyte"
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    train, test = mnist(tmp_path)
    for examples, name in ((train, "train"), (test, "t10k")):
        x, pixels = examples.inputs["x"], written[f"{name}-images-idx3-ubyte"]
        assert x.dtype == torch.float32
        assert x.shape == (len(pixels), 1, 28, 28)
        np.testing.assert_allclose(x[:, 0].numpy(), (pixels / 255 - 0.1307) / 0.3081, rtol=1e-5, atol=1e-6)
        assert examples.targets.dtype == torch.int64
        assert examples.targets.tolist() == written[f"{name}-labels-idx1-ubyte"].tolist()


def test_mnist_files_that_are_missing_or_wrong(tmp_path: Path) -> None:
    written = write_mnist(tmp_path, 5, 3)
    labels, images = tmp_path / "t10k-labels-idx1-ubyte", tmp_path / "t10k-images-idx3-ubyte"
    labels.unlink()
    with pytest.raises(BadInput, match=r"lacks t10k-labels-idx1-ubyte \(or t10k-labels-idx1-ubyte.gz\); put"):
        mnist(tmp_path)
    for wrong in (np.zeros(4, np.uint8), np.full(3, 10, np.uint8), np.zeros(3, np.int32), np.zeros((3, 1), np.uint8)):
        labels.write_bytes(idx(wrong))
        with pytest.raises(BadInput, match="should hold 3 digits from 0 to 9"):
            mnist(tmp_path)
    labels.write_bytes(idx(written["t10k-labels-idx1-ubyte"]))
    images.write_bytes(idx(np.zeros((3, 28, 27), np.uint8)))
    with pytest.raises(BadInput, match="should hold uint8 images of 28 x 28"):
        mnist(tmp_path)
    with pytest.raises(BadInput, match="lacks train-images-idx3-ubyte"):
        mnist(tmp_path / "nowhere")


def test_mnist_itself(shared: Callable[[str], Path]) -> None:
    train, test = mnist(shared("mnist"))
    assert (len(train), len(test)) == (60_000, 10_000)
    assert torch.bincount(train.targets).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    x = train.inputs["x"]
    assert abs(x.mean(dtype=torch.float64).item()) < 1e-3
    assert abs(x[:10_000].std().item() - 1) < 0.01


def test_mnist_from_the_hub_needs_a_network() -> None:
    with pytest.raises(BadInput, match="cannot load 'ylecun/mnist' from the Hugging Face hub"):
        mnist(None)


def test_images_of_a_data_set_become_the_same_examples(tmp_path: Path) -> None:
    written = write_mnist(tmp_path, 5, 3)
    pixels, digits = written["train-images-idx3-ubyte"], written["train-labels-idx1-ubyte"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    data_set = datasets.Dataset.from_dict({"image": list(pixels), "label": digits.tolist()}, features)
    assert _from_hub(data_set).digest() == mnist(tmp_path)[0].digest()


def test_read_npz(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    given = {
        "x": np.arange(6, dtype=">f4").reshape(2, 3),
        "transposed": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "flag": np.array(True),
    }
    np.savez_compressed(path, **given)  # type: ignore[arg-type]
    tensors = read_npz(path)
    assert list(tensors) == list(given)
    assert tensors["x"].dtype == torch.float32
    assert tensors["flag"].dtype == torch.bool
    for name, array in given.items():
        assert tensors[name].tolist() == array.tolist()


def test_read_npz_refuses_what_is_not_tensors(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    with pytest.raises(BadInput, match="there is no file"):
        read_npz(path)
    np.savez(path, words=np.array(["a", "b"]))
    with pytest.raises(BadInput, match=r"array 'words' .*only numbers"):
        read_npz(path)
    np.savez(path, things=np.array([{}, None], dtype=object))
    with pytest.raises(BadInput, match="cannot be read as npz without pickles"):
        read_npz(path)
    for content in (b"", b"something else", path.read_bytes()[:-40], b"PK\x03\x04" + b"\0" * 40):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="cannot be read as npz"):
            read_npz(path)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(BadInput, match="single array"):
        read_npz(tmp_path / "single.npy")
