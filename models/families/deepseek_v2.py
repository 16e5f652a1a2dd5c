"""DeepSeek-V2 and V2-Lite, DeepSeek-Coder-V2."""

from __future__ import annotations

from ..family import Family
from ..mla import Mla
from ..moe_config import MoeDefaults
from .blocks import DEEPSEEK_ACTIVATIONS, DEEPSEEK_BLOCKS, DEEPSEEK_FIXED

FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    attention=Mla,
    moe=MoeDefaults(
        first_k_dense_replace=0,
        n_shared_experts=2,
        n_group=None,
        topk_group=None,
        # With true, transformers, DeepSeek's own code and the engines disagree.
        norm_topk_probs=(False,),
        routed_scaling_factor=1.0,
        scoring_func="softmax",
        topk_methods=("greedy", "group_limited_greedy"),
    ),
    activations=DEEPSEEK_ACTIVATIONS,
    blocks=DEEPSEEK_BLOCKS,
    fixed=DEEPSEEK_FIXED,
)
