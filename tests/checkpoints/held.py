"""The memory that loaded weights hold: the tensors behind any object, and their bytes, each counted once."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from npuq.native.mapped import MappedFiles


def held_bytes(root: object, files: MappedFiles, unread: tuple[str, ...] = ()) -> tuple[int, int]:
    """Bytes of all tensors behind `root`: those in maps of `files`, and all others. Views of one memory count once.

    unread: names of fields that are left out.
    """
    maps = [_span(ctypes.addressof(ctypes.c_char.from_buffer(held)), len(held)) for held in files._maps.values()]
    spans = [_span(tensor.data_ptr(), _extent(tensor)) for tensor in tensors_behind(root, unread)]
    mapped = [span for span in spans if any(start <= span[0] < stop for start, stop in maps)]
    return _union(mapped), _union(set(spans) - set(mapped))


def tensors_behind(root: object, unread: tuple[str, ...] = ()) -> Iterator[Tensor]:
    """Every tensor that an object reaches through fields, attributes and containers."""
    seen: set[int] = set()
    left: list[Any] = [root]
    while left:
        held = left.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, Tensor):
            yield held
        elif isinstance(held, (list, tuple)):
            left += held
        elif isinstance(held, dict):
            left += held.values()
        elif is_dataclass(held):
            left += [getattr(held, field.name) for field in fields(held) if field.name not in unread]


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last, those between its rows included."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _span(start: int, length: int) -> tuple[int, int]:
    return start, start + length


def _union(spans: Iterable[tuple[int, int]]) -> int:
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
