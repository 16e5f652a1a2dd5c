"""FP8 weights (e4m3fn) with stored scales: in blocks (DeepSeek), or one scale an output channel or a tensor
(compressed-tensors, ModelOpt). Rows are read as FP8 with float32 scales.

The stored tensors decide; config.json only gives the size of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...deferred import torch
from ...dtypes import to_float32
from ...errors import CheckpointError
from ...models.config_reader import MAX_SIZE, shown
from ...quant.stored_rows import BlockScale, StoredRows
from ..checkpoint import CONFIG_NAME, Checkpoint
from ..safetensors import TensorInfo
from .weights import OfTensor, RowBytes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

FP8_CODE: Final = "F8_E4M3"
BY_CHANNEL, BY_TENSOR = "by channel", "by tensor"
_DEFAULT_BLOCK = (128, 128)
# Of blocks that the scales' shapes alone tell. A scale for smaller ones is likelier a wrong one.
_LEAST_BLOCK: Final = 16
# Above any config's.
_MOST_GROUPS: Final = 1000
# fbgemm_fp8: one scale a channel. modelopt: one a tensor.
_FP8_METHODS: Final = ("fp8", "fbgemm_fp8", "modelopt")

Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ScaleName:
    """A way to name a weight's scale: the end `weight` of the weight's name becomes `scale`. codes: the scale's dtypes.

    activations: the end of the name of the inputs' static scale, which npuq leaves out; "" where there is none.
    """

    weight: str
    scale: str
    codes: tuple[str, ...]
    activations: str = ""

    def scale_of(self, weight: str) -> str | None:
        """The name of a weight's scale; None where the weight's name has another end."""
        return weight.removesuffix(self.weight) + self.scale if weight.endswith(self.weight) else None

    def weight_of(self, name: str) -> str | None:
        """The name of the weight of a scale, its own or its inputs'; None where the name is of neither."""
        for end in (self.scale, self.activations):
            if end and name.endswith(end):
                return name.removesuffix(end) + self.weight
        return None


SCALE_NAMES: Final = (
    ScaleName("", "_scale_inv", ("F32", "BF16", "F8_E8M0")),  # DeepSeek, and Qwen in BF16
    ScaleName(".weight", ".weight_scale", ("F32", "BF16", "F16"), ".input_scale"),  # compressed-tensors, ModelOpt
)


@dataclass(frozen=True, slots=True)
class Fp8Weight(OfTensor):
    """A matrix [N, K] of F8_E4M3 with a scale for each `block` (rows, columns).

    kind: the block in words. The scale is [row blocks, column blocks], without dimensions of size 1 in some forms.
    """

    scale: TensorInfo
    block: Block
    kind: str

    @property
    def dtype(self) -> str:
        powers = " E8M0" if self.scale.dtype == "F8_E8M0" else ""
        return f"{FP8_CODE} {self.kind}{powers}"

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
        block_rows, block_columns = self.block
        first, last = start // block_rows, -(-stop // block_rows)
        scale = self._checked(self._scale(first, last))
        codes = self.checkpoint.read_rows(self.name, start, stop)
        blocks = BlockScale(torch.from_numpy(scale), start - first * block_rows, block_rows, block_columns)
        if not scale.all():
            self._check_zeros(codes, blocks)
        return StoredRows(codes, blocks)

    def view(self) -> None:
        return None

    def row_bytes(self) -> RowBytes | None:
        """The rows' bytes; None where a scale is zero, because `rows` looks at what it multiplies."""
        stored = self._scale(0, -(-self.shape[0] // self.block[0]))
        scale = self._checked(stored)
        return RowBytes(self.checkpoint, self.name, FP8_CODE, scale, self.block, (stored,)) if scale.all() else None

    def _scale(self, first: int, last: int) -> NDArray[Any]:
        """Read the scales of row blocks [first, last) as [row blocks, column blocks], in the bits of the stored
        dtype."""
        name, shape = self.scale.name, self.scale.shape
        stored = self.checkpoint.read_array(name, first, last) if shape else self.checkpoint.read_array(name)
        return stored.reshape(-1, max(1, -(-self.shape[1] // self.block[1])))

    def _checked(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Stored scales as float32. CheckpointError for one that is negative, infinite or NaN."""
        scale = to_float32(stored, self.scale.dtype)
        # Written so that NaN counts as wrong.
        if scale.size and not 0 <= float(scale.min()) <= float(scale.max()) < float("inf"):
            raise self._damaged("that is negative, infinite or NaN")
        return scale

    def _check_zeros(self, codes: Tensor, blocks: BlockScale) -> None:
        """Refuse a scale of zero, but in a block of zeros."""
        zero = BlockScale(
            (blocks.scale == 0).to(torch.float32), blocks.first_row, blocks.block_rows, blocks.block_columns
        )
        if StoredRows(codes, zero).to_float32().count_nonzero():
            raise self._damaged("of zero in a block of other numbers")

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.scale.file}: tensor {self.scale.name!r} holds a scale {what}; the checkpoint is damaged: fetch "
            "that shard again"
        )


class Fp8Weights:
    """Finds the FP8 weights of a checkpoint in its headers and config.json."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        where = f"{checkpoint.directory / CONFIG_NAME}: "
        self._stated = stated_blocks(checkpoint.text_config.get("quantization_config"), where)
        # By the shapes of weight and scale, of which a model has few.
        self._layouts: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Block, str]] = {}
        # The sizes of blocks that only shapes tell, and a scale of each: rows, then columns.
        self._inferred: list[tuple[int, str] | None] = [None, None]

    def weight(self, info: TensorInfo) -> Fp8Weight:
        """The weight of a tensor of FP8_CODE.

        Raises CheckpointError for a missing scale, two scales, and a scale of the wrong shape or dtype.
        """
        tensors, name = self._checkpoint.tensors, info.name
        named = [(form, end) for form in SCALE_NAMES if (end := form.scale_of(name)) is not None]
        found = [(form, tensors[end]) for form, end in named if end in tensors]
        if not found:
            wanted = " or ".join(repr(end) for _, end in named)
            raise CheckpointError(
                f"{info.file}: FP8 tensor {name!r} has no scale {wanted} in any shard; fetch all shards"
            )
        if len(found) > 1:
            first, second = (beside.name for _, beside in found[:2])
            raise CheckpointError(
                f"{info.file}: FP8 tensor {name!r} has two scales, {first!r} and {second!r}; remove the wrong one"
            )
        if len(info.shape) != 2:
            raise CheckpointError(f"{info.file}: FP8 tensor {name!r} {list(info.shape)} is not a matrix")
        ((form, scale),) = found
        shapes = info.shape, scale.shape
        layout = self._layouts.get(shapes) or self._layout(info, scale)
        if layout is None or scale.dtype not in form.codes:
            blocks = self._stated or (_DEFAULT_BLOCK,)
            sizes = " or ".join(f"{block[0]}x{block[1]}" for block in blocks)
            wanted = " or ".join(str(list(_blocks(info, block))) for block in blocks)
            raise CheckpointError(
                f"{scale.file}: scale {scale.name!r} is {scale.dtype} {list(scale.shape)}; blocks of {sizes} over "
                f"{list(info.shape)} need {'/'.join(form.codes)} {wanted}, channels {[info.shape[0], 1]}"
            )
        self._layouts[shapes] = layout
        return Fp8Weight(self._checkpoint, info, scale, *layout)

    def _layout(self, info: TensorInfo, scale: TensorInfo) -> tuple[Block, str] | None:
        """The block of a weight and its kind, by the shape of the scale; None where that fits none."""
        rows, columns = (max(1, size) for size in info.shape)
        for block in self._stated or (_DEFAULT_BLOCK,):
            if scale.shape == _blocks(info, block):
                return block, f"{block[0]}x{block[1]}"
        if scale.shape in ((rows, 1), (rows,)):
            return (1, columns), BY_CHANNEL
        if scale.shape in ((1, 1), (1,), ()):
            return (rows, columns), BY_TENSOR
        inferred = None if self._stated else self._inferred_block(info, scale)
        return None if inferred is None else (inferred, f"{inferred[0]}x{inferred[1]}")

    def _inferred_block(self, info: TensorInfo, scale: TensorInfo) -> Block | None:
        """The block by shapes alone: a power of two on each side, the same in all weights; None where there is none."""
        if len(scale.shape) != 2:
            return None
        rows, columns = (self._side(side, info.shape[side], scale.shape[side], scale) for side in (0, 1))
        return None if rows is None or columns is None else (rows, columns)

    def _side(self, side: int, size: int, count: int, scale: TensorInfo) -> int | None:
        known = self._inferred[side]
        if count == 1:  # any block of at least that size
            return size if known is None else known[0] if size <= known[0] else None
        # At most one power of two is in [size / count, size / (count - 1)).
        step = 1 << (-(-size // max(1, count)) - 1).bit_length()
        if step < _LEAST_BLOCK or -(-size // step) != count:
            return None
        if known is not None and known[0] != step:
            raise CheckpointError(
                f"{scale.file}: the shapes of scales {known[1]!r} and {scale.name!r} tell blocks of {known[0]} and of "
                f"{step}; give config.json's quantization_config a weight_block_size"
            )
        self._inferred[side] = known or (step, scale.name)
        return step


def is_beside_fp8(tensors: Mapping[str, TensorInfo], name: str) -> bool:
    """True for the scale of an FP8 weight or of its inputs. Raises nothing."""
    for form in SCALE_NAMES:
        weight = form.weight_of(name)
        if weight is not None and weight in tensors:
            return tensors[weight].dtype == FP8_CODE
    return False


def is_scale(name: str) -> bool:
    """True for the name of an FP8 weight's scale."""
    return any(name.endswith(form.scale) for form in SCALE_NAMES)


def _blocks(info: TensorInfo, block: Block) -> tuple[int, int]:
    """The shape of the scales of a matrix in blocks."""
    return -(-info.shape[0] // block[0]), -(-info.shape[1] // block[1])


def stated_blocks(claim: Any, where: str = "") -> tuple[Block, ...]:
    """The sizes of blocks in a quantization_config: DeepSeek's weight_block_size, compressed-tensors' block_structure.

    CheckpointError for a malformed size.
    """
    if not isinstance(claim, Mapping):
        return ()
    stated = [("weight_block_size", claim.get("weight_block_size"))]
    stated += [("block_structure", weights.get("block_structure")) for weights in _group_weights(claim)]
    return tuple(dict.fromkeys(_block(where, key, size) for key, size in stated if size is not None))


def claims_fp8(claim: Any) -> bool:
    """True for a quantization_config of FP8 weights, of any tool; also where its method says nothing of their type."""
    if not isinstance(claim, Mapping):
        return False
    groups = [(weights.get("type"), weights.get("num_bits")) for weights in _group_weights(claim)]
    return ("float", 8) in groups or (not groups and claim.get("quant_method") in _FP8_METHODS)


def _group_weights(claim: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The description of weights in each of compressed-tensors' groups."""
    groups = claim.get("config_groups")
    for group in islice(groups.values(), _MOST_GROUPS) if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights


def _block(where: str, key: str, block: Any) -> Block:
    sizes = block
    if isinstance(block, str) and len(block) < 32:  # compressed-tensors' older "128x128"
        sizes = [int(size) if size.isascii() and size.isdigit() else 0 for size in block.split("x")]
    if not (
        isinstance(sizes, list)
        and len(sizes) == 2
        and all(type(size) is int and 0 < size <= MAX_SIZE for size in sizes)
    ):
        raise CheckpointError(f"{where}{key} {shown(block)} is not two sizes from 1 to {MAX_SIZE}")
    return sizes[0], sizes[1]
