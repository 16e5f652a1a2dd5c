"""The protocol of a weight, and the source of all weights of a checkpoint.

Weights have logical names (`….weight`) and logical shapes [N, K], independent of the stored tensors. The forms wrap one
another: a `Checkpoint` gives bytes, from local files or through a window; a form decodes them into rows; a rewrite
(`rewritten.py`) transforms those rows.

**To add a form of storage**, write a file beside this one with

1. a frozen dataclass (with slots: a large model has 100,000 weights) that is a `Weight`: it keeps the checkpoint and
   the names of its tensors, and reads rows [start, stop) when asked. A form that npuq requantizes from float values
   (FP4, int4 in groups, FP8 with other scales) has `linear = None`, and `row_bytes()` only where its bytes are rows of
   a dtype that the native kernels take; else it returns float32 rows. Codes and scales that go into the artifact as
   they are make a `StoredLinear` instead.
2. a function that finds these weights in the headers and in config.json, reads no tensor, and raises CheckpointError,
   naming file and tensor, for tensors that are missing, do not fit, or belong to no weight.

and call that function in `opening.py`. No other code changes: planning, conversion, calibration, rotation, streaming
from a hub, verification and the runtime's loader use the protocol. `grouped_int4.py` is such a form.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from ...dtypes import torch_dtype
from ...errors import CheckpointError
from ...native.quantization import SourceRows
from ...quant.stored_rows import StoredRows
from ..checkpoint import Checkpoint
from ..safetensors import TensorInfo
from ..schemes import Scheme

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from .stored_linear import StoredLinear


class Weight(Protocol):
    """One logical tensor of a checkpoint. Reading is thread-safe, and raises CheckpointError."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """The form's short name, for tables: a safetensors code such as BF16, or the name of a scheme."""

    @property
    def float_code(self) -> str:
        """The safetensors code of the float dtype that conversion writes for FLOAT: the weight's own, or the
        model's."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its stored tensors."""

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Names of the checkpoint's tensors behind its rows, in a fixed order; the tensor of the rows comes first."""

    @property
    def file(self) -> Path:
        """The file of its rows, for messages."""

    @property
    def block_rows(self) -> int:
        """Rows that share scales: chunks of whole blocks read each scale once."""

    @property
    def held_bytes(self) -> int:
        """Bytes that a reading thread holds beside the rows that `rows` returns."""

    @property
    def linear(self) -> StoredLinear | None:
        """The reader of codes and scales of a quantized weight; None for a float one."""

    def rows(self, start: int = 0, stop: int | None = None) -> StoredRows:
        """Read rows [start, stop), by default all; a scalar counts as one row."""

    def view(self) -> Tensor | None:
        """All rows [N, …] over a memory map; None where rows are not stored as float."""

    def row_bytes(self) -> RowBytes | None:
        """The rows' bytes, for the native kernels; None for a form that those do not read."""


@dataclass(frozen=True, slots=True)
class OfTensor:
    """The part of a float `Weight` that the tensor of its rows says."""

    checkpoint: Checkpoint
    info: TensorInfo
    held_bytes: ClassVar[int] = 0
    linear: ClassVar[None] = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def file(self) -> Path:
        return self.info.file


@dataclass(frozen=True, slots=True)
class DerivedWeight:
    """The part of a `Weight` made of another, `inner`, that it takes over unchanged."""

    inner: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> str:
        return self.inner.dtype

    @property
    def float_code(self) -> str:
        return self.inner.float_code

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def file(self) -> Path:
        return self.inner.file

    @property
    def stored_names(self) -> tuple[str, ...]:
        return self.inner.stored_names

    @property
    def block_rows(self) -> int:
        return self.inner.block_rows

    @property
    def held_bytes(self) -> int:
        return self.inner.held_bytes

    @property
    def linear(self) -> StoredLinear | None:
        return self.inner.linear

    def rows(self, start: int = 0, stop: int | None = None) -> StoredRows:
        return self.inner.rows(start, stop)

    def view(self) -> Tensor | None:
        return self.inner.view()

    def row_bytes(self) -> RowBytes | None:
        return self.inner.row_bytes()


@dataclass(frozen=True)
class RowBytes:
    """The bytes of a weight whose rows [N, K] are contiguous in a tensor, in a dtype of the native kernels
    (`native.quantization.NUMBERS`).

    scale: float32 scales, one for each `block` (rows, columns) of FP8 or int4; None for float rows. beside: the other
    tensors behind the rows as they are stored, read and checked already, in the order of `Weight.stored_names`.
    """

    checkpoint: Checkpoint
    tensor: str
    dtype: str
    scale: NDArray[np.float32] | None = None
    block: tuple[int, int] = (1, 1)
    beside: tuple[NDArray[Any], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.checkpoint.info(self.tensor).nbytes

    def rows_in(self, memory: NDArray[np.uint8], start: int = 0) -> SourceRows:
        """Rows from `start` on, whose bytes are in memory uint8 [R, bytes of a row]."""
        if self.scale is None:
            return SourceRows(memory, self.dtype)
        first = start // self.block[0]
        return SourceRows(memory, self.dtype, self.scale[first:], self.block, start - first * self.block[0])

    def read(self, first: int, memory: memoryview) -> None:
        """Fill `memory` with the rows' bytes from byte `first` on."""
        self.checkpoint.read_bytes(self.tensor, first, memory)


@dataclass(frozen=True)
class WeightSource:
    """All logical weights of a checkpoint, by name, in the checkpoint's order.

    is_quantized: the checkpoint fixes the scheme of each weight, because npuq or another tool quantized it.
    """

    checkpoint: Checkpoint
    weights: Mapping[str, Weight]
    is_quantized: bool = False

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The stored scheme of each weight: FLOAT where it has no codes."""
        return {name: scheme_of(weight) for name, weight in self.weights.items()}

    @property
    def held_bytes(self) -> int:
        """Bytes that each reading thread holds beside the rows that `rows` returns: the largest of all weights."""
        return max((weight.held_bytes for weight in self.weights.values()), default=0)

    def rows_float32(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) of a weight as float32."""
        return self.weights[name].rows(start, stop).to_float32()

    def rows_float(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) in the dtype of `float_code`: the stored bits in that dtype, else rounded once."""
        weight = self.weights[name]
        return weight.rows(start, stop).to(torch_dtype(weight.float_code))

    def announce(self, names: Iterable[str], finished: Container[str]) -> None:
        """Announce the weights that will be read, in this order, without `finished` ones: a window fetches them."""
        window = self.checkpoint.window
        if window is not None:
            # A norm that was folded into others reads nothing.
            groups = {name: group for name in names if (group := self.weights[name].stored_names)}
            done = {group[0] for name, group in groups.items() if name in finished}
            window.start(groups.values(), done)

    def release(self, name: str) -> None:
        """Release an announced weight: it will not be read again."""
        if self.checkpoint.window is not None:
            self.checkpoint.window.release(self.weights[name].stored_names)


def scheme_of(weight: Weight) -> Scheme:
    """The stored scheme of a weight."""
    return Scheme.FLOAT if weight.linear is None else weight.linear.scheme


def not_finite(weight: Weight) -> CheckpointError:
    """The error for a weight with an infinity or NaN, which no scheme can store."""
    return CheckpointError(
        f"{weight.file}: tensor {weight.name!r} holds infinities or NaN; the checkpoint is damaged: fetch that shard "
        "again"
    )
