"""Headers of safetensors files: read with every check against hostile and truncated files, and written ahead of the
data. The `safetensors` library reads whole tensors; streaming needs byte ranges, and so a reader of its own."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..deferred import torch
from ..dtypes import ITEM_BYTES, array_code, array_dtype, torch_dtype
from ..errors import CheckpointError, NpuqError
from ..inputs.files import open_file
from ..inputs.json_text import parse_object
from ..inputs.printable import printable
from .output_files import new_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The limit of the safetensors library itself: a longer header is refused by every reader.
MAX_HEADER_BYTES = 100_000_000
# Above any model's: torch itself has 64 dimensions at most, and sizes and strides of 63 bits.
_MOST_DIMENSIONS: Final = 16
_MOST_BYTES: Final = 1 << 63
_MOST_NAME_CHARACTERS: Final = 1024
# Data begins at a multiple of this, so that tensors ordered by falling item size are all aligned in a memory map.
DATA_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in one file; `start` and `end` are absolute byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype)

    @property
    def item_bytes(self) -> int:
        """Bytes of a value."""
        return ITEM_BYTES[self.dtype]


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check the header of a safetensors file; returns its tensors (in file order) and its metadata.

    Raises CheckpointError when the file is not safetensors, is truncated or longer than its header says, when a
    tensor has an unknown dtype, a name that is no line of text, a shape that no array can have, a byte range that
    disagrees with its shape, or when ranges overlap or leave holes.
    """
    descriptor = open_file(path, CheckpointError)
    try:
        return header_of(path, descriptor)
    finally:
        os.close(descriptor)


def header_of(path: Path, descriptor: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the header of an open file; otherwise as `read_header`."""
    try:
        size = os.fstat(descriptor).st_size
        return parse_header(path, size, lambda start, count: os.pread(descriptor, count, start))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def parse_header(
    path: Path, file_size: int, read: Callable[[int, int], bytes]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the header of a remote file: `read(start, count)` returns its bytes, `path` names it in errors; otherwise as
    `read_header`."""
    header, data_start = _read_json_header(path, file_size, read)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: malformed safetensors header: __metadata__ must map strings to strings")
    tensors = [_tensor_info(path, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=attrgetter("start", "end"))
    _check_ranges(path, tensors, data_start, file_size)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _read_json_header(path: Path, file_size: int, read: Callable[[int, int], bytes]) -> tuple[dict[str, Any], int]:
    prefix = read(0, 8) if file_size >= 8 else b""
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: truncated: {file_size} bytes is no safetensors file; fetch it again")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: malformed safetensors file: header length {length} exceeds {MAX_HEADER_BYTES} bytes; "
            "fetch the file again"
        )
    if 8 + length > file_size:
        raise CheckpointError(
            f"{path}: truncated: the header needs {8 + length} bytes, the file has {file_size}; fetch it again"
        )
    where = f"{path}: malformed safetensors header (fetch the file again)"
    return parse_object(read(8, length), where, CheckpointError, _no_duplicates), 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not name.isprintable() or len(name) > _MOST_NAME_CHARACTERS:
        _check_name(path, name)
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = type(dtype) is str and type(start) is type(end) is int and 0 <= start <= end < _MOST_BYTES
        for size in shape:
            valid = valid and type(size) is int and 0 <= size < _MOST_BYTES
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"{path}: malformed safetensors header: entry of tensor {name!r}; fetch the file again")
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype[:20]}, which npuq cannot read")
    if len(shape) > _MOST_DIMENSIONS:
        raise CheckpointError(
            f"{path}: tensor {name!r} has {len(shape)} dimensions; npuq reads {_MOST_DIMENSIONS} at most"
        )
    expected = prod(shape) * ITEM_BYTES[dtype]
    # An empty tensor takes no bytes, but an array's strides are products of its other sizes.
    if expected == 0 and prod(filter(None, shape)) * ITEM_BYTES[dtype] >= _MOST_BYTES:
        raise CheckpointError(f"{path}: malformed safetensors header: tensor {name!r} has a shape beyond all memory")
    if end - start != expected:
        raise CheckpointError(
            f"{path}: malformed safetensors header: tensor {name!r} ({dtype} {list(shape)}) needs {expected} bytes "
            f"and has {end - start}; fetch the file again"
        )
    return TensorInfo(name, dtype, shape, path, data_start + start, data_start + end)


def _check_name(path: Path, name: str) -> None:
    """Refuse a name that is not one short line of text: names go into messages, tables and JSON."""
    if len(name) > _MOST_NAME_CHARACTERS:
        raise CheckpointError(
            f"{path}: a tensor's name of {len(name)} characters, which begins {name[:40]!r}; npuq reads "
            f"{_MOST_NAME_CHARACTERS} at most"
        )
    if printable(name) != name:
        raise CheckpointError(f"{path}: a tensor's name holds control characters: {name!r}; rename it")


def _check_ranges(path: Path, tensors: Sequence[TensorInfo], data_start: int, file_size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            raise CheckpointError(
                f"{path}: malformed safetensors header: tensor {tensor.name!r} overlaps another or leaves a hole; "
                "fetch the file again"
            )
        position = tensor.end
    if position > file_size:
        raise CheckpointError(
            f"{path}: truncated: its header describes {position} bytes, the file has {file_size}; fetch it again"
        )
    if position < file_size:
        raise CheckpointError(
            f"{path}: {file_size - position} bytes follow the last tensor; fetch the file again, it is not intact"
        )


def load_tensors(
    path: Path, expected: Mapping[str, tuple[str, tuple[int, ...]]], error: type[NpuqError]
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Read a file of exactly the `expected` tensors (dtype code and shape by name) into memory; returns them as arrays
    (`dtypes.array_dtype`), and the metadata.

    Dtypes and shapes are checked before any tensor is read. Raises `error`, naming the file and the tensor.
    """
    descriptor = open_file(path, error)
    try:
        found, metadata = header_of(path, descriptor)
        _check_form(path, found, expected)
        return {name: _load(descriptor, found[name]) for name in expected}, metadata
    except CheckpointError as cause:
        raise error(str(cause)) from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror}") from cause
    finally:
        os.close(descriptor)


def _check_form(
    path: Path, found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    for name in expected.keys() ^ found.keys():
        problem = "is missing" if name in expected else "does not belong there"
        raise CheckpointError(f"{path}: tensor {name!r} {problem}")
    for name, (dtype, shape) in expected.items():
        info = found[name]
        if (info.dtype, info.shape) != (dtype, shape):
            raise CheckpointError(
                f"{path}: tensor {name!r} is {info.dtype} {list(info.shape)}; config.json says {dtype} {list(shape)}"
            )


def _load(descriptor: int, info: TensorInfo) -> NDArray[Any]:
    data = np.empty(info.nbytes, np.uint8)
    read_range(descriptor, info, info.start, data.data)
    return data.view(array_dtype(info.dtype)).reshape(info.shape)


def read_range(descriptor: int, info: TensorInfo, start: int, memory: memoryview) -> None:
    """Fill `memory` with the bytes of a tensor's file from byte `start` on.

    Raises CheckpointError when the file ends too early, OSError when reading fails.
    """
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], start + done)
        if count == 0:
            raise CheckpointError(f"{info.file}: truncated while tensor {info.name!r} was read; fetch it again")
        done += count


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Encode the 8-byte length and the JSON header of tensors (name, dtype code, shape) stored back to back in this
    order.

    Padded with spaces, as the format allows, so that the data begins at a multiple of DATA_ALIGNMENT.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"a shard header of {length} bytes exceeds the format's limit; use smaller shards")
    return struct.pack("<Q", length) + text.ljust(length)


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a small file of arrays in the order given: the same content, the same bytes.

    The safetensors library orders metadata differently in every process. The file is new, replaces any of its name, and
    is on stable storage. OSError when writing fails.
    """
    parts = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    header = encode_header([(name, array_code(part.dtype), part.shape) for name, part in parts.items()], metadata)
    with new_file(path) as file:
        file.write(header)
        for part in parts.values():
            file.write(part.data)
