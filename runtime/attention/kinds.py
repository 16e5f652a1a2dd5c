"""Choice of the kind of attention by a config."""

from __future__ import annotations

from ...models.config import ModelConfig
from ..ops import MlaConfig
from .kind import AttentionKind
from .mla import MlaAttention


def attention_of(config: ModelConfig, softmax_scale: float) -> AttentionKind:
    """A model's attention. softmax_scale: that of its rope tables, YaRN's factor included."""
    widths = vars(config.attention)
    return MlaAttention(MlaConfig(**widths, rms_norm_eps=config.rms_norm_eps, softmax_scale=softmax_scale))
