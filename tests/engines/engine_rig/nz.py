"""The cast to the NPU's tiled layout, as the engines do it on a device: matrices that do not fill tiles stay as are."""

from __future__ import annotations

from typing import Any

import torch
from ascend_rig.formats import FRACTAL_NZ, TILE_BYTES, TILE_ROWS
from torch import Tensor


def cast_where_it_fits(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    fits = tensor.shape[-2] % TILE_ROWS == 0 and tensor.shape[-1] % (TILE_BYTES // tensor.element_size()) == 0
    return torch.ops.npu.npu_format_cast(tensor, FRACTAL_NZ) if fits else tensor
