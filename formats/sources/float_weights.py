"""Float weights: plain bf16, fp16 or fp32, and DeepSeek's FP8 in blocks with a `weight_scale_inv` for each weight, in
the same shard or another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ...errors import CheckpointError
from ...models.config_reader import MAX_SIZE, shown
from ...quant.stored_rows import BlockScale, StoredRows
from ..checkpoint import CONFIG_NAME, Checkpoint
from ..safetensors import TensorInfo
from .weights import RowBytes, Weight

FLOAT_CODES = frozenset({"F32", "F16", "BF16"})
_SCALE_SUFFIX = "_scale_inv"
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class _OfTensor:
    """The part of a float weight that the tensor of its rows says."""

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
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def file(self) -> Path:
        return self.info.file


@dataclass(frozen=True, slots=True)
class PlainWeight(_OfTensor):
    """A weight of one tensor in a float dtype of torch."""

    block_rows: ClassVar[int] = 1

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
        return RowBytes(self.checkpoint, self.name, self.info.torch_dtype)


@dataclass(frozen=True, slots=True)
class Fp8Weight(_OfTensor):
    """A matrix [N, K] of F8_E4M3, with a float32 scale for each `block` (rows, columns)."""

    scale: TensorInfo
    block: tuple[int, int]

    @property
    def float_code(self) -> str:
        return self.checkpoint.model_code

    @property
    def nbytes(self) -> int:
        return self.info.nbytes + self.scale.nbytes

    @property
    def stored_names(self) -> tuple[str, ...]:
        return (self.info.name, self.scale.name)

    @property
    def block_rows(self) -> int:
        return self.block[0]

    def rows(self, start: int = 0, stop: int | None = None) -> StoredRows:
        stop = self.shape[0] if stop is None else stop
        rows = self.checkpoint.read_rows(self.name, start, stop)
        block_rows, block_columns = self.block
        first, last = start // block_rows, -(-stop // block_rows)
        scale = self.checkpoint.read_rows(self.scale.name, first, last)
        return StoredRows(rows, BlockScale(scale, start - first * block_rows, block_rows, block_columns))

    def view(self) -> None:
        return None

    def row_bytes(self) -> RowBytes:
        scale = self.checkpoint.read(self.scale.name)
        return RowBytes(self.checkpoint, self.name, self.info.torch_dtype, scale, self.block)


def float_weights(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Weight]:
    """Find the float weights among the tensors of these names, in headers alone.

    Raises CheckpointError for an unknown dtype, an FP8 weight without its scale, a scale of the wrong shape or dtype,
    and a scale without an FP8 weight.
    """
    block, left = _block_size(checkpoint), list(names)
    weights = {name: _weight(checkpoint, name, block) for name in left if not name.endswith(_SCALE_SUFFIX)}
    for name in left:
        if name.endswith(_SCALE_SUFFIX):
            weight = weights.get(name.removesuffix(_SCALE_SUFFIX))
            if weight is None or name not in weight.stored_names:
                raise CheckpointError(f"{checkpoint.tensors[name].file}: scale {name!r} belongs to no FP8 weight")
    return weights


def _weight(checkpoint: Checkpoint, name: str, block: tuple[int, int]) -> Weight:
    info = checkpoint.tensors[name]
    if info.dtype == "F8_E4M3":
        return Fp8Weight(checkpoint, info, _scale(checkpoint, info, block), block)
    return plain_weight(checkpoint, info)


def plain_weight(checkpoint: Checkpoint, info: TensorInfo) -> PlainWeight:
    """The weight of a float tensor. CheckpointError for another dtype."""
    if info.dtype not in FLOAT_CODES:
        quantized = "; if ModelSlim quantized it, its description is missing" if info.dtype == "I8" else ""
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} has dtype {info.dtype}; npuq reads F32, F16, BF16 and "
            f"DeepSeek FP8 (F8_E4M3){quantized}"
        )
    return PlainWeight(checkpoint, info)


def _scale(checkpoint: Checkpoint, info: TensorInfo, block: tuple[int, int]) -> TensorInfo:
    name = info.name
    scale = checkpoint.tensors.get(name + _SCALE_SUFFIX)
    if scale is None:
        raise CheckpointError(
            f"{info.file}: FP8 tensor {name!r} has no scale {name + _SCALE_SUFFIX!r} in any shard; fetch all shards"
        )
    if len(info.shape) != 2:
        raise CheckpointError(f"{info.file}: FP8 tensor {name!r} {list(info.shape)} is not a matrix")
    expected = tuple(-(-size // step) for size, step in zip(info.shape, block, strict=True))
    if scale.shape != expected or scale.dtype != "F32":
        raise CheckpointError(
            f"{scale.file}: scale {scale.name!r} is {scale.dtype} {list(scale.shape)}; blocks of "
            f"{block[0]}x{block[1]} over {list(info.shape)} need F32 {list(expected)}"
        )
    return scale


def _block_size(checkpoint: Checkpoint) -> tuple[int, int]:
    quantization = checkpoint.text_config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if block is None:
        return _DEFAULT_BLOCK
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and 0 < size <= MAX_SIZE for size in block)
    ):
        where = checkpoint.directory / CONFIG_NAME
        raise CheckpointError(f"{where}: weight_block_size {shown(block)} is not two sizes from 1 to {MAX_SIZE}")
    return block[0], block[1]
