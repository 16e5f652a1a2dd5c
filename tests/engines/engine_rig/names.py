"""An engine's names of modules and parameters, and the artifact's names of tensors."""

from __future__ import annotations

import re

# A linear of an engine, and those that it fuses.
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "wk_weights_proj": ("wk", "weights_proj"),
    "wkv_gate": ("wkv", "wgate"),
}
# A stored linear, and the one that it is part of.
PARTS = {part: leaf for leaf, parts in FUSED.items() for part in parts} | {"w1": "gate_up_proj", "w3": "gate_up_proj"}
# Parts of modules' names in an engine, and of tensors' names in the artifact.
_RENAMED = {
    ".experts.routed_experts": ".experts",
    "mm_projector.linear_1": "mm_projector.proj.0",
    "mm_projector.linear_2": "mm_projector.proj.2",
    ".attn.qkv_proj": ".wqkv",
    ".attn.proj": ".wo",
}
# Of a model that keeps its release's names, DeepSeek-V4, as well.
_RELEASED = {
    ".self_attn.": ".attn.",
    ".mlp.": ".ffn.",
    ".input_layernorm": ".attn_norm",
    ".post_attention_layernorm": ".ffn_norm",
    ".gate_proj": ".w1",
    ".up_proj": ".w3",
    ".down_proj": ".w2",
    ".topk.tid2eid": ".gate.tid2eid",
    ".gate.e_score_correction_bias": ".gate.bias",
    ".shared_head.norm": ".norm",
    "embed_tokens": "embed",
    "lm_head": "head",
}
# SGLang's draft has its decoder layer as model.decoder, and norms and projections beside it.
_BESIDE_DECODER = re.compile(r"^model\.(?:decoder\.|(?=eh_proj|enorm|hnorm|shared_head))")
# So it has of a release; vLLM's has them in the layer, whose decoder layer is mtp_block.
_RELEASED_DRAFT = re.compile(r"^model\.(?:layers\.0\.(?:mtp_block\.)?|decoder\.)?")


def stored_name(name: str, last: int, *, mtp: bool, released: bool) -> str:
    """The artifact's name of an engine's module, parameter, or fused part.

    last: the model's number of layers. mtp: the name is a draft's. released: the artifact has its release's names.
    """
    for theirs, stored in _RENAMED.items():
        name = name.replace(theirs, stored)
    if not released:
        name = _BESIDE_DECODER.sub(f"model.layers.{last}.", name) if mtp else name
        return name.replace(".mtp_block.", ".")
    name = _RELEASED_DRAFT.sub("mtp.0.", name) if mtp else name.removeprefix("model.")
    for theirs, stored in _RELEASED.items():
        name = name.replace(theirs, stored)
    return name
