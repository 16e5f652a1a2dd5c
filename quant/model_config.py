"""A model's config.json, read once into typed fields, in either of its dialects: DeepSeek's own (`rope_scaling` and
`rope_theta`) and transformers 5's (`rope_parameters`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

# Names under which the same rope type appears in configs and engines.
_ROPE_ALIASES = {"deepseek_yarn": "yarn"}
_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Far above any model: what a config claims is enumerated, and must not fill the memory before it is found wrong.
_MAX_LAYERS = 1000
_MAX_POSITIONS = 1 << 24
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_BIAS = re.compile(r"model\.(?:layers\.[0-9]+\..+|norm)\.bias")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding parameters under transformers' names; `dim` is qk_rope_head_dim."""

    rope_type: str
    theta: float
    dim: int
    max_position: int
    factor: float = 1.0
    original_max_position: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    truncate: bool = True


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
    attention_bias: bool
    max_position_embeddings: int
    dtype: torch.dtype
    rope: RopeConfig

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read and check a config; CheckpointError names the key that is missing, malformed or unknown."""
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"config.json: model_type {model_type!r} is unknown; npuq knows {', '.join(MODEL_TYPES)}"
            )
        read = _Reader(config)
        v2 = model_type == "deepseek_v2"
        result = cls(
            model_type=model_type,
            hidden_size=read.size("hidden_size"),
            intermediate_size=read.size("intermediate_size"),
            moe_intermediate_size=read.size("moe_intermediate_size"),
            num_hidden_layers=read.size("num_hidden_layers", most=_MAX_LAYERS),
            num_nextn_predict_layers=read.count("num_nextn_predict_layers", 0, most=_MAX_LAYERS),
            num_attention_heads=read.size("num_attention_heads"),
            q_lora_rank=None if config.get("q_lora_rank") is None else read.size("q_lora_rank"),
            kv_lora_rank=read.size("kv_lora_rank"),
            qk_nope_head_dim=read.size("qk_nope_head_dim"),
            qk_rope_head_dim=read.size("qk_rope_head_dim"),
            v_head_dim=read.size("v_head_dim"),
            n_routed_experts=read.size("n_routed_experts"),
            n_shared_experts=read.count("n_shared_experts", 0),
            num_experts_per_tok=read.size("num_experts_per_tok"),
            first_k_dense_replace=read.count("first_k_dense_replace", 0),
            moe_layer_freq=read.size("moe_layer_freq", 1),
            n_group=read.size("n_group", 1),
            topk_group=read.size("topk_group", 1),
            scoring_func=read.choice("scoring_func", ("softmax", "sigmoid"), "softmax" if v2 else "sigmoid"),
            topk_method=read.choice(
                "topk_method", ("greedy", "group_limited_greedy", "noaux_tc"), "greedy" if v2 else "noaux_tc"
            ),
            norm_topk_prob=read.flag("norm_topk_prob", not v2),
            routed_scaling_factor=read.number("routed_scaling_factor", 1.0),
            vocab_size=read.size("vocab_size"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            attention_bias=read.flag("attention_bias", False),
            max_position_embeddings=read.size("max_position_embeddings", most=_MAX_POSITIONS),
            dtype=model_dtype(config),
            rope=_rope_config(config),
        )
        # What another value would mean is not computed: refuse it rather than run another model.
        read.choice("hidden_act", ("silu",), "silu")
        if not read.flag("rope_interleave", True):
            raise CheckpointError(
                "config.json: rope_interleave false is not supported; DeepSeek's rotary is interleaved"
            )
        result._check()
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
        if self.num_experts_per_tok > self.n_routed_experts // self.n_group * self.topk_group:
            raise CheckpointError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} exceeds the experts that its groups hold"
            )
        if self.qk_rope_head_dim % 2:
            raise CheckpointError(f"config.json: qk_rope_head_dim {self.qk_rope_head_dim} is odd; rotary needs pairs")
        if self.attention_bias:
            raise CheckpointError(
                "config.json: attention_bias true is not supported; no released DeepSeek model has it"
            )


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype a config names for float weights (`torch_dtype`, or transformers 5's `dtype`); bfloat16 by default."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"config.json: dtype {name!r} is unknown; npuq knows {', '.join(_DTYPES)}")
    return dtype


def _rope_config(config: Mapping[str, Any]) -> RopeConfig:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise CheckpointError("config.json: rope_scaling (or rope_parameters) must be an object")
    name = str(parameters.get("rope_type") or parameters.get("type") or "default")
    rope_type = _ROPE_ALIASES.get(name, name)
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(f"config.json: rope type {name!r} is unknown; npuq knows {', '.join(ROPE_TYPES)}")
    missing = [key for key in _ROPE_REQUIRED[rope_type] if parameters.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json: rope type {name!r} needs {', '.join(missing)}")
    read = _Reader({**config, **parameters})
    original = None
    if parameters.get("original_max_position_embeddings") is not None:
        original = read.size("original_max_position_embeddings")
    rope = RopeConfig(
        rope_type=rope_type,
        theta=read.number("rope_theta", 10000.0),
        dim=read.size("qk_rope_head_dim"),
        max_position=read.size("max_position_embeddings"),
        factor=read.number("factor", 1.0),
        original_max_position=original,
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        mscale=read.number("mscale", 1.0),
        mscale_all_dim=read.number("mscale_all_dim", 0.0),
        attention_factor=None if parameters.get("attention_factor") is None else read.number("attention_factor"),
        low_freq_factor=read.number("low_freq_factor", 1.0),
        high_freq_factor=read.number("high_freq_factor", 4.0),
        truncate=read.flag("truncate", True),
    )
    _check_rope(rope)
    return rope


def _check_rope(rope: RopeConfig) -> None:
    """Refuse what gives tables without meaning: divisions by zero, logarithms of nothing, lengths beyond all memory."""
    for key in ("factor", "beta_fast", "beta_slow"):
        if getattr(rope, key) <= 0:
            raise CheckpointError(f"config.json: rope {key} must be above 0, not {getattr(rope, key)}")
    if rope.theta <= 1:
        raise CheckpointError(f"config.json: rope_theta must be above 1, not {rope.theta}")
    if rope.rope_type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise CheckpointError("config.json: rope high_freq_factor must be above low_freq_factor")
    if rope.rope_type == "dynamic" and (rope.dim == 2 or rope.max_position * rope.factor > _MAX_POSITIONS):
        raise CheckpointError(
            f"config.json: dynamic rope of factor {rope.factor} over {rope.max_position} positions needs more than two "
            f"rotary dimensions and at most {_MAX_POSITIONS} positions in all"
        )


class _Reader:
    """Typed access to a config: a key that is absent or null takes the default, or is an error where there is none."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config

    def size(self, key: str, default: int | None = None, most: int | None = None) -> int:
        value = self.count(key, default, most)
        if value < 1:
            raise CheckpointError(f"config.json: {key} must be at least 1, not {value}")
        return value

    def count(self, key: str, default: int | None = None, most: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or value < 0:
            raise CheckpointError(f"config.json: {key} must be a whole number, not {value!r}")
        if most is not None and value > most:
            raise CheckpointError(f"config.json: {key} {value} is more than any model has; npuq reads up to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        # JSON has no infinity and no NaN, but Python reads both.
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
            raise CheckpointError(f"config.json: {key} must be a finite number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        value = self._get(key, default)
        if value not in choices:
            raise CheckpointError(f"config.json: {key} {value!r} is unknown; npuq knows {', '.join(choices)}")
        return str(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self._config.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"config.json: {key} is missing")
        return value


def check_unbiased(names: Iterable[str]) -> None:
    """Raise CheckpointError for a bias of a norm or linear: no model of these types has one, and no loader adds it.

    Asymmetric smoothing before quantization leaves such biases.
    """
    for name in filter(_BIAS.fullmatch, names):
        raise CheckpointError(
            f"tensor {name!r}: npuq and the engines compute without biases; smooth symmetrically and quantize again"
        )
