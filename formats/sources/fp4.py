"""FP4 weights (E2M1) with a power of two for each 32 inputs: the routed experts of DeepSeek-V4 (MXFP4 of the OCP
Microscaling formats, version 1.0).

A linear stores `P.weight` I8 [N, K / 2] and `P.scale` F8_E8M0 [N, K / 32]. A byte holds an even input in its low nibble
and the next input in its high one. Of a nibble the highest bit is the sign, and the others count the magnitudes 0, ½,
1, 1½, 2, 3, 4, 6. A scale of byte b is 2^(b − 127); 255 is NaN. Nothing in these tensors tells them from int8 codes:
config.json's `expert_dtype` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from ...deferred import torch
from ...dtypes import to_float32
from ...errors import CheckpointError
from ...quant.stored_rows import BlockScale, StoredRows
from ..checkpoint import Checkpoint
from ..safetensors import TensorInfo
from .weights import RowBytes, Weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUP: Final = 32
_WEIGHT, _SCALE, _SCALE_CODE = ".weight", ".scale", "F8_E8M0"


@dataclass(frozen=True, slots=True)
class Fp4Weight:
    """A matrix `P.weight` [N, K] of E2M1 with a scale for each `GROUP` inputs; a `Weight`."""

    checkpoint: Checkpoint
    info: TensorInfo
    scale: TensorInfo
    dtype: ClassVar[str] = "F4_E2M1 1x32 E8M0"
    block_rows: ClassVar[int] = 1
    held_bytes: ClassVar[int] = 0
    linear: ClassVar[None] = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        rows, pairs = self.info.shape
        return rows, 2 * pairs

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
    def file(self) -> Path:
        return self.info.file

    def rows(self, start: int = 0, stop: int | None = None) -> StoredRows:
        stop = self.shape[0] if stop is None else stop
        scale = self._checked(self.checkpoint.read_array(self.scale.name, start, stop))
        codes = self.checkpoint.read_rows(self.info.name, start, stop)
        return StoredRows(codes, BlockScale(torch.from_numpy(to_float32(scale, _SCALE_CODE)), 0, 1, GROUP))

    def view(self) -> None:
        return None

    def row_bytes(self) -> RowBytes:
        stored = self._checked(self.checkpoint.read_array(self.scale.name))
        scale = to_float32(stored, _SCALE_CODE)
        return RowBytes(self.checkpoint, self.info.name, self.info.dtype, scale, (1, GROUP), (stored,))

    def _checked(self, scale: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The same scales. CheckpointError for a NaN, which is the one byte that is no power of two."""
        if (scale == 255).any():
            raise CheckpointError(
                f"{self.scale.file}: tensor {self.scale.name!r} holds a scale of NaN (byte 255); the checkpoint is "
                "damaged: fetch that shard again"
            )
        return scale


def has_fp4_experts(config: Mapping[str, Any]) -> bool:
    """True for a config.json whose `expert_dtype` is fp4, at the top as DeepSeek writes it, or in quantization_config,
    where transformers moves it."""
    inside = config.get("quantization_config")
    stated = config.get("expert_dtype") or (inside.get("expert_dtype") if isinstance(inside, Mapping) else None)
    return stated == "fp4"


def fp4_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Find the FP4 weights of a checkpoint, in headers and config.json alone; none without `expert_dtype` fp4.

    Raises CheckpointError for an I8 tensor without its scale, a scale of the wrong shape or dtype, and rows that are no
    whole number of groups.
    """
    if not has_fp4_experts(checkpoint.text_config):
        return {}
    return {name: _weight(checkpoint, info) for name, info in checkpoint.tensors.items() if info.dtype == "I8"}


def _weight(checkpoint: Checkpoint, info: TensorInfo) -> Fp4Weight:
    scale = checkpoint.tensors.get(info.name.removesuffix(_WEIGHT) + _SCALE) if info.name.endswith(_WEIGHT) else None
    if scale is None:
        raise CheckpointError(
            f"{info.file}: FP4 tensor {info.name!r} (I8 under config.json's expert_dtype fp4) has no scale "
            f"{info.name.removesuffix(_WEIGHT) + _SCALE!r} in any shard; fetch all shards"
        )
    if len(info.shape) != 2 or 2 * info.shape[1] % GROUP:
        raise CheckpointError(
            f"{info.file}: FP4 tensor {info.name!r} is I8 {list(info.shape)}, not rows of two inputs a byte in groups "
            f"of {GROUP}; fetch it again"
        )
    rows, groups = info.shape[0], 2 * info.shape[1] // GROUP
    if scale.dtype != _SCALE_CODE or scale.shape != (rows, groups):
        raise CheckpointError(
            f"{scale.file}: scale {scale.name!r} is {scale.dtype} {list(scale.shape)}; {rows} rows of {groups} groups "
            f"of {GROUP} inputs need {_SCALE_CODE} [{rows}, {groups}]"
        )
    return Fp4Weight(checkpoint, info, scale)
