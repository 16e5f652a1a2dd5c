"""GLM-4.7-Flash: DeepSeek-V3's tensors with GLM's defaults. Its router always scores by sigmoid and has a bias.

The norms of its latents have the epsilon of all others, as in the engines; transformers always takes 1e-6 there.
"""

from __future__ import annotations

from ..family import Family
from ..mla import Mla
from ..moe_config import MoeDefaults
from .blocks import DEEPSEEK_ACTIVATIONS, DEEPSEEK_BLOCKS, DEEPSEEK_FIXED

FAMILY = Family(
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    attention=Mla,
    moe=MoeDefaults(
        first_k_dense_replace=1,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_probs=(True, False),
        routed_scaling_factor=1.8,
        scoring_func="sigmoid",
        topk_methods=("noaux_tc",),
        reads_layer_types=True,
        reads_dense_number=False,
    ),
    activations=DEEPSEEK_ACTIVATIONS,
    blocks=DEEPSEEK_BLOCKS,
    fixed=DEEPSEEK_FIXED,
    rms_norm_eps=1e-5,
)
