"""Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder: grouped-query attention, and routed experts alone in the sparse layers.

With `attention_bias` transformers has a bias of o too, which no engine adds; no released model has it. Layers attend to
all earlier tokens while `use_sliding_window` is false, whatever `sliding_window` says.
"""

from __future__ import annotations

from ..family import Block, Family
from ..gqa import GqaDefaults
from ..moe_config import SparseStepDefaults
from ..roles import Role
from .blocks import GQA, GQA_ACTIVATIONS, LAYER, ROUTER, STREAM, TOP, gated_mlp

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    attention=GqaDefaults(use_qk_norm=True, partial_rotary_factor=None),
    moe=SparseStepDefaults(norm_topk_prob=False),
    activations=(*STREAM, *GQA_ACTIVATIONS),
    blocks={
        Block.TOP: TOP,
        Block.LAYER: LAYER,
        Block.ATTENTION: GQA,
        Block.DENSE: gated_mlp(Role.DENSE_MLP, "intermediate", "mlp.", when="dense"),
        Block.ROUTER: tuple(entry for entry in ROUTER if entry.part == "router"),
        Block.EXPERT: gated_mlp(Role.ROUTED_EXPERT, "moe_intermediate", "", when="moe"),
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
)
