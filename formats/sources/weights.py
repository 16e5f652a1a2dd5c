"""The protocol of a weight, and the source that holds all weights of a checkpoint.

Weights have logical names (`….weight`) and logical shapes [N, K], in whatever tensors they are stored. The
forms wrap one another: a `Checkpoint` gives bytes, from files here or through a window on a hub; a form makes rows of
them; a rewrite (`rewritten.py`) makes other rows of those.

**To add a form of storage**, write a file beside this one with

1. a frozen dataclass (with slots: a large model has 100,000 weights) that is a `Weight`: it keeps the checkpoint and
   the names of its tensors, and reads rows [start, stop) when asked. A form that npuq requantizes from float values
   (FP4, int4 in groups, FP8 with other scales) returns float32 rows, has `linear = None`, and `row_bytes()` only where
   its bytes are rows of a dtype that the native kernels take. Codes and scales that go into the artifact as they are
   make a `StoredLinear` instead.
2. a function that finds these weights in the headers and in config.json, reads no tensor, and raises CheckpointError,
   naming file and tensor, for everything that is missing, does not fit, or belongs to nothing.

and call that function in `opening.py`. Nothing else has to know: planning, conversion, calibration, rotation, streaming
from a hub, verification and the runtime's loader ask the protocol. `tests/foreign/test_another_form.py` adds one.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...quant.stored_rows import BlockScale, StoredRows
from ..checkpoint import Checkpoint
from ..safetensors import DTYPES
from ..schemes import Scheme

if TYPE_CHECKING:
    from .stored_linear import StoredLinear


class Weight(Protocol):
    """One logical tensor of a checkpoint. Reading is thread-safe, and raises CheckpointError."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """The form in a word, for tables: a safetensors code such as BF16, or the name of a scheme."""

    @property
    def float_code(self) -> str:
        """The safetensors code of the float dtype it is written in where it stays float: its own, or the model's."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that it is stored in."""

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The checkpoint's tensors that its rows are computed from, in a fixed order; that of its rows comes first."""

    @property
    def file(self) -> Path:
        """The file of its rows, for messages."""

    @property
    def block_rows(self) -> int:
        """Rows that share scales: chunks of whole blocks read each scale once."""

    @property
    def held_bytes(self) -> int:
        """Bytes that a thread which reads it holds beside the rows it was given."""

    @property
    def linear(self) -> StoredLinear | None:
        """The codes and scales, where it is quantized in a scheme of the artifact; None: it is float."""

    def rows(self, start: int = 0, stop: int | None = None) -> StoredRows:
        """Rows [start, stop), all of them by default; a scalar is one row, and comes whole."""

    def view(self) -> Tensor | None:
        """All rows [N, …] over a memory map, if they are stored as float; None: they must be computed."""

    def row_bytes(self) -> RowBytes | None:
        """The rows' bytes, for the native kernels; None where they do not read this form."""


@dataclass(frozen=True)
class RowBytes:
    """A weight whose rows [N, K] lie one after the other in a tensor, in a dtype that native kernels take.

    `scale` is stored as it is here, one for each `block` (rows, columns) of FP8; None for float rows.
    """

    checkpoint: Checkpoint
    tensor: str
    dtype: torch.dtype
    scale: Tensor | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def blocks(self) -> BlockScale | None:
        """The scales of all rows, float32."""
        return None if self.scale is None else BlockScale(self.scale.to(torch.float32), 0, *self.block)

    def read(self, first: int, memory: memoryview) -> None:
        """Fill `memory` from byte `first` of the rows on."""
        self.checkpoint.read_bytes(self.tensor, first, memory)


@dataclass(frozen=True)
class WeightSource:
    """All logical weights of a checkpoint, by name, in its order.

    `is_quantized`: another tool, or npuq, has decided the scheme of each weight already.
    """

    checkpoint: Checkpoint
    weights: Mapping[str, Weight]
    is_quantized: bool = False

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme that each weight is stored in: FLOAT where it has no codes."""
        return {name: scheme_of(weight) for name, weight in self.weights.items()}

    @property
    def held_bytes(self) -> int:
        """Bytes that each thread which reads holds beside the rows it was given."""
        return max((weight.held_bytes for weight in self.weights.values()), default=0)

    def rows_float32(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a weight as float32."""
        return self.weights[name].rows(start, stop).to_float32()

    def rows_float(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) in the dtype of `float_code`: bit for bit if they are stored in it, else rounded once."""
        weight = self.weights[name]
        return weight.rows(start, stop).to(DTYPES[weight.float_code])

    def announce(self, names: Iterable[str], finished: Container[str]) -> None:
        """Say which weights will be read, in this order, without `finished` ones: a window on a hub fetches them."""
        window = self.checkpoint.window
        if window is not None:
            # A norm that was folded into others reads nothing.
            groups = {name: group for name in names if (group := self.weights[name].stored_names)}
            done = {group[0] for name, group in groups.items() if name in finished}
            window.start(groups.values(), done)

    def release(self, name: str) -> None:
        """Say that an announced weight will not be read again."""
        if self.checkpoint.window is not None:
            self.checkpoint.window.release(self.weights[name].stored_names)


def scheme_of(weight: Weight) -> Scheme:
    """The scheme that a weight is stored in."""
    return Scheme.FLOAT if weight.linear is None else weight.linear.scheme


def not_finite(weight: Weight) -> CheckpointError:
    """The error of a weight that no scheme can store."""
    return CheckpointError(
        f"{weight.file}: tensor {weight.name!r} holds infinities or NaN; the checkpoint is damaged: fetch that shard "
        "again"
    )
