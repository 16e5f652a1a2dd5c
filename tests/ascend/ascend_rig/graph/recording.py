"""Calls of operators recorded with the memory that they read and write, to be run again on the same memory.

A device captures addresses, not tensors. Memory made before the capture is therefore held weakly: a replay after it was
freed is an error here, and reads anything there. Memory made during the capture belongs to the graph; before every
replay it is filled with NaN, since the graphs of a pool share it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

GARBAGE = 0xFF  # four such bytes are NaN, two are NaN in bfloat16 and float16, and −1 as integers


class GraphError(Exception):
    """The device would hang, read freed memory, or refuse the capture."""


class Memory:
    """Storages that a capture has seen: those of the graph, held, and those from outside, held weakly."""

    def __init__(self) -> None:
        self._own: dict[int, torch.UntypedStorage] = {}
        self._outside: dict[int, StorageWeakRef] = {}
        self._saved: dict[int, torch.UntypedStorage] = {}

    def adopt(self, tensor: Tensor) -> None:
        """The graph's own, from its first appearance as a result."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self._outside:
            raise GraphError("memory from outside was freed during the capture that reads it")
        if place:
            self._own[place] = storage

    def owns(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._own

    def look_at(self, tensor: Tensor) -> None:
        """An operator's input: unless the graph made it, it comes from outside. Its content is kept for `restore`."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place and place not in self._own and place not in self._outside:
            self._outside[place] = StorageWeakRef(storage)
            self._saved[place] = storage.clone()

    def restore(self) -> None:
        """Undo what the recorded calls have written outside: a device runs nothing while it captures."""
        for place, content in self._saved.items():
            self.storage(place)  # it must still be there
            ctypes.memmove(place, content.data_ptr(), content.nbytes())
        self._saved.clear()

    def spoil(self) -> None:
        for storage in self._own.values():
            ctypes.memset(storage.data_ptr(), GARBAGE, storage.nbytes())

    def storage(self, place: int) -> torch.UntypedStorage:
        if not place:  # of tensors without elements
            return torch.UntypedStorage(0)
        if place in self._own:
            return self._own[place]
        found = torch.UntypedStorage._new_with_weak_ptr(self._outside[place].cdata)
        if found is None:
            raise GraphError("the graph reads memory that was freed after the capture")
        return found


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    storage: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        where = tensor.untyped_storage().data_ptr()
        return cls(where, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())

    def tensor(self, memory: Memory) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(memory.storage(self.storage), self.offset, self.shape, self.strides)


@dataclass
class Call:
    """One recorded operator. results: where those lie that it allocates, None for those that are inputs."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[Place | None]

    def run(self, memory: Memory) -> None:
        args, kwargs = (mapped(each, Place, lambda place: place.tensor(memory)) for each in (self.args, self.kwargs))
        results = tensors_of([self.function(*args, **kwargs)])
        for place, result in zip(self.results, results, strict=True):
            if place is not None:
                place.tensor(memory).copy_(result)

    def update(self, args: Any, kwargs: Any) -> None:
        """Take other arguments: those of memory must lie where they lay."""
        args, kwargs = (mapped(each, Tensor, Place.of) for each in (args, kwargs))
        tensors = [list(tensors_of([each], Place)) for each in ((args, kwargs), (self.args, self.kwargs))]
        if tensors[0] != tensors[1]:
            raise GraphError(f"{self.function}: a task group is updated with other memory")
        self.args, self.kwargs = args, kwargs


class Recorder(TorchDispatchMode):
    """Records every operator that computes. Views need no call: they are part of a tensor's place."""

    def __init__(self, record: Callable[[Call], None]):
        super().__init__()
        self.memory = Memory()
        self._record = record
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(tensors_of([args, kwargs]))
        for tensor in inputs:
            self.memory.look_at(tensor)
        placed = [mapped(each, Tensor, Place.of) for each in (args, kwargs)]
        result = func(*args, **kwargs)
        before = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        results = list(tensors_of([result]))
        fresh = [tensor.untyped_storage().data_ptr() not in before for tensor in results]
        for tensor, new in zip(results, fresh, strict=True):
            if new:
                self.memory.adopt(tensor)
            if self.memory.owns(tensor):
                self._made.append(weakref.ref(tensor))
        if any(fresh) or not func.is_view:
            places = [Place.of(tensor) if new else None for tensor, new in zip(results, fresh, strict=True)]
            self._record(Call(func, *placed, places))
        return result

    def left(self) -> list[Tensor]:
        """Tensors in the graph's memory that somebody holds on to."""
        return [tensor for made in self._made if (tensor := made()) is not None]


def unowned(tensor: Tensor) -> Tensor:
    """The same memory, which does not live longer for it."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return tensor
    place = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    with _disable_current_modes():
        borrowed = torch.frombuffer(place, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(borrowed, tensor.storage_offset(), tensor.shape, tensor.stride())


def tensors_of(values: Any, kind: type = Tensor) -> Iterator[Any]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, kind):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from tensors_of(value, kind)


def mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(item, kind, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, kind, function) for item in value)
    return value
