"""Choice of the kind of attention by a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Final

from ...errors import BackendError
from ...models.config import ModelConfig
from ...models.gqa import Gqa
from ...models.mla import Mla
from ...models.sparse_mla import SparseMla
from ..ops import GqaConfig, MlaConfig
from .gqa import GqaAttention
from .kind import AttentionKind
from .mla import MlaAttention
from .sparse_mla import SparseMlaAttention


def attention_of(config: ModelConfig, softmax_scale: float, heads: int | None = None) -> AttentionKind:
    """A model's attention. softmax_scale: that of its rope tables, YaRN's factor included.

    heads: the number of heads that this rank computes; None for all.
    """
    kind = _KINDS.get(type(config.attention))
    if kind is None:
        raise BackendError(f"npuq converts {config.model_type}, but its runtime has no kind of attention for it yet")
    return kind(config, softmax_scale, heads or config.attention.heads)


def dense_attention_of(config: ModelConfig, softmax_scale: float) -> AttentionKind:
    """A model's attention without selection: exact for sequences whose every token a sparse model would select."""
    kind = _gqa if isinstance(config.attention, Gqa) else _mla
    return kind(config, softmax_scale, config.attention.heads)


def _mla(config: ModelConfig, softmax_scale: float, heads: int) -> AttentionKind:
    return MlaAttention(_mla_config(config, softmax_scale, heads))


def _sparse_mla(config: ModelConfig, softmax_scale: float, heads: int) -> AttentionKind:
    widths = config.attention
    assert isinstance(widths, SparseMla)
    return SparseMlaAttention.of(_mla_config(config, softmax_scale, heads), widths.indexer, config.num_hidden_layers)


def _gqa(config: ModelConfig, softmax_scale: float, heads: int) -> GqaAttention:
    widths = config.attention
    assert isinstance(widths, Gqa)
    # Ranks that are more than the key and value heads have one each, as their neighbours have.
    kv_heads = max(1, widths.kv_heads * heads // widths.heads)
    sizes = GqaConfig(heads, kv_heads, widths.head_dim, widths.rotary_dim, config.rms_norm_eps, softmax_scale)
    return GqaAttention(sizes, widths.attention_bias, widths.use_qk_norm)


def _mla_config(config: ModelConfig, softmax_scale: float, heads: int) -> MlaConfig:
    widths = {field.name: getattr(config.attention, field.name) for field in fields(Mla)} | {"heads": heads}
    return MlaConfig(**widths, rms_norm_eps=config.rms_norm_eps, softmax_scale=softmax_scale)


# By the class of a config's widths.
_KINDS: Final[dict[type, Callable[[ModelConfig, float, int], AttentionKind]]] = {
    Mla: _mla,
    SparseMla: _sparse_mla,
    Gqa: _gqa,
}
