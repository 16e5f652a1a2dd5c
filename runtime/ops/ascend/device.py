"""One NPU as all parts of the Ascend set see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...attention.pools import Layout

CAUSAL_MASK_SIDE = 2048
RIGHT_DOWN_CAUSAL = 3  # sparse_mode: query i of S_q sees key j ≤ i + S_kv − S_q
NO_MASK = 0


@dataclass
class Npu:
    """operators: `torch.ops.npu`, which has no types. kv_layout: of the paged cache."""

    device: torch.device
    dtype: torch.dtype
    kv_layout: Layout
    operators: Any


def causal_mask(device: torch.device) -> torch.Tensor:
    """The compressed mask that sparse modes 2 to 4 ask for, whatever the lengths: true is hidden."""
    return torch.ones(CAUSAL_MASK_SIDE, CAUSAL_MASK_SIDE, dtype=torch.bool, device=device).triu_(1)
