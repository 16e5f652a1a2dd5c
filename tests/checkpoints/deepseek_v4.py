"""Tiny random DeepSeek-V4 models under the release's names: transformers computes them, and its results are golden."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 320

# A window only, entries that are selected, entries that are all attended to, twice; two hashed layers.
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 48,
    "o_groups": 2,
    "o_lora_rank": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "num_hash_layers": 2,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 1.0,
    "sliding_window": 12,
    "compress_ratios": [0, 4, 24, 4],
    "compress_rope_theta": 160000.0,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "index_n_heads": 8,
    "index_head_dim": 32,
    "index_topk": 3,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

_KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention"}
_ALL = "heavily_compressed_attention"
_LAYER = {
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
}
_COMPRESSOR = {
    "kv_proj.weight": "wkv.weight",
    "gate_proj.weight": "wgate.weight",
    "position_bias": "ape",
    "kv_norm.weight": "norm.weight",
}
for _theirs, _ours in _COMPRESSOR.items():
    _LAYER[f"self_attn.compressor.{_theirs}"] = f"attn.compressor.{_ours}"
    _LAYER[f"self_attn.compressor.indexer.{_theirs}"] = f"attn.indexer.compressor.{_ours}"
_TOP = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}
_FLOAT32 = re.compile(r"hc_|attn_sink|\.ape$|gate\.bias$")


def golden_model(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 20260807) -> Any:
    """transformers' model with random weights, float32, rounded to `dtype` where the release has 16 bits.

    Wide enough that every part moves the logits: clamps, sinks, all experts.
    """
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    theirs = {key: value for key, value in config.items() if key not in ("compress_ratios", "rope_scaling")}
    ratios = config["compress_ratios"][: config["num_hidden_layers"]]
    theirs["layer_types"] = [_KINDS.get(ratio, _ALL) for ratio in ratios]
    others = {ratio for ratio in ratios if ratio not in _KINDS} or {128}
    theirs["compress_rates"] = {_KINDS[4]: 4, _ALL: others.pop()}
    scaling = config.get("rope_scaling")
    if scaling is not None:
        theirs["rope_parameters"] = {"rope_type": scaling["type"], **scaling}
    made = DeepseekV4Config(**theirs, attn_implementation="eager")
    model = DeepseekV4ForCausalLM(made).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2, generator=generator)
            elif name.endswith(("base", "scale", "sinks", "position_bias")):
                parameter.normal_(0.0, 0.7, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            if not _FLOAT32.search(release_names(name)[0]):
                parameter.copy_(parameter.to(dtype))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2, generator=generator)
            if name.endswith("tid2eid"):  # different experts for each token
                order = torch.rand(buffer.shape[0], config["n_routed_experts"], generator=generator).argsort(1)
                buffer.copy_(order[:, : buffer.shape[1]])
    return model


def write_model(directory: Path, model: Any, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write the checkpoint of a golden model in float: as the release names it, and with its dtypes."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = release_tensors(model, dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))


def release_tensors(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a golden model under the release's names."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for renamed, part in zip(release_names(name, len(tensor)), _split(name, tensor), strict=True):
            kept = not part.is_floating_point() or _FLOAT32.search(renamed)
            tensors[renamed] = part.contiguous() if kept else part.to(dtype).contiguous()
    return tensors


def release_names(name: str, experts: int = 0) -> list[str]:
    """The release's names of a tensor of transformers, which stacks so many experts' linears."""
    if name in _TOP:
        return [_TOP[name]]
    found = re.fullmatch(r"model\.layers\.([0-9]+)\.(.*)", name)
    assert found is not None, name
    layer, rest = f"layers.{found[1]}.", found[2]
    if rest == "mlp.experts.gate_up_proj":
        return [f"{layer}ffn.experts.{i}.{w}.weight" for i in range(experts) for w in ("w1", "w3")] or [name]
    if rest == "mlp.experts.down_proj":
        return [f"{layer}ffn.experts.{i}.w2.weight" for i in range(experts)] or [name]
    return [layer + _LAYER[rest]]


def _split(name: str, tensor: Tensor) -> list[Tensor]:
    if name.endswith("experts.gate_up_proj"):
        return [half for expert in tensor for half in expert.chunk(2)]
    return list(tensor) if name.endswith("experts.down_proj") else [tensor]
