"""Choice of the kind of attention by a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Final

from ...errors import BackendError
from ...models.compressed_attention import CompressedAttention
from ...models.config import ModelConfig
from ...models.gqa import Gqa
from ...models.mla import Mla
from ...models.sparse_mla import SparseMla
from ..ops import GqaConfig, MlaConfig, Ops
from ..ops.compressed_attention import CompressedConfig
from .compressed import CompressedAttentionKind
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


def is_on_reference_alone(config: ModelConfig) -> bool:
    """True for a model that the reference backend runs, in one process, and no other."""
    return isinstance(config.attention, CompressedAttention)


def check_backend(config: ModelConfig, ops: Ops) -> None:
    """Raise BackendError, naming what runs the model, where a backend has no operators for its attention, or ranks
    would have to divide it."""
    if not is_on_reference_alone(config):
        return
    if ops.compressed is None or ops.hyper is None:
        raise BackendError(
            f"{config.model_type} runs on the reference backend alone, slowly and exactly (--backend reference): serve "
            "it with vLLM-Ascend or SGLang"
        )
    if ops.group.size > 1:
        raise BackendError(f"{config.model_type} runs in one process: start npuq without torchrun")


def dense_attention_of(config: ModelConfig, softmax_scale: float) -> AttentionKind:
    """A model's attention without selection: exact for sequences whose every token a sparse model would select.

    Raises BackendError for attention to compressed entries, which calibration does not run.
    """
    if isinstance(config.attention, CompressedAttention):
        raise BackendError(f"{config.model_type} cannot be calibrated; convert it with --method mse or minmax")
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


def _compressed(config: ModelConfig, softmax_scale: float, heads: int) -> CompressedAttentionKind:
    widths = config.attention
    assert isinstance(widths, CompressedAttention) and config.compressed_rope is not None
    sizes = CompressedConfig(
        heads=heads,
        head_dim=widths.head_dim,
        rope_dim=widths.rotary_dim,
        groups=widths.o_groups,
        window=widths.sliding_window,
        index_heads=widths.index_n_heads,
        index_head_dim=widths.index_head_dim,
        topk=widths.index_topk,
        rms_norm_eps=config.rms_norm_eps,
        softmax_scale=softmax_scale,
    )
    return CompressedAttentionKind(widths, config.rope, config.compressed_rope, sizes)


def _mla_config(config: ModelConfig, softmax_scale: float, heads: int) -> MlaConfig:
    widths = {field.name: getattr(config.attention, field.name) for field in fields(Mla)} | {"heads": heads}
    return MlaConfig(**widths, rms_norm_eps=config.rms_norm_eps, softmax_scale=softmax_scale)


# By the class of a config's widths.
_KINDS: Final[dict[type, Callable[[ModelConfig, float, int], AttentionKind]]] = {
    Mla: _mla,
    SparseMla: _sparse_mla,
    Gqa: _gqa,
    CompressedAttention: _compressed,
}
