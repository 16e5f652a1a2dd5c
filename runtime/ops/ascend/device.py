"""One NPU, shared by all parts of the Ascend operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...attention.pools import Layout
from .side_stream import SideStream

CAUSAL_MASK_SIDE = 2048
RIGHT_DOWN_CAUSAL = 3  # sparse_mode: query i of S_q sees key j ≤ i + S_kv − S_q
NO_MASK = 0
ROWS_OF_EACH = (
    1  # expert_tokens_num_type, expert_token_nums_type, group_list_type: rows of each expert, not running sums
)


@dataclass
class Npu:
    """Device, compute dtype and operators. kv_layout: of the paged cache. operators: `torch.ops.npu`, untyped.

    side: a second stream; None where there is no device.
    """

    device: torch.device
    dtype: torch.dtype
    kv_layout: Layout
    operators: Any
    side: SideStream | None = None


def causal_mask(device: torch.device) -> torch.Tensor:
    """Compressed mask of sparse modes 2 to 4, for sequences of any length: True is masked."""
    return torch.ones(CAUSAL_MASK_SIDE, CAUSAL_MASK_SIDE, dtype=torch.bool, device=device).triu_(1)
