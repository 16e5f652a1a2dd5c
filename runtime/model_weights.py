"""The weights of a model as one rank holds them, by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..native.mapped import MappedFiles
from .ops import AttentionWeights, HyperWeights, Linear, MlpWeights, MoeWeights
from .ranks.division import Division


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer, either with the dense block `mlp` or with the experts `moe`.

    attention_streams, mlp_streams: how attention and the block after it read and write several residual streams; None
    in a model with one.
    """

    input_norm: Tensor
    attention: AttentionWeights
    mlp_norm: Tensor
    mlp: MlpWeights | None
    moe: MoeWeights | None
    attention_streams: HyperWeights | None = None
    mlp_streams: HyperWeights | None = None


@dataclass(frozen=True)
class ModelWeights:
    """All weights of one rank. files: mapped files behind them, if any.

    vocabulary: the division of the rows of embedding and lm_head, where ranks divide them; None where they are whole.
    final_streams: how the last norm reads several residual streams; None in a model with one.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Linear
    vocabulary: Division | None = None
    files: MappedFiles = field(default_factory=MappedFiles)
    final_streams: HyperWeights | None = None
