"""Storage of a checkpoint's bytes: local files, or a window on a hub (`hub/remote.py`)."""

from __future__ import annotations

import os
import threading
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..deferred import torch
from ..errors import CheckpointError
from ..inputs.files import FileStamp, open_file
from ..native.mapped import MappedFiles
from .safetensors import TensorInfo, header_of, read_range

if TYPE_CHECKING:
    from torch import Tensor


class Storage(Protocol):
    """The bytes of tensors. Thread-safe."""

    def fill(self, info: TensorInfo, start: int, memory: memoryview) -> None:
        """Fill `memory` from byte `start` of the tensor's file on. CheckpointError where it cannot be read."""

    def view(self, info: TensorInfo, files: MappedFiles) -> Tensor | None:
        """The whole tensor over a memory map, one of `files`; None for a tensor that cannot be mapped."""

    def close(self) -> None:
        """Close the files. Views stay valid for as long as a tensor uses them."""


class Window(Protocol):
    """The bounded part of a remote checkpoint on disk: tensors are fetched in announced order ahead of their reader,
    and dropped behind it.

    max_bytes: the most disk space that they take.
    """

    @property
    def max_bytes(self) -> int: ...

    def start(self, groups: Iterable[Sequence[str]], finished: Container[str]) -> None:
        """Announce groups of tensors in reading order, those of a group together; groups whose first tensor is
        `finished` are not read."""

    def release(self, group: Sequence[str]) -> None:
        """Drop the tensors of an announced group."""

    def interrupt(self) -> None:
        """End waiting reads: the caller gives up."""


class LocalFiles:
    """Local files: headers are read first, then tensors at the ranges that the headers gave."""

    def __init__(self) -> None:
        self.stamps: dict[Path, FileStamp] = {}
        self._headers: dict[Path, dict[str, TensorInfo]] = {}
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}

    def read_header(self, path: Path) -> dict[str, TensorInfo]:
        """Read the header of a file, and keep the file's stamp."""
        descriptor = open_file(path, CheckpointError)
        try:
            self.stamps[path] = FileStamp.of(os.fstat(descriptor))
            self._headers[path] = header_of(path, descriptor)[0]
        finally:
            os.close(descriptor)
        return self._headers[path]

    def fill(self, info: TensorInfo, start: int, memory: memoryview) -> None:
        try:
            read_range(self._descriptor(info.file), info, start, memory)
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot read tensor {info.name!r}: {error.strerror}") from error

    def view(self, info: TensorInfo, files: MappedFiles) -> Tensor | None:
        # A tensor that is not aligned to its item size (npuq never writes one) has no address for vector loads.
        if info.nbytes == 0 or info.start % info.item_bytes:
            return None
        mapped = files.map(info.file, self._descriptor(info.file))
        if len(mapped) < info.end:
            raise CheckpointError(f"{info.file}: became shorter while tensor {info.name!r} was read; fetch it again")
        data = torch.frombuffer(mapped, dtype=torch.uint8, count=info.nbytes, offset=info.start)
        return data.view(info.torch_dtype).reshape(info.shape)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                descriptor = open_file(path, CheckpointError)
                try:
                    self._refuse_another(path, descriptor)
                except BaseException:
                    os.close(descriptor)
                    raise
                self._descriptors[path] = descriptor
            return self._descriptors[path]

    def _refuse_another(self, path: Path, descriptor: int) -> None:
        """Raise CheckpointError for a file with other tensors that replaced the one whose header was read."""
        if FileStamp.of(os.fstat(descriptor)) == self.stamps[path]:
            return
        if header_of(path, descriptor)[0] != self._headers[path]:
            raise CheckpointError(f"{path}: is another file than when it was opened; run the same command again")
