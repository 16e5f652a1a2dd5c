"""Manifold-constrained hyper-connections: several residual streams, which each block reads, writes and mixes.

Source: DeepSeek-V4, section 2.2; transformers' `deepseek_v4`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HyperWeights:
    """How one block reads n streams of H channels, writes them and mixes them; float32.

    fn: `[(2 + n)·n, n·H]`, base: `[(2 + n)·n]`, scale: `[3]`. Of the last norm, which only reads: `[n, n·H]`, `[n]` and
    `[1]`. iterations: of Sinkhorn and Knopp. eps: added where it divides. norm_eps: of the norm of the streams.
    """

    fn: Tensor
    base: Tensor
    scale: Tensor
    iterations: int
    eps: float
    norm_eps: float


class HyperOps(ABC):
    """Operators of hyper-connections. Streams are `[T, n, H]` in the compute dtype, all arithmetic is float32."""

    @abstractmethod
    def connect(self, streams: Tensor, weights: HyperWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Read the streams before a block: (block input `[T, H]`, post `[T, n]`, comb `[T, n, n]`).

        post and comb are float32. f = fn · flatten(streams) / rms(flatten(streams)), in parts of n, n and n². The
        block's input is Σ_i (σ(f₁·scale₀ + base) + eps)_i · stream_i, and post is 2·σ(f₂·scale₁ + base). comb begins as
        softmax(f₃·scale₂ + base) over the last axis, + eps. Its columns are divided by their sum + eps; then its rows
        and its columns, `iterations` − 1 times.
        """

    @abstractmethod
    def mix(self, streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """Write a block's output `[T, H]`: stream_j becomes post_j · output + Σ_i comb_ij · stream_i."""

    @abstractmethod
    def collapse(self, streams: Tensor, weights: HyperWeights) -> Tensor:
        """Read the streams before the last norm, as `connect` does before a block: `[T, H]`."""
