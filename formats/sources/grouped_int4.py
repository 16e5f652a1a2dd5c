"""Float weights in packed int4 with a scale for each group of 32 inputs: the routed experts of Kimi-K2-Thinking, K2.5
and K2.6, in compressed-tensors' format `pack-quantized`.

A linear `P` stores `P.weight_packed` int32 [N, K / 8], `P.weight_scale` [N, K / 32] and `P.weight_shape` [2], which is
(N, K). Word j of a row holds inputs 8j to 8j + 7 from the low nibble up, 8 added to each code; a value is its code
times the scale of its group. These weights are read as floats, and quantized as bfloat16 ones are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ...deferred import torch
from ...dtypes import FLOAT_CODES, to_float32
from ...errors import CheckpointError
from ...models.config_reader import shown
from ...quant.stored_rows import BlockScale, StoredRows
from ..checkpoint import CONFIG_NAME, Checkpoint
from ..safetensors import TensorInfo
from .weights import RowBytes, Weight

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

GROUP: Final = 32
_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
# Tensors beside the packed one that give its codes another meaning.
_REFUSED: Final = {
    ".weight_zero_point": "zero points (asymmetric codes) are not read; the scheme must be symmetric",
    ".weight_g_idx": "an activation order (actorder) is not read; the inputs must stay in their order",
    ".weight_global_scale": "4-bit floats (NVFP4) are not read; convert the int4 or the bfloat16 release",
}


@dataclass(frozen=True, slots=True)
class GroupedInt4:
    """A matrix `P.weight` [N, K] in packed int4; a `Weight`."""

    checkpoint: Checkpoint
    name: str
    info: TensorInfo
    scale: TensorInfo
    stored_shape: TensorInfo
    dtype: ClassVar[str] = "INT4_G32"
    block_rows: ClassVar[int] = 1
    held_bytes: ClassVar[int] = 0
    linear: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, ...]:
        rows, words = self.info.shape
        return rows, 8 * words

    @property
    def float_code(self) -> str:
        return self.checkpoint.model_code

    @property
    def nbytes(self) -> int:
        return self.info.nbytes + self.scale.nbytes + self.stored_shape.nbytes

    @property
    def stored_names(self) -> tuple[str, ...]:
        return (self.info.name, self.scale.name, self.stored_shape.name)

    @property
    def file(self) -> Path:
        return self.info.file

    def rows(self, start: int = 0, stop: int | None = None) -> StoredRows:
        self._checked_shape()
        stop = self.shape[0] if stop is None else stop
        words = self.checkpoint.read_rows(self.info.name, start, stop)
        scale = to_float32(self.checkpoint.read_array(self.scale.name, start, stop), self.scale.dtype)
        return StoredRows(_as_bytes(words), BlockScale(torch.from_numpy(scale), 0, 1, GROUP))

    def view(self) -> None:
        return None

    def row_bytes(self) -> RowBytes | None:
        if sys.byteorder != "little":
            return None
        shape = self._checked_shape()
        stored = self.checkpoint.read_array(self.scale.name)
        scale = to_float32(stored, self.scale.dtype)
        return RowBytes(self.checkpoint, self.info.name, "U8", scale, (1, GROUP), (stored, shape))

    def _checked_shape(self) -> NDArray[Any]:
        """Read `weight_shape`. CheckpointError where it is not the shape of the packed codes."""
        stored = self.checkpoint.read_array(self.stored_shape.name)
        if tuple(stored.tolist()) != self.shape:
            raise CheckpointError(
                f"{self.stored_shape.file}: tensor {self.stored_shape.name!r} is {stored.tolist()}, but its codes are "
                f"{list(self.shape)}; fetch it again"
            )
        return stored


def grouped_int4_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Find the weights in packed int4 by their stored names, in headers alone; none in a checkpoint of other forms.

    Packed weights of one scale a channel are codes that an artifact can keep: `compressed_tensors.py` reads them.
    Raises CheckpointError for another packing or size of groups, for zero points and an activation order, stored or
    said by config.json, and for a part that is missing or does not fit.
    """
    tensors = checkpoint.tensors
    modules = [name.removesuffix(_PACKED) for name in tensors if name.endswith(_PACKED)]
    scales = (tensors.get(module + _SCALE) for module in modules)
    if not any(scale is not None and len(scale.shape) == 2 and scale.shape[1] > 1 for scale in scales):
        return {}
    _check_config(checkpoint)
    return {f"{module}.weight": _weight(checkpoint, module) for module in modules}


def claimed_otherwise(quantization: Any) -> str | None:
    """The part of config.json's quantization_config that the stored groups of 32 refute; None where it agrees."""
    if not quantization:
        return "has no quantization_config"
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "compressed-tensors":
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        return f"claims {shown(method)}"
    for weights in _claims(quantization):
        size = weights.get("group_size")
        if weights.get("strategy") != "group" or size != GROUP:
            return f"claims scales by {shown(weights.get('strategy'))} of {shown(size)}"
    return None


def _claims(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The weights' settings in each group of config.json."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping):
        return []
    found = (group.get("weights") for group in groups.values() if isinstance(group, Mapping))
    return [weights for weights in found if isinstance(weights, Mapping)]


def _check_config(checkpoint: Checkpoint) -> None:
    """Refuse claims that change what the codes mean, and that no stored tensor refutes."""
    quantization = checkpoint.text_config.get("quantization_config")
    for weights in _claims(quantization) if isinstance(quantization, Mapping) else []:
        problem = None
        if weights.get("symmetric") is False:
            problem = _REFUSED[".weight_zero_point"]
        elif weights.get("actorder") not in (None, False, "weight", "static"):
            problem = _REFUSED[".weight_g_idx"]
        elif weights.get("num_bits", 4) != 4 or weights.get("type", "int") != "int":
            bits, kind = shown(weights.get("num_bits")), shown(weights.get("type", "int"))
            problem = f"packed weights of {bits} bits, type {kind}, are not read; npuq reads int of 4 bits"
        if problem is not None:
            raise CheckpointError(f"{checkpoint.directory / CONFIG_NAME}: quantization_config: {problem}")


def _weight(checkpoint: Checkpoint, module: str) -> GroupedInt4:
    tensors, info = checkpoint.tensors, checkpoint.tensors[module + _PACKED]
    for suffix, why in _REFUSED.items():
        if module + suffix in tensors:
            raise CheckpointError(f"{info.file}: tensor {module + suffix!r}: {why}")
    if info.dtype != "I32" or len(info.shape) != 2:
        floats = "; 4-bit floats (NVFP4, MXFP4) are not read" if info.dtype == "U8" else ""
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} is {info.dtype} {list(info.shape)}, not I32 rows of eight codes a "
            f"word{floats}"
        )
    scale, shape = (_part(checkpoint, info, module + suffix) for suffix in (_SCALE, _SHAPE))
    rows, words = info.shape
    if scale.dtype not in FLOAT_CODES or 8 * words % GROUP or scale.shape != (rows, 8 * words // GROUP):
        raise CheckpointError(
            f"{scale.file}: tensor {scale.name!r} is {scale.dtype} {list(scale.shape)}; {rows} rows of {8 * words} "
            f"inputs in groups of {GROUP}, the only size that npuq reads, have BF16 [{rows}, {8 * words / GROUP:g}]"
        )
    if shape.dtype not in ("I32", "I64") or shape.shape != (2,):
        raise CheckpointError(f"{shape.file}: tensor {shape.name!r} is {shape.dtype} {list(shape.shape)}, not I32 [2]")
    return GroupedInt4(checkpoint, f"{module}.weight", info, scale, shape)


def _part(checkpoint: Checkpoint, packed: TensorInfo, name: str) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{packed.file}: {packed.name!r} has no {name!r} in any shard; fetch all shards")
    return info


def _as_bytes(words: Tensor) -> Tensor:
    """Words int32 [R, W] as uint8 [R, 4W], the low byte first."""
    if sys.byteorder == "little":
        return words.view(torch.uint8)
    return words.view(torch.uint8).unflatten(1, (-1, 4)).flip(2).flatten(1)
