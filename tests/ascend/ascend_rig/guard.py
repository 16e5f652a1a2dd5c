"""Watches a step of the model: counts what is launched on the device, and refuses what would wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# aten operators whose result's shape or value the host must wait for, and those that bring host data to the device.
SYNCHRONISING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "nonzero_numpy",
    "is_nonzero",
    "masked_select",
    "unique",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "repeat_interleave",
    "bincount",
    "equal",
    "argwhere",
    "lift_fresh",
    "lift_fresh_copy",
}
# Tensor methods that read memory without an operator of their own.
READING = ("tolist", "item", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__")
# Allocation and bookkeeping, nothing that runs on the device.
SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "lift_fresh"}


class HostSynchronisationError(Exception):
    """A step reads a device tensor on the host, or builds one from host data."""


@dataclass(frozen=True)
class Launch:
    """One operator. strided: how many of its tensor inputs are not contiguous (a kernel may copy those first)."""

    name: str
    strided: int


class Guard(TorchDispatchMode):
    """Records launches of `npu` and `aten` operators while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and (name in SYNCHRONISING or _shape_dependent_index(name, args)):
            raise HostSynchronisationError(f"aten.{name} inside a step")
        self._inside += 1  # what the stand-in for a kernel does on the host is its own affair
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self._inside -= 1
        inputs = [value for value in _flat([*args, *(kwargs or {}).values()]) if isinstance(value, Tensor)]
        if name not in SILENT and not (func.is_view and _shares_memory(result, inputs)):
            strided = sum(not tensor.is_contiguous() for tensor in inputs)
            self.launches.append(Launch(f"{func.namespace}.{name}", strided))
        return result

    def counts(self) -> Counter[str]:
        return Counter(launch.name for launch in self.launches)


def _shares_memory(result: Any, inputs: list[Tensor]) -> bool:
    """`to`, `contiguous` or `reshape` are views only when they have nothing to do, which their result shows."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return all(value.untyped_storage().data_ptr() in memory for value in _flat([result]) if isinstance(value, Tensor))


def _shape_dependent_index(name: str, args: tuple[Any, ...]) -> bool:
    """Indexing by a mask: how many elements it gives only the device knows."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


@contextmanager
def watch() -> Iterator[Guard]:
    """A guard over everything that runs inside the block on this thread."""
    guard = Guard()
    originals = {name: getattr(Tensor, name) for name in READING}

    def refusing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not guard._inside:
                raise HostSynchronisationError(f"Tensor.{name} inside a step")
            return original(self, *args, **kwargs)

        return method

    for name, original in originals.items():
        setattr(Tensor, name, refusing(name, original))
    try:
        with guard:
            yield guard
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


def guarded(forward: Callable[[], Tensor]) -> Tensor:
    """Run a pass through the model under a guard."""
    with watch():
        return forward()
