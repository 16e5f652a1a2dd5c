"""GLM-5, 5.1 and 5.2: DeepSeek-V3.2's tensors, in GLM-5.2 with selections that several layers share.

The norms of its latents have the epsilon of all others, as in the engines; transformers always takes 1e-6 there.
"""

from __future__ import annotations

from ..family import Family
from ..moe_config import MoeDefaults
from ..sparse_mla import SparseMlaDefaults
from .blocks import DEEPSEEK_FIXED, SPARSE_ACTIVATIONS, SPARSE_BLOCKS

FAMILY = Family(
    model_type="glm_moe_dsa",
    architecture="GlmMoeDsaForCausalLM",
    # Interleaved since transformers #46842; a release before it rotates halves, as V3.2 does.
    attention=SparseMlaDefaults(index_n_heads=32, indexer_rope_interleave=True),
    moe=MoeDefaults(
        first_k_dense_replace=3,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_probs=(True, False),
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_methods=("noaux_tc",),
        reads_layer_types=True,
    ),
    activations=SPARSE_ACTIVATIONS,
    blocks=SPARSE_BLOCKS,
    fixed=DEEPSEEK_FIXED,
    rms_norm_eps=1e-5,
)
