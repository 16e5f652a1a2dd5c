"""Choice of the kind of attention by a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ...models.config import ModelConfig
from ...models.mla import Mla
from ..ops import MlaConfig
from .kind import AttentionKind
from .mla import MlaAttention


def attention_of(config: ModelConfig, softmax_scale: float) -> AttentionKind:
    """A model's attention. softmax_scale: that of its rope tables, YaRN's factor included."""
    return _KINDS[type(config.attention)](config, softmax_scale)


def _mla(config: ModelConfig, softmax_scale: float) -> AttentionKind:
    widths = vars(config.attention)
    return MlaAttention(MlaConfig(**widths, rms_norm_eps=config.rms_norm_eps, softmax_scale=softmax_scale))


# By the class of a config's widths.
_KINDS: Final[dict[type, Callable[[ModelConfig, float], AttentionKind]]] = {Mla: _mla}
