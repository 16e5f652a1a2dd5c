"""GLM-4.5, 4.5-Air, 4.6 and 4.7: DeepSeek-V3's experts and MTP layer with grouped-query attention."""

from __future__ import annotations

from ..family import Block, Family
from ..gqa import GqaDefaults
from ..moe_config import MoeDefaults
from .blocks import DEEPSEEK_BLOCKS, GQA, GQA_ACTIVATIONS, MTP_ACTIVATIONS, STREAM

FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    attention=GqaDefaults(use_qk_norm=None, partial_rotary_factor=0.5),
    moe=MoeDefaults(
        first_k_dense_replace=1,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_probs=(True, False),
        routed_scaling_factor=1.0,
        scoring_func="sigmoid",
        topk_methods=("noaux_tc",),
        unread=("moe_layer_freq", "scoring_func", "topk_method"),
    ),
    activations=(*STREAM, *GQA_ACTIVATIONS, *MTP_ACTIVATIONS),
    blocks={**DEEPSEEK_BLOCKS, Block.ATTENTION: GQA},
    fixed={"hidden_act": "silu"},
    rms_norm_eps=1e-5,
)
