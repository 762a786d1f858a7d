"""Named tensors as bytes: the one format of the wire and of checkpoints.

The layout is that of safetensors (github.com/huggingface/safetensors, "Format"): the length of the header (u64,
little-endian), a JSON header, the tensors' memory without holes. The safetensors library reads what is written here,
and what it writes is read here. Plain metadata travels under the key "fedelta" of the header's `__metadata__`; other
keys are ignored.

Reading is stricter than the library: duplicate names, unknown fields and booleans that are neither 0 nor 1 are refused
too, and nothing is allocated whose size is not bounded by the bytes at hand.

Limits: little-endian hosts; dtypes of less than a byte (F4, F6) are refused; strided tensors only.
"""

import functools
import json
import math
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

from fedelta.core.errors import BadTensors
from fedelta.core.messages import Meta, Plain, Tensors

Buffer = bytes | bytearray | memoryview  # and whatever else exports contiguous memory, such as mmap.mmap

MAX_HEADER = 8 * 2**20  # bytes; parsing JSON takes some twenty times its size

# In the order of the file: wide dtypes first, so that every tensor is aligned.
_NAMES: Mapping[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_NAMES)}
_SHORT = 2**14  # bytes of a header that is worth remembering
_METADATA = "__metadata__"
_MAX_DIMS = 64  # PyTorch's own limit
_MAX_BYTES = 2**63 - 1  # so that sizes and strides fit into PyTorch's integers


def encode(tensors: Tensors, meta: Meta | None = None) -> bytes:
    """`tensors` and `meta` as one message. Raises BadTensors for what the format cannot hold."""
    return b"".join(chunks(tensors, meta))


def chunks(tensors: Tensors, meta: Meta | None = None) -> Iterator[bytes | memoryview]:
    """The message piece by piece: the header, then each tensor's own memory (a copy only if it is not contiguous)."""
    ordered = _ordered(tensors)
    yield _header(ordered, meta)
    for _, tensor in ordered:
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # by its own strides: NumPy gives arrays of one or no element others, which do not count
        yield plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data


def write(file: BinaryIO, tensors: Tensors, meta: Meta | None = None) -> int:
    """Write the message to a buffered binary file, straight from the tensors' memory; its length in bytes."""
    return sum(file.write(chunk) for chunk in chunks(tensors, meta))


def size(tensors: Tensors, meta: Meta | None = None) -> int:
    """Length of the message in bytes, found without touching a tensor's data."""
    return len(_header(_ordered(tensors), meta)) + sum(tensor.nbytes for tensor in tensors.values())


def decode(
    buffer: Buffer, *, finite: Collection[str] | bool = False, max_header: int = MAX_HEADER
) -> tuple[dict[str, Tensor], dict[str, Plain]]:
    """Tensors and metadata of a message; the tensors are views of `buffer`, in the order of the message.

    `finite` names the tensors that must hold neither NaN nor infinity (True: all); a name that is not there is no
    error. Raises BadTensors for anything but one well-formed message. The tensors of a read-only buffer must not be
    written to: PyTorch has no read-only tensors, so such a write changes the buffer or ends the process.
    """
    view = memoryview(buffer)
    if view.nbytes < 8:
        raise BadTensors(f"a message has at least 8 bytes, got {view.nbytes}")
    raw = view.cast("B")
    length = int.from_bytes(raw[:8], "little")
    if length > max_header:
        raise BadTensors(f"a header of at most {max_header} bytes is read, this one claims {length}")
    if length > raw.nbytes - 8:
        raise BadTensors(f"the header claims {length} bytes and {raw.nbytes - 8} follow: the message is truncated")
    entries, meta = _parse_header(bytes(raw[8 : 8 + length]))
    _check_offsets(entries, raw.nbytes - 8 - length)
    data = _bytes_tensor(raw[8 + length :])
    tensors = {entry.name: entry.view_of(data) for entry in entries}
    for name, tensor in tensors.items():
        if (finite if isinstance(finite, bool) else name in finite) and not _all_finite(tensor):
            raise BadTensors(f"tensor {short(name)} holds NaN or infinity where finite numbers are promised")
    return tensors, meta


class _Entry:
    """One tensor of a header, checked for form but not yet for its place in the data."""

    __slots__ = ("begin", "dtype", "end", "name", "shape")

    def __init__(self, name: str, plain: object) -> None:
        if not isinstance(plain, dict) or plain.keys() != {"dtype", "shape", "data_offsets"}:
            raise BadTensors(f"tensor {short(name)} is not described by dtype, shape and data_offsets alone")
        dtype, shape, offsets = plain["dtype"], plain["shape"], plain["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise BadTensors(f"tensor {short(name)} has the unknown dtype {short(dtype)}; known are {list(_DTYPES)}")
        if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
            raise BadTensors(f"tensor {short(name)} has the shape {short(shape)}, not a list of at most 64 sizes")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise BadTensors(f"tensor {short(name)} has the data_offsets {short(offsets)}, not [begin, end]")
        self.name, self.dtype, self.shape = name, _DTYPES[dtype], tuple(shape)
        self.begin, self.end = offsets
        # Strides are products of sizes even where a size of zero makes the tensor empty.
        if math.prod(max(count, 1) for count in shape) * self.dtype.itemsize > _MAX_BYTES:
            raise BadTensors(f"tensor {short(name)} has the shape {short(shape)}, which is too large")
        nbytes = math.prod(shape) * self.dtype.itemsize
        if self.end - self.begin != nbytes:
            raise BadTensors(
                f"tensor {short(name)} takes {nbytes} bytes by its shape and {self.end - self.begin} by its offsets"
            )

    def view_of(self, data: Tensor) -> Tensor:
        """This tensor in the data of its message; a copy only where a foreign writer left it unaligned."""
        if self.begin == self.end:
            return torch.empty(self.shape, dtype=self.dtype)
        own = data[self.begin : self.end]
        if own.data_ptr() % self.dtype.itemsize or self.begin % self.dtype.itemsize:
            own = own.clone()
        if self.dtype == torch.bool and int(own.max()) > 1:
            raise BadTensors(f"tensor {short(self.name)} of booleans holds bytes other than 0 and 1")
        return own.view(self.dtype).view(self.shape)


def _ordered(tensors: Tensors) -> list[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise BadTensors(f"tensor {short(name)} has dtype {tensor.dtype}, which no message carries; convert it")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise BadTensors(f"tensor {short(name)} is sparse or has no data; a message carries dense tensors")
        if tensor.ndim > _MAX_DIMS:
            raise BadTensors(f"tensor {short(name)} has {tensor.ndim} dimensions; a message carries at most 64")
    if _METADATA in tensors:
        raise BadTensors(f"a tensor cannot be called {_METADATA!r}; rename it")
    return sorted(tensors.items(), key=lambda item: (_RANK[item[1].dtype], item[0]))


def _header(ordered: list[tuple[str, Tensor]], meta: Meta | None) -> bytes:
    parts = [_to_json({_METADATA: {"fedelta": _dump_meta(meta)}})] if meta else []
    parts.append(_describe(tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered)))
    text = b"{" + b",".join(filter(None, parts)) + b"}"
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text


@functools.lru_cache(maxsize=64)  # the sites of a round send tensors of the same form
def _describe(forms: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> bytes:
    entries: dict[str, object] = {}
    end = 0
    for name, dtype, shape in forms:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    return _to_json(entries)


def _to_json(members: Mapping[str, object]) -> bytes:
    """The members of an object as compact JSON, without the braces around them."""
    try:
        return json.dumps(members, ensure_ascii=False, separators=(",", ":"))[1:-1].encode()
    except UnicodeEncodeError:
        raise BadTensors("a name or a text holds half of a surrogate pair, which is no Unicode text") from None


def _dump_meta(meta: Meta) -> str:
    try:
        _check_plain(meta)
        return json.dumps(dict(meta), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise BadTensors("the metadata is nested too deeply") from None
    except ValueError as error:  # NaN, infinity, or an integer of thousands of digits
        raise BadTensors(f"the metadata holds a number that JSON cannot carry: {error}") from None


def _check_plain(value: object) -> None:
    """JSON would turn a tuple into a list and a key 1 into "1"; what comes out must equal what went in."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise BadTensors(f"metadata has text as keys, got {short(key)}")
            _check_plain(item)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise BadTensors(
            f"metadata holds None, bool, int, float, str, list and dict, got {type(value).__name__} {short(value)}"
        )


def _parse_header(text: bytes) -> tuple[Sequence[_Entry], dict[str, Plain]]:
    """The entries in the order of their offsets, and the metadata."""
    entries, own = (_remembered if len(text) <= _SHORT else _members)(text)
    meta = {} if own is None else _parse_object(own.encode(), "metadata", int, _finite_float)
    return entries, meta


def _members(text: bytes) -> tuple[Sequence[_Entry], str | None]:
    """The entries in the order of their offsets, and the text of the metadata."""
    header = _parse_object(text, "header", _header_int, _no_number)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadTensors(f"the header's {_METADATA} is not an object of texts")
    entries = [_Entry(name, plain) for name, plain in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    return tuple(entries), metadata.get("fedelta")


_remembered = functools.lru_cache(maxsize=64)(_members)  # many sites send the same header


def _parse_object(
    text: bytes, what: str, parse_int: Callable[[str], int], parse_float: Callable[[str], float]
) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise BadTensors(f"the {what} is not a JSON object")
    try:
        parsed = json.loads(
            text.decode(),
            object_pairs_hook=_distinct,
            parse_int=parse_int,
            parse_float=parse_float,
            parse_constant=_no_number,
        )
        if b"\\u" in text:  # an escaped half of a surrogate pair is JSON, but no text
            json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError:
        raise BadTensors(f"the {what} is nested too deeply") from None
    except UnicodeError:
        raise BadTensors(f"the {what} is not Unicode text in UTF-8") from None
    except ValueError as error:
        raise BadTensors(f"the {what} is not valid JSON: {error}") from None
    return dict(parsed)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadTensors("a name occurs twice in the header or the metadata")
    return found


def _header_int(digits: str) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", digits):
        raise BadTensors(f"the header holds {short(digits)} where a size of at most 20 digits belongs")
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _no_number(digits)


def _no_number(digits: str) -> NoReturn:
    raise BadTensors(f"the header or the metadata holds the number {short(digits)}, which does not belong there")


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)  # a bool is no size


def _check_offsets(entries: Sequence[_Entry], available: int) -> None:
    end = 0
    for entry in entries:
        if entry.begin != end:
            kind = "a hole" if entry.begin > end else "an overlap"
            raise BadTensors(f"tensor {short(entry.name)} starts at {entry.begin} and not at {end}: {kind} in the data")
        end = entry.end
    if end != available:
        raise BadTensors(f"the tensors take {end} bytes and {available} follow the header")


class _Writable:
    """Read-only memory, presented to numpy as writable: PyTorch warns of any other, and warning filters are global."""

    def __init__(self, owner: "np.ndarray[Any, Any]") -> None:
        self.owner = owner  # keeps the memory alive
        address, _ = owner.__array_interface__["data"]
        self.__array_interface__ = {**owner.__array_interface__, "data": (address, False)}


def _bytes_tensor(raw: memoryview) -> Tensor:
    """`raw` as a tensor of bytes that shares and holds its memory."""
    if raw.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    array = np.frombuffer(raw, dtype=np.uint8)
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


def _all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; the extremes tell, and are found fifty times faster than `isfinite`."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # no arithmetic on 8-bit floats; widened piece by piece
        return all(bool(piece.float().isfinite().all()) for piece in torch.split(tensor.reshape(-1), 2**20))
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))


_abridged = reprlib.Repr()  # for messages: cut where a value is long, and safe where it is deep
_abridged.maxlevel, _abridged.maxstring, _abridged.maxlong, _abridged.maxother = 2, 100, 30, 100
short = _abridged.repr
