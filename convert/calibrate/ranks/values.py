"""Results of calibration for other ranks: bytes that have their structure as JSON with the values of small tensors
behind it, and large tensors beside them, which are sent as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ....errors import RankError
from ....formats.schemes import QuantizedRows
from ....quant.refine import Calibrated
from ....quant.weight_error import ErrorSums
from ..layers.linears import JobResult

_CLASSES: Final[Mapping[str, Callable[..., Any]]] = {
    kind.__name__: kind for kind in (Calibrated, ErrorSums, JobResult, QuantizedRows)
}
_DTYPES: Final = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_LENGTH: Final = 8  # bytes of the structure's length
_LARGE: Final = 4096  # bytes of a tensor that is worth a message of its own, which copies nothing

Receive = Callable[[torch.dtype, list[int]], Tensor]


def encoded(value: Any) -> tuple[Tensor, list[Tensor]]:
    """Bytes, uint8 [n], of a value, and its large tensors, contiguous on the CPU: of tensors (on the CPU once decoded),
    numbers, texts, bytes, None, and tuples, lists, mappings and results of them."""
    tensors: list[Tensor] = []
    structure = json.dumps(_encode(value, tensors)).encode()
    head = torch.frombuffer(bytearray(len(structure).to_bytes(_LENGTH, "little") + structure), dtype=torch.uint8)
    small = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors if tensor.nbytes < _LARGE]
    return torch.cat([head, *small]), [tensor.contiguous() for tensor in tensors if tensor.nbytes >= _LARGE]


def decoded(content: Tensor, receive: Receive) -> Any:
    """The value of `encoded`. receive: returns the next large tensor. Raises RankError for other bytes."""
    try:
        end = _LENGTH + int.from_bytes(content[:_LENGTH].numpy().tobytes(), "little")
        rest = _Rest(content[end:], receive)
        return _decode(json.loads(content[_LENGTH:end].numpy().tobytes()), rest)
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError, RecursionError) as error:
        raise RankError("another rank sent a result that this one cannot read: is it the same version?") from error


class _Rest:
    """The small tensors' bytes, taken from the front, and the large tensors."""

    def __init__(self, content: Tensor, receive: Receive):
        self._content, self._receive = content, receive

    def take(self, dtype: torch.dtype, shape: list[int]) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes >= _LARGE:
            return self._receive(dtype, shape)
        part, self._content = self._content[:nbytes], self._content[nbytes:]
        return part.clone().view(dtype).view(shape)  # a copy: views of other types begin at multiples of their size


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value.cpu())
        return {"tensor": [str(value.dtype), list(value.shape)]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, tuple):
        return {"tuple": [_encode(each, tensors) for each in value]}
    if isinstance(value, list):
        return [_encode(each, tensors) for each in value]
    if isinstance(value, Mapping):
        return {"map": [[_encode(key, tensors), _encode(each, tensors)] for key, each in value.items()]}
    if is_dataclass(value) and type(value).__name__ in _CLASSES:
        return {type(value).__name__: [_encode(getattr(value, field.name), tensors) for field in fields(value)]}
    raise TypeError(f"{type(value).__name__} is no result of calibration")


def _decode(value: Any, rest: _Rest) -> Any:
    if isinstance(value, list):
        return [_decode(each, rest) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return rest.take(_DTYPES[content[0]], content[1])
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "tuple":
        return tuple(_decode(each, rest) for each in content)
    if kind == "map":
        return {_decode(key, rest): _decode(each, rest) for key, each in content}
    return _CLASSES[kind](*(_decode(each, rest) for each in content))
