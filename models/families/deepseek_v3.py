"""DeepSeek-V3, V3.1 and R1; Moonlight, whose queries have no latent."""

from __future__ import annotations

from ..family import Family
from ..mla import Mla
from ..moe_config import MoeDefaults
from .blocks import DEEPSEEK_ACTIVATIONS, DEEPSEEK_BLOCKS, DEEPSEEK_FIXED

MOE = MoeDefaults(
    first_k_dense_replace=3,
    n_shared_experts=1,
    n_group=8,
    topk_group=4,
    norm_topk_probs=(True, False),
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    topk_methods=("noaux_tc",),
)

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    attention=Mla,
    moe=MOE,
    activations=DEEPSEEK_ACTIVATIONS,
    blocks=DEEPSEEK_BLOCKS,
    fixed=DEEPSEEK_FIXED,
)
