"""DeepSeek-V3.2 and V3.2-Exp: DeepSeek-V3 with sparse attention."""

from __future__ import annotations

from dataclasses import replace

from ..sparse_mla import SparseMlaDefaults
from .blocks import SPARSE_ACTIVATIONS, SPARSE_BLOCKS
from .deepseek_v3 import FAMILY as DEEPSEEK_V3
from .deepseek_v3 import MOE as DEEPSEEK_V3_MOE

FAMILY = replace(
    DEEPSEEK_V3,
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    attention=SparseMlaDefaults(index_n_heads=64, indexer_rope_interleave=False),
    activations=SPARSE_ACTIVATIONS,
    blocks=SPARSE_BLOCKS,
    moe=replace(DEEPSEEK_V3_MOE, reads_layer_types=True),
)
