"""Float weights: plain bf16, fp16 or fp32 here, and FP8 with stored scales (`fp8.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...dtypes import FLOAT_CODES
from ...errors import CheckpointError
from ...quant.stored_rows import StoredRows
from ..checkpoint import Checkpoint
from ..safetensors import TensorInfo
from .fp8 import FP8_CODE, Fp8Weights, is_beside_fp8, is_scale
from .weights import OfTensor, RowBytes, Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PlainWeight(OfTensor):
    """A weight of one tensor in a float dtype of torch."""

    block_rows: ClassVar[int] = 1

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def float_code(self) -> str:
        return self.info.dtype

    @property
    def nbytes(self) -> int:
        return self.info.nbytes

    @property
    def stored_names(self) -> tuple[str, ...]:
        return (self.info.name,)

    def rows(self, start: int = 0, stop: int | None = None) -> StoredRows:
        if not self.shape:
            return StoredRows(self.checkpoint.read(self.name))
        return StoredRows(self.checkpoint.read_rows(self.name, start, self.shape[0] if stop is None else stop))

    def view(self) -> Tensor:
        return self.checkpoint.view(self.name)

    def row_bytes(self) -> RowBytes:
        return RowBytes(self.checkpoint, self.name, self.info.dtype)


def float_weights(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Weight]:
    """Find the float weights among the tensors of these names, in headers alone.

    Raises CheckpointError for an unknown dtype, an FP8 weight without its scale, a scale of the wrong shape or dtype,
    and a scale without an FP8 weight.
    """
    tensors, fp8 = checkpoint.tensors, Fp8Weights(checkpoint)
    weights: dict[str, Weight] = {}
    for name in names:
        info = tensors[name]
        if info.dtype == FP8_CODE:
            weights[name] = fp8.weight(info)
        elif not is_beside_fp8(tensors, name):
            if is_scale(name):
                raise CheckpointError(f"{info.file}: scale {name!r} belongs to no FP8 weight")
            weights[name] = plain_weight(checkpoint, info)
    return weights


def plain_weight(checkpoint: Checkpoint, info: TensorInfo) -> PlainWeight:
    """The weight of a float tensor. CheckpointError for another dtype."""
    if info.dtype not in FLOAT_CODES:
        quantized = "; if ModelSlim quantized it, its description is missing" if info.dtype == "I8" else ""
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} has dtype {info.dtype}; npuq reads F32, F16, BF16 and FP8 ({FP8_CODE}) "
            f"with a scale{quantized}"
        )
    return PlainWeight(checkpoint, info)
