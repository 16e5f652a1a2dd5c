"""The residual between the blocks of a model: one stream, or several that hyper-connections mix.

A block reads its normed input from the residual, and its output is added. `Model` walks the layers on a `Residual`
without knowing which one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from .attention.kind import AttentionKind
from .model_weights import LayerWeights, ModelWeights
from .ops import Activation, HyperWeights, Ops
from .ops.hyper_connections import HyperOps


class Residual(Protocol):
    """The residual at one place of a step. It does not change: blocks make new ones."""

    def before_attention(self, layer: LayerWeights, kind: AttentionKind, ops: Ops) -> tuple[Activation, Residual]:
        """Read the normed input of a layer's attention `[T, H]`: (input, the residual that its output is added to)."""

    def before_mlp(self, layer: LayerWeights, eps: float, ops: Ops) -> tuple[Tensor, Residual]:
        """Read the normed input of a layer's MLP or experts, as `before_attention` does."""

    def plus(self, output: Tensor) -> Residual:
        """Add a block's output `[T, H]`."""

    def at(self, rows: Tensor) -> Residual:
        """The residual of some of the step's tokens. rows: int64 `[S]`."""

    def final(self, weights: ModelWeights, eps: float, ops: Ops) -> Tensor:
        """Read the normed input of the head: `[T, H]`."""

    @property
    def values(self) -> Tensor:
        """The numbers of each token, compute dtype `[T, H]`; of several streams side by side."""


@dataclass(frozen=True)
class SingleStream:
    """The plain residual: a block's output is added to its input. See `Residual`.

    stream: `[T, H]`. pending: an output that the next norm adds to it, in one operator; None is zero.
    """

    stream: Tensor
    pending: Tensor | None = None

    def before_attention(self, layer: LayerWeights, kind: AttentionKind, ops: Ops) -> tuple[Activation, SingleStream]:
        normed, total = kind.norm(self.pending, self.stream, layer.input_norm, layer.attention, ops)
        return normed, SingleStream(total)

    def before_mlp(self, layer: LayerWeights, eps: float, ops: Ops) -> tuple[Tensor, SingleStream]:
        return self._normed(layer.mlp_norm, eps, ops)

    def plus(self, output: Tensor) -> SingleStream:
        assert self.pending is None
        return SingleStream(self.stream, output)

    def at(self, rows: Tensor) -> SingleStream:
        pending = None if self.pending is None else self.pending.index_select(0, rows)
        return SingleStream(self.stream.index_select(0, rows), pending)

    def final(self, weights: ModelWeights, eps: float, ops: Ops) -> Tensor:
        return self._normed(weights.norm, eps, ops)[0]

    @property
    def values(self) -> Tensor:
        return self.stream if self.pending is None else self.pending + self.stream

    def _normed(self, gain: Tensor, eps: float, ops: Ops) -> tuple[Tensor, SingleStream]:
        if self.pending is None:
            return ops.norms.rms_norm(self.stream, gain, eps), self
        normed, total = ops.norms.add_rms_norm(self.pending, self.stream, gain, eps)
        return normed, SingleStream(total)


@dataclass(frozen=True)
class HyperStreams:
    """Several streams, mixed by manifold-constrained hyper-connections (DeepSeek-V4). See `Residual`.

    streams: `[T, n, H]`. mixing: how the output of the block that read last is added: (post `[T, n]`, comb `[T, n, n]`,
    float32); None between blocks.
    """

    streams: Tensor
    ops: HyperOps
    mixing: tuple[Tensor, Tensor] | None = None

    def before_attention(self, layer: LayerWeights, kind: AttentionKind, ops: Ops) -> tuple[Activation, HyperStreams]:
        block_input, residual = self._read(layer.attention_streams)
        return kind.norm(None, block_input, layer.input_norm, layer.attention, ops)[0], residual

    def before_mlp(self, layer: LayerWeights, eps: float, ops: Ops) -> tuple[Tensor, HyperStreams]:
        block_input, residual = self._read(layer.mlp_streams)
        return ops.norms.rms_norm(block_input, layer.mlp_norm, eps), residual

    def plus(self, output: Tensor) -> HyperStreams:
        assert self.mixing is not None
        return HyperStreams(self.ops.mix(self.streams, output, *self.mixing), self.ops)

    def at(self, rows: Tensor) -> HyperStreams:
        return replace(self, streams=self.streams.index_select(0, rows))

    def final(self, weights: ModelWeights, eps: float, ops: Ops) -> Tensor:
        assert weights.final_streams is not None
        return ops.norms.rms_norm(self.ops.collapse(self.streams, weights.final_streams), weights.norm, eps)

    @property
    def values(self) -> Tensor:
        return self.streams.flatten(1)

    def _read(self, weights: HyperWeights | None) -> tuple[Tensor, HyperStreams]:
        assert weights is not None
        block_input, post, comb = self.ops.connect(self.streams, weights)
        return block_input, replace(self, mixing=(post, comb))
