"""Source dialects: how a checkpoint stores its weights, behind one interface. Names in, float32 rows out.

Nothing here knows of model families. A dialect is found by what is stored: plain bf16, fp16 or fp32, or DeepSeek's
FP8 in blocks with a `weight_scale_inv` beside each weight, in whatever shard that may be.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models.config import model_dtype
from ..models.config_reader import MAX_SIZE, shown
from .checkpoint import Checkpoint

_FLOAT_CODES = frozenset({"F32", "F16", "BF16"})
_SCALE_SUFFIX = "_scale_inv"
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class Weight:
    """One logical tensor of the source: `dtype` is the stored safetensors code, `nbytes` counts its scales too."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class BlockScale:
    """The scales of FP8 rows: float32 [row blocks, column blocks], one for each block that the rows touch; `first_row`
    is the place of row 0 in the first of them."""

    scale: Tensor
    first_row: int
    block_rows: int
    block_columns: int


@dataclass(frozen=True)
class StoredRows:
    """Rows [R, …] of float32, bf16 or fp16, or of FP8 with the scales of their blocks."""

    rows: Tensor
    blocks: BlockScale | None = None

    def to_float32(self) -> Tensor:
        if self.blocks is None:
            return self.rows.to(torch.float32)
        blocks = self.blocks
        return dequantize_fp8(self.rows, blocks.scale, blocks.first_row, blocks.block_rows, blocks.block_columns)


class WeightSource:
    """The logical tensors of a checkpoint, read as float rows. Thread-safe.

    Raises CheckpointError for a dtype that no dialect explains, an FP8 weight without its scale, a scale of the wrong
    shape or dtype, and scales that belong to no FP8 weight.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.float_dtype = model_dtype(checkpoint.config)
        self._block = _block_size(checkpoint)
        self.weights = {name: self._weight(name) for name in checkpoint.tensors if not name.endswith(_SCALE_SUFFIX)}
        self._refuse_orphan_scales()
        fp8 = any(weight.dtype == "F8_E4M3" for weight in self.weights.values())
        self.block_rows = self._block[0] if fp8 else 1

    def expect(self, names: Iterable[str], finished: Container[str]) -> None:
        """Say which weights will be read, in this order, without `finished` ones: some checkpoints must fetch them."""
        self.checkpoint.expect([self.stored_names(name) for name in names], finished)

    def release(self, name: str) -> None:
        """Say that an expected weight will not be read again."""
        self.checkpoint.release(self.stored_names(name))

    def is_computed(self, name: str) -> bool:
        """Whether a weight's rows must be computed from what is stored: its bytes alone are not them."""
        return False

    def block_scales(self, name: str) -> BlockScale | None:
        """The scales of all blocks of an FP8 weight; None of any other."""
        if self._find(name).dtype != "F8_E4M3":
            return None
        return BlockScale(self.checkpoint.read(name + _SCALE_SUFFIX), 0, *self._block)

    def rows_float32(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a weight as float32, dequantized when it is stored in FP8. A scalar has no rows."""
        return self.stored_rows(name, start, stop).to_float32()

    def stored_rows(self, name: str, start: int = 0, stop: int | None = None) -> StoredRows:
        """Rows [start, stop) as they are stored, with the scales of the FP8 blocks they lie in."""
        weight = self._find(name)
        stop = weight.shape[0] if stop is None else stop
        rows = self.checkpoint.read_rows(name, start, stop)
        if weight.dtype != "F8_E4M3":
            return StoredRows(rows)
        block_rows, block_columns = self._block
        first, last = start // block_rows, -(-stop // block_rows)
        scale = self.checkpoint.read_rows(name + _SCALE_SUFFIX, first, last)
        return StoredRows(rows, BlockScale(scale, start - first * block_rows, block_rows, block_columns))

    def rows_float(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) in the stored float dtype, bit for bit; FP8 becomes `float_dtype`, rounded once."""
        weight = self._find(name)
        if weight.dtype == "F8_E4M3":
            return self.rows_float32(name, start, stop).to(self.float_dtype)
        return self.checkpoint.read_rows(name, start, weight.shape[0] if stop is None else stop)

    def float_code(self, name: str) -> str:
        """The safetensors dtype code of what `rows_float` returns."""
        from .safetensors import CODES

        weight = self._find(name)
        return CODES[self.float_dtype] if weight.dtype == "F8_E4M3" else weight.dtype

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The checkpoint's tensors that a weight's rows are computed from, in a fixed order."""
        return (name, name + _SCALE_SUFFIX) if self._find(name).dtype == "F8_E4M3" else (name,)

    def _find(self, name: str) -> Weight:
        try:
            return self.weights[name]
        except KeyError:
            raise CheckpointError(f"{self.checkpoint.directory}: no weight named {name!r}") from None

    def _weight(self, name: str) -> Weight:
        info = self.checkpoint.tensors[name]
        nbytes = info.nbytes
        if info.dtype == "F8_E4M3":
            nbytes += self._checked_scale_bytes(name)
        elif info.dtype not in _FLOAT_CODES:
            quantized = "; if ModelSlim quantized it, its description is missing" if info.dtype == "I8" else ""
            raise CheckpointError(
                f"{info.file}: tensor {name!r} has dtype {info.dtype}; npuq reads F32, F16, BF16 and "
                f"DeepSeek FP8 (F8_E4M3){quantized}"
            )
        return Weight(name, info.shape, info.dtype, nbytes)

    def _checked_scale_bytes(self, name: str) -> int:
        info = self.checkpoint.tensors[name]
        scale = self.checkpoint.tensors.get(name + _SCALE_SUFFIX)
        if scale is None:
            raise CheckpointError(
                f"{info.file}: FP8 tensor {name!r} has no scale {name + _SCALE_SUFFIX!r} in any shard; fetch all shards"
            )
        if len(info.shape) != 2:
            raise CheckpointError(f"{info.file}: FP8 tensor {name!r} {list(info.shape)} is not a matrix")
        expected = tuple(-(-size // block) for size, block in zip(info.shape, self._block, strict=True))
        if scale.shape != expected or scale.dtype != "F32":
            raise CheckpointError(
                f"{scale.file}: scale {scale.name!r} is {scale.dtype} {list(scale.shape)}; blocks of "
                f"{self._block[0]}x{self._block[1]} over {list(info.shape)} need F32 {list(expected)}"
            )
        return scale.nbytes

    def _refuse_orphan_scales(self) -> None:
        for name, info in self.checkpoint.tensors.items():
            if name.endswith(_SCALE_SUFFIX):
                weight = self.weights.get(name.removesuffix(_SCALE_SUFFIX))
                if weight is None or weight.dtype != "F8_E4M3":
                    raise CheckpointError(f"{info.file}: scale {name!r} belongs to no FP8 weight")


def dequantize_fp8(stored: Tensor, scale: Tensor, first_row: int, block_rows: int, block_columns: int) -> Tensor:
    """FP8 rows times the scale of their block.

    `stored` float8_e4m3fn [R, K]; `scale` float32 [blocks, ceil(K / block_columns)] for the blocks the rows touch;
    `first_row` is the place of row 0 in the first of those blocks. Returns float32 [R, K].
    """
    rows = stored.to(torch.float32)
    block_of_row = (torch.arange(rows.shape[0]) + first_row) // block_rows
    row_scale = scale[block_of_row]  # [R, column blocks]
    for column in range(scale.shape[1]):
        rows[:, column * block_columns : (column + 1) * block_columns].mul_(row_scale[:, column, None])
    return rows


def _block_size(checkpoint: Checkpoint) -> tuple[int, int]:
    quantization = checkpoint.config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if block is None:
        return _DEFAULT_BLOCK
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and 0 < size <= MAX_SIZE for size in block)
    ):
        where = checkpoint.directory / "config.json"
        raise CheckpointError(f"{where}: weight_block_size {shown(block)} is not two sizes from 1 to {MAX_SIZE}")
    return block[0], block[1]
