import gc
import io
import json
import mmap
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core import codec
from fedelta.core.errors import BadTensors

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]
U8 = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@st.composite
def any_tensor(draw):
    """A tensor of any dtype and of 0 to 3 dimensions, made of any bytes."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    length = torch.empty(shape, dtype=dtype).nbytes
    content = bytearray(draw(st.binary(min_size=length, max_size=length)))
    if dtype == torch.bool:
        content = bytearray(byte % 2 for byte in content)
    return torch.tensor(list(content), dtype=torch.uint8).view(dtype).view(shape)


named_tensors = st.dictionaries(st.text().filter(lambda name: name != "__metadata__"), any_tensor(), max_size=5)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
metas = st.dictionaries(st.text(), plain, max_size=3)


def same(one, other):
    """Equal names, dtypes, shapes and bytes (NaN included); the order of the names does not count."""

    return one.keys() == other.keys() and all(form(one[name]) == form(other[name]) for name in one)


def form(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def message(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("count", [0, 1])
def test_strides_that_do_not_count_are_none(count):
    array = np.lib.stride_tricks.as_strided(np.array([7], dtype=np.int64), (count,), (0,))
    tensors = {"x": torch.from_numpy(np.array(array, copy=False))}
    assert torch.equal(codec.decode(codec.encode(tensors))[0]["x"], tensors["x"])


def library_refuses(content):
    try:
        safetensors.torch.load(content)
    except Exception:
        return True
    return False


@given(named_tensors, metas)
def test_what_is_decoded_equals_what_was_encoded(tensors, meta):
    content = codec.encode(tensors, meta)
    decoded, decoded_meta = codec.decode(content)
    assert same(decoded, tensors)
    assert decoded_meta == meta


@given(named_tensors, metas)
def test_size_and_write_agree_with_encode(tensors, meta):
    content = codec.encode(tensors, meta)
    file = io.BytesIO()
    assert codec.size(tensors, meta) == len(content) == codec.write(file, tensors, meta)
    assert file.getvalue() == content


@given(named_tensors)
def test_bytes_are_those_of_the_safetensors_library(tensors):
    content = codec.encode(tensors, {"round": 3, "name": "ä"})
    assert content == safetensors.torch.save(tensors, {"fedelta": '{"round":3,"name":"ä"}'})
    assert same(safetensors.torch.load(content), tensors)


@given(named_tensors)
def test_files_of_the_safetensors_library_are_read(tensors):
    decoded, meta = codec.decode(safetensors.torch.save(tensors, {"format": "pt"}))
    assert same(decoded, tensors)
    assert meta == {}


def test_size_touches_no_data():
    assert 8 < codec.size({"x": torch.zeros(1).expand(2**40)}) - 4 * 2**40 < 100


def test_tensors_that_are_not_contiguous_are_written_in_order():
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": base[:1].expand(5, 4),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(base),
    }
    decoded, _ = codec.decode(codec.encode(tensors))
    assert decoded.keys() == tensors.keys()
    assert all(torch.equal(decoded[name], tensors[name]) for name in tensors)


def test_every_tensor_is_aligned_and_shares_the_memory_of_the_buffer():
    tensors = {f"{i}{dtype}": torch.zeros(24, dtype=torch.uint8).view(dtype) for i, dtype in enumerate(DTYPES)}
    buffer = bytearray(codec.encode(tensors, {"a": 1}))
    decoded, _ = codec.decode(buffer)
    assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for tensor in decoded.values())
    buffer[-24:] = bytes([1]) * 24
    last = list(decoded)[-1]
    assert decoded[last].dtype == torch.bool
    assert decoded[last].all()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_views_keep_their_buffer_alive(kind):
    decoded, _ = codec.decode(kind(codec.encode({"x": torch.arange(10_000)})))
    gc.collect()
    noise = [bytes(80_000) for _ in range(20)]  # would reuse the memory if it had been freed
    assert torch.equal(decoded["x"], torch.arange(10_000))
    del noise


def test_a_mapped_file_is_read_in_place(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(codec.encode({"x": torch.arange(5.0)}))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        decoded, _ = codec.decode(mapped)
        assert torch.equal(decoded.pop("x"), torch.arange(5.0))


def test_unaligned_data_of_another_writer_is_copied_into_place():
    data = b"\x07" + struct.pack("<2d", 1.5, -2.0)
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]},
    }
    decoded, _ = codec.decode(message(header, data))
    assert decoded["x"].tolist() == [1.5, -2.0]
    assert decoded["odd"].tolist() == [7]


@st.composite
def damaged(draw):
    """A valid message with some bytes changed, put in, taken out, or cut off."""
    content = bytearray(codec.encode(draw(named_tensors), draw(metas)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 3))
        content[at : at + length] = draw(st.binary(max_size=3) | st.sampled_from([b"0", b"-", b'"', b"[", b"1e9"]))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


sizes = st.integers(-1, 5) | st.sampled_from([2**32, 2**63, 2**64, 2**70, 1.0, True, None, "1"])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BOOL", "F32", "F64", "I64", "F4", "F8_E4M3", "f32", "", 3, None]),
        "shape": st.lists(sizes, max_size=3) | st.none() | st.just({}),
        "data_offsets": st.tuples(st.integers(0, 3), st.integers(0, 12)) | st.lists(sizes, max_size=3),
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | plain, max_size=3)


@given(st.binary(max_size=60) | damaged() | st.builds(message, headers | plain, st.binary(max_size=20)))
def test_any_bytes_give_tensors_or_one_error_and_never_more_than_the_library_takes(content):
    try:
        decoded, meta = codec.decode(content)
    except BadTensors:
        return
    assert not library_refuses(content)
    assert same(decoded, safetensors.torch.load(content))
    assert json.loads(json.dumps(meta)) == meta


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "at least 8 bytes"),
        (b"\0" * 7, "at least 8 bytes"),
        (b"\0" * 8, "not a JSON object"),
        (struct.pack("<Q", 2**63) + b"{}", "header of at most"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (message(b" {}"), "not a JSON object"),
        (message(b"[]"), "not a JSON object"),
        (message(b"{"), "not valid JSON"),
        (message(b"{}x"), "not valid JSON"),
        (message(b'{"\xff":1}'), "UTF-8"),
        (message(b'{"\\ud800":' + json.dumps(U8).encode() + b"}", b"ab"), "Unicode"),
        (message(b'{"a":' * 100_000), "nested too deeply"),
        (message(b'{"a":' + b"[" * 100_000), "nested too deeply"),
        (message({}, b"\0"), "0 bytes and 1 follow"),
        (message({"a": U8}, b"a"), "2 bytes and 1 follow"),
        (message({"a": U8}, b"abc"), "2 bytes and 3 follow"),
        (message({"a": U8, "b": U8}, b"ab"), "an overlap"),
        (message({"a": {**U8, "data_offsets": [1, 3]}}, b"abc"), "a hole"),
        (message({"a": {**U8, "data_offsets": [2, 0]}}, b"ab"), "2 bytes by its shape"),
        (message({"a": {**U8, "data_offsets": [0]}}, b"ab"), "data_offsets"),
        (message({"a": {**U8, "data_offsets": [False, 2]}}, b"ab"), "data_offsets"),
        (message({"a": {**U8, "dtype": "U9"}}, b"ab"), "unknown dtype 'U9'"),
        (message({"a": {**U8, "dtype": ["U8"]}}, b"ab"), "unknown dtype"),
        (message({"a": {**U8, "shape": [True, 2]}}, b"ab"), "list of at most 64 sizes"),
        (message({"a": {**U8, "shape": [2.0]}}, b"ab"), "number '2.0'"),
        (message({"a": {**U8, "shape": [-2, -1]}}, b"ab"), "holds '-2'"),
        (message(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "holds '-0'"),
        (message({"a": {**U8, "shape": [2] + [1] * 64}}, b"ab"), "at most 64"),
        (message({"a": {**U8, "shape": [2**62, 2**62]}}, b"ab"), "too large"),
        (message({"a": {"dtype": "U8", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}), "too large"),
        (message({"a": {**U8, "shape": [10**30]}}, b"ab"), "at most 20 digits"),
        (message(b'{"a":' + b"9" * 10_000 + b"}"), "at most 20 digits"),
        (message({"a": {**U8, "pickle": "gASV"}}, b"ab"), "alone"),
        (message({"a": {"dtype": "U8", "shape": [2]}}, b"ab"), "alone"),
        (message({"a": 1}), "alone"),
        (message(b'{"a":NaN}'), "number 'NaN'"),
        (message(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
        (message(b'{"a":%b,"\\u0061":%b}' % ((json.dumps(U8).encode(),) * 2), b"ab"), "twice"),
        (message({"__metadata__": {"a": 1}}), "object of texts"),
        (message({"__metadata__": []}), "object of texts"),
        (message({"__metadata__": {"fedelta": "[]"}}), "metadata is not a JSON object"),
        (message({"__metadata__": {"fedelta": '{"a":1,"a":1}'}}), "twice"),
        (message({"__metadata__": {"fedelta": '{"a":Infinity}'}}), "number 'Infinity'"),
        (message({"__metadata__": {"fedelta": '{"a":1e999}'}}), "number '1e999'"),
        (message({"__metadata__": {"fedelta": '{"a":"\\ud800"}'}}), "Unicode"),
        (message({"__metadata__": {"fedelta": '{"a":' + "[" * 100_000}}), "nested too deeply"),
        (message({"__metadata__": {"fedelta": '{"a":' + "9" * 10_000 + "}"}}), "not valid JSON"),
        (message({"a": {**U8, "dtype": "BOOL"}}, b"\1\2"), "bytes other than 0 and 1"),
    ],
)
def test_malformed_messages_are_refused(content, sentence):
    with pytest.raises(BadTensors, match=sentence) as caught:
        codec.decode(content)
    assert len(str(caught.value)) < 500


def test_a_header_beyond_the_limit_is_not_parsed():
    content = codec.encode({}, {"text": "x" * 1000})
    with pytest.raises(BadTensors, match="at most 500 bytes"):
        codec.decode(content, max_header=500)
    assert codec.decode(content, max_header=1100)[1] == {"text": "x" * 1000}


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_floating_point or dtype.is_complex])
def test_nan_is_refused_where_finite_is_promised(dtype):
    good, bad = torch.ones(5).to(dtype), torch.tensor([1.0, float("nan"), 1.0]).to(dtype)
    content = codec.encode({"good": good, "bad": bad, "empty": good[:0]})
    assert len(codec.decode(content)[0]) == 3
    assert len(codec.decode(content, finite={"good", "empty", "absent"})[0]) == 3
    for promised in (True, {"bad"}, ["good", "bad"]):
        with pytest.raises(BadTensors, match="'bad' holds NaN"):
            codec.decode(content, finite=promised)


@pytest.mark.parametrize("extreme", [float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_infinity_is_refused_where_finite_is_promised(dtype, extreme):
    content = codec.encode({"x": torch.tensor([1.0, extreme]).to(dtype)})
    with pytest.raises(BadTensors, match="infinity"):
        codec.decode(content, finite=True)


def test_largest_numbers_and_integers_are_finite():
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tensors = {str(d): torch.tensor([torch.finfo(d).max, torch.finfo(d).min], dtype=d) for d in dtypes}
    tensors |= {"i": torch.tensor([2**63 - 1, -(2**63)]), "b": torch.tensor(True)}
    assert codec.decode(codec.encode(tensors), finite=True)[0].keys() == tensors.keys()


@pytest.mark.parametrize(
    ("tensors", "meta", "sentence"),
    [
        ({"__metadata__": torch.zeros(1)}, {}, "rename"),
        ({"\ud800": torch.zeros(1)}, {}, "surrogate"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, {}, "convert"),
        ({"x": torch.zeros(2).to_sparse()}, {}, "dense"),
        ({"x": torch.zeros(2, device="meta")}, {}, "no data"),
        ({"x": torch.zeros([1] * 65)}, {}, "at most 64"),
        ({}, {"a": (1, 2)}, "tuple"),
        ({}, {"a": {1: 2}}, "keys, got 1"),
        ({}, {"a": [float("nan")]}, "JSON cannot carry"),
        ({}, {"a": 10**5000}, "JSON cannot carry"),
        ({}, {"a": torch.zeros(1)}, "Tensor"),
        ({}, {"a": "\udfff"}, "surrogate"),
    ],
)
def test_what_no_message_can_hold_is_refused_before_it_is_sent(tensors, meta, sentence):
    for function in (codec.encode, codec.size):
        with pytest.raises(BadTensors, match=sentence):
            function(tensors, meta)


def test_metadata_nested_without_end_is_refused():
    endless = []
    endless.append(endless)
    with pytest.raises(BadTensors, match="nested"):
        codec.encode({}, {"a": endless})
