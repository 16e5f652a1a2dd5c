"""Bringing a step's tensors to the device: packed on the host, in one copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: every tensor of the packed buffer begins at a multiple of it. Operators of the NPU want 32."""

Tree = TypeVar("Tree")


def packed_size(tree: object) -> int:
    """Bytes of the buffer that `to_device` makes of a tree."""
    return sum(_room(tensor) for tensor in _tensors(tree))


def to_device(tree: Tree, device: torch.device, pinned: bool, into: Tensor | None = None) -> Tree:
    """Replace the host tensors in a tree of dataclasses and tuples by views of one buffer on the device.

    pinned: pack in page-locked memory, from which the device copies while the host goes on. torch's allocator keeps the
    memory until the copy is done.
    into: uint8 on the device, of `packed_size` or more, to be overwritten; None allocates. With neither `pinned` nor
    `into`, what is on the CPU and stays there is left as it is.
    """
    if into is None and not pinned and device.type == "cpu":
        return tree
    host = torch.empty(packed_size(tree), dtype=torch.uint8, pin_memory=pinned)
    for tensor, place in _places(tree, host):
        place.copy_(tensor)
    if into is None:
        buffer = host.to(device, non_blocking=True)
    else:
        buffer = into[: host.shape[0]]
        buffer.copy_(host, non_blocking=True)
    found = iter([place for _, place in _places(tree, buffer)])
    replaced: Tree = _replaced(tree, found)
    return replaced


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _places(tree: object, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every tensor of the tree, and its place in the buffer."""
    start = 0
    for tensor in _tensors(tree):
        yield tensor, buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _room(tensor)


def _tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    else:
        for part in _parts(tree):
            yield from _tensors(part)


def _parts(tree: object) -> list[Any]:
    if isinstance(tree, tuple):
        return list(tree)
    return [getattr(tree, field.name) for field in fields(tree)] if is_dataclass(tree) else []


def _replaced(tree: Any, found: Iterator[Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return next(found)
    if isinstance(tree, tuple):
        return tuple(_replaced(part, found) for part in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{field.name: _replaced(getattr(tree, field.name), found) for field in fields(tree)})
    return tree
