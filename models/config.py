"""A model's config.json, read once into typed fields, in either of its dialects: DeepSeek's own and transformers 5's.

What it accepts, every backend computes, and as transformers or the engines do: a config without such a meaning is
refused here, before any work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from .config_reader import MAX_LAYERS, MAX_POSITIONS, ConfigReader, shown
from .rope_config import RopeConfig, read_rope
from .rope_frequencies import check_computable

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_BIAS = re.compile(r"model\.(?:layers\.[0-9]+\..+|norm)\.bias")


@dataclass(frozen=True)
class _Defaults:
    """What loaders take for a key that config.json leaves out, and the values that any of them computes with."""

    first_k_dense_replace: int
    shared: int  # n_shared_experts
    n_group: int | None
    topk_group: int | None
    norm_topk_prob: bool
    routed_scaling_factor: float
    scoring_func: str
    topk_methods: tuple[str, ...]  # the first is the default


# As transformers' configuration classes and DeepSeek's own have them.
_V2 = _Defaults(0, 2, None, None, False, 1.0, "softmax", ("greedy", "group_limited_greedy"))
_V3 = _Defaults(3, 1, 8, 4, True, 2.5, "sigmoid", ("noaux_tc",))

# Other names of keys, as transformers reads them.
_ALIASES = {
    "n_routed_experts": ("num_local_experts", "num_experts"),
    "num_nextn_predict_layers": ("num_mtp_layers",),
}


@dataclass(frozen=True)
class ModelConfig:
    """The part of config.json that conversion and the runtime need, under Hugging Face's names."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    moe_layer_freq: int
    n_group: int
    topk_group: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: torch.dtype
    rope: RopeConfig

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read and check a config; CheckpointError names the key that is missing, malformed or unknown."""
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"config.json: model_type {shown(model_type)} is unknown; npuq knows {', '.join(MODEL_TYPES)}"
            )
        default = _V2 if model_type == "deepseek_v2" else _V3
        read = ConfigReader(_without_aliases(config))
        topk_method = read.choice("topk_method", default.topk_methods, default.topk_methods[0])
        greedy = topk_method == "greedy"
        # greedy has no groups, whatever is said of them. Elsewhere no loader has a default for null.
        n_group = 1 if greedy else read.size("n_group", default.n_group, nullable=False)
        topk_group = 1 if greedy else read.size("topk_group", default.topk_group, nullable=False)
        result = cls(
            model_type=model_type,
            hidden_size=read.size("hidden_size"),
            intermediate_size=read.size("intermediate_size"),
            moe_intermediate_size=read.size("moe_intermediate_size"),
            num_hidden_layers=read.size("num_hidden_layers", most=MAX_LAYERS),
            num_nextn_predict_layers=read.count("num_nextn_predict_layers", 0, most=MAX_LAYERS),
            num_attention_heads=read.size("num_attention_heads"),
            q_lora_rank=None if config.get("q_lora_rank") is None else read.size("q_lora_rank"),
            kv_lora_rank=read.size("kv_lora_rank"),
            qk_nope_head_dim=read.size("qk_nope_head_dim"),
            qk_rope_head_dim=read.size("qk_rope_head_dim"),
            v_head_dim=read.size("v_head_dim"),
            n_routed_experts=read.size("n_routed_experts"),
            # null is DeepSeek's and the engines' way to say none.
            n_shared_experts=read.count("n_shared_experts", 0 if "n_shared_experts" in config else default.shared),
            num_experts_per_tok=read.size("num_experts_per_tok"),
            first_k_dense_replace=read.count("first_k_dense_replace", default.first_k_dense_replace, nullable=False),
            moe_layer_freq=read.size("moe_layer_freq", 1),
            n_group=n_group,
            topk_group=topk_group,
            scoring_func=read.choice("scoring_func", (default.scoring_func,), default.scoring_func),
            topk_method=topk_method,
            norm_topk_prob=read.flag("norm_topk_prob", default.norm_topk_prob, nullable=False),
            routed_scaling_factor=read.number("routed_scaling_factor", default.routed_scaling_factor),
            vocab_size=read.size("vocab_size"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6, 0.0, 1.0),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            max_position_embeddings=read.size("max_position_embeddings", most=MAX_POSITIONS),
            dtype=model_dtype(config),
            rope=read_rope(config),
        )
        # What another value would mean is not computed: refuse it rather than run another model.
        read.choice("hidden_act", ("silu",), "silu")
        for key, needed in (("rope_interleave", True), ("attention_bias", False), ("mlp_bias", False)):
            if read.flag(key, needed) is not needed:
                raise CheckpointError(
                    f"config.json: {key} {str(not needed).lower()} is not supported; no released model has it"
                )
        result._check()
        check_computable(result.rope)
        return result

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a decoder layer has routed experts. MTP layers (layer ≥ num_hidden_layers) always do."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def _check(self) -> None:
        if self.n_routed_experts % self.n_group or self.topk_group > self.n_group:
            raise CheckpointError(
                f"config.json: {self.n_routed_experts} experts in n_group {self.n_group} groups, topk_group "
                f"{self.topk_group}: groups must divide the experts and hold topk_group"
            )
        if self.topk_method == "noaux_tc" and self.n_routed_experts // self.n_group < 2:
            raise CheckpointError(
                f"config.json: n_group {self.n_group} makes groups of one expert, and noaux_tc scores a group by the "
                "sum of its two best: no loader computes that"
            )
        if self.num_experts_per_tok > self.n_routed_experts // self.n_group * self.topk_group:
            raise CheckpointError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} exceeds the experts that its groups hold"
            )
        if self.model_type == "deepseek_v2" and self.norm_topk_prob:
            raise CheckpointError(
                "config.json: norm_topk_prob true is not supported for deepseek_v2: transformers, DeepSeek's own code "
                "and the engines each compute something else, and no released model has it"
            )


def _without_aliases(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config under DeepSeek's names. CheckpointError for two names of one thing with different values."""
    result = dict(config)
    for key, others in _ALIASES.items():
        for other in others:
            value = config.get(other)
            if value is None:
                continue
            if result.get(key) not in (None, value):
                raise CheckpointError(
                    f"config.json: {key} is {shown(result[key])} and {other} {shown(value)}, two names of one number: "
                    "keep the right one"
                )
            result[key] = value
    return result


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype a config names for float weights (`torch_dtype`, or transformers 5's `dtype`); bfloat16 by default."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"config.json: dtype {shown(name)} is unknown; npuq knows {', '.join(_DTYPES)}")
    return dtype


def check_unbiased(names: Iterable[str]) -> None:
    """Raise CheckpointError for a bias of a norm or linear: no model of these types has one, and no loader adds it.

    Asymmetric smoothing before quantization leaves such biases.
    """
    for name in filter(_BIAS.fullmatch, names):
        raise CheckpointError(
            f"tensor {name!r}: npuq and the engines compute without biases; smooth symmetrically and quantize again"
        )
