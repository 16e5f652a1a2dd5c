"""Safetensors headers: agreement with the safetensors library, and every kind of damage named."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from npuq.dtypes import CODES, code_of, torch_dtype
from npuq.errors import CheckpointError
from npuq.formats.safetensors import DATA_ALIGNMENT, encode_header, read_header
from npuq.inputs.printable import printable

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(min_size=1, max_size=8).map(printable)


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(CODES), SHAPES), max_size=6))
def test_what_we_write_the_library_reads(tmp_path_factory, tensors) -> None:
    tensors.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("safetensors") / "a.safetensors"
    entries = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    values = [torch.randint(0, 2, shape).to(torch_dtype(dtype)) for _, dtype, shape in entries]
    header = encode_header(entries, {"format": "pt"})
    assert len(header) % DATA_ALIGNMENT == 0
    path.write_bytes(
        header
        + b"".join(
            bytes(value.view(torch.uint8).flatten().tolist() if value.dim() else value[None].view(torch.uint8).tolist())
            for value in values
        )
    )
    loaded = load_file(path)
    infos, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert set(loaded) == set(infos) == set(tensors)
    for (name, dtype, shape), value in zip(entries, values, strict=True):
        assert torch.equal(
            loaded[name].view(torch.uint8) if shape else loaded[name], value.view(torch.uint8) if shape else value
        )
        assert (infos[name].dtype, infos[name].shape) == (dtype, shape)


def test_what_the_library_writes_we_read(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.int8), "c": torch.randn(2).bfloat16()}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"k": "v"})
    infos, metadata = read_header(path)
    data = path.read_bytes()
    assert metadata == {"k": "v"}
    for name, value in tensors.items():
        info = infos[name]
        assert info.dtype == code_of(value.dtype)
        stored = torch.frombuffer(bytearray(data[info.start : info.end]), dtype=value.dtype).reshape(info.shape)
        assert torch.equal(stored, value)


def header_bytes(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x08\x00", "truncated"),
        (struct.pack("<Q", 2**60) + b"{}", "header length"),
        (struct.pack("<Q", 500) + b"{}", "truncated"),
        (header_bytes(b"{not json"), "malformed"),
        (header_bytes(b"[" * 100_000), "malformed"),
        (header_bytes([1, 2]), "not a JSON object"),
        (header_bytes(b'{"a": {}, "a": {}}'), "twice"),
        (header_bytes(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [], "data_offsets": [0, 4]}}'), "twice"),
        (header_bytes({"\ud800": GOOD}, b"\0" * 8), "lone surrogate"),
        (header_bytes({"\x1b[31m": GOOD}, b"\0" * 8), "control characters: '.x1b"),
        (header_bytes({"a\nb": GOOD}, b"\0" * 8), "control characters"),
        (header_bytes({"a" * 2000: GOOD}, b"\0" * 8), "name of 2000 characters"),
        (header_bytes({"a": {**GOOD, "dtype": ["F32"]}}, b"\0" * 8), "entry of tensor 'a'"),
        (header_bytes({"a": {**GOOD, "dtype": {}}}, b"\0" * 8), "entry of tensor 'a'"),
        (header_bytes({"a": {**GOOD, "shape": [True, 2]}}, b"\0" * 8), "entry of tensor 'a'"),
        (header_bytes({"a": {**GOOD, "shape": [2.0]}}, b"\0" * 8), "entry of tensor 'a'"),
        (header_bytes(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'), "NaN is no number"),
        (header_bytes({"a": {**GOOD, "shape": [2**63, 0], "data_offsets": [0, 0]}}), "entry of tensor 'a'"),
        (header_bytes({"a": {**GOOD, "shape": [10**30, 0], "data_offsets": [0, 0]}}), "entry of tensor 'a'"),
        (header_bytes({"a": {**GOOD, "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}), "beyond all memory"),
        (header_bytes({"a": {**GOOD, "shape": [2**61, 0], "data_offsets": [0, 0]}}), "beyond all memory"),
        (header_bytes({"a": {**GOOD, "shape": [1] * 17}}, b"\0" * 8), "17 dimensions"),
        (header_bytes({"a": {**GOOD, "shape": [10**18] * 10**6}}, b"\0" * 8), "1000000 dimensions"),
        (header_bytes({"a": {**GOOD, "data_offsets": [0, 2**64]}}, b"\0" * 8), "entry of tensor 'a'"),
        (header_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
        (header_bytes({"a": GOOD}, b"\0" * 7), "truncated"),
        (header_bytes({"a": GOOD}, b"\0" * 9), "follow the last tensor"),
        (header_bytes({"a": {**GOOD, "dtype": "F6_E2M3"}}, b"\0" * 8), "dtype F6_E2M3"),
        (header_bytes({"a": {**GOOD, "shape": [3]}}, b"\0" * 8), "needs 12 bytes"),
        (header_bytes({"a": {**GOOD, "shape": [-2]}}, b"\0" * 8), "entry of tensor 'a'"),
        (header_bytes({"a": {**GOOD, "shape": "2"}}, b"\0" * 8), "entry of tensor 'a'"),
        (header_bytes({"a": {**GOOD, "data_offsets": [8, 0]}}, b"\0" * 8), "entry of tensor 'a'"),
        (header_bytes({"a": {"dtype": "F32"}}, b"\0" * 8), "entry of tensor 'a'"),
        (header_bytes({"a": GOOD, "b": GOOD}, b"\0" * 8), "overlaps"),
        (header_bytes({"a": {**GOOD, "data_offsets": [8, 16]}}, b"\0" * 16), "leaves a hole"),
    ],
)
def test_damage_is_named_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "broken.safetensors" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@given(st.binary(max_size=200))
def test_no_bytes_escape_as_anything_but_a_checkpoint_error(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(content) - 20)) + content)
    try:
        read_header(path)
    except CheckpointError:
        return
    load_file(path)
