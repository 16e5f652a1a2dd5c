"""What the model, the engine and calibration ask of a kind of attention."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..ops import Activation, AttentionWeights, LinearPart, Ops, Step
from .pools import LayerCache, Pool


class Parts(Protocol):
    """The stored weights of one attention block, by the parts of the family's table ("q_a", "kv_a_norm", …)."""

    def linear(self, part: str) -> LinearPart:
        """A linear with whatever its scheme stores beside it."""

    def tensor(self, part: str) -> Tensor:
        """A float tensor as it is stored."""


class AttentionKind(Protocol):
    """One kind of attention, with the widths and constants of one model."""

    def pools(self, layer: int) -> tuple[Pool, ...]:
        """What a layer's cache holds of every token."""

    def load(self, parts: Parts, ops: Ops) -> AttentionWeights:
        """The weights of one layer as a backend lays them out."""

    def norm(
        self, x: Tensor | None, residual: Tensor, gain: Tensor, weights: AttentionWeights, ops: Ops
    ) -> tuple[Activation, Tensor]:
        """The norm before attention of x + residual, float `[T, H]` each: (normed, x + residual).

        x is None where the residual alone is the input. The rows may come quantized, as the weights take them.
        """

    def write(
        self, hidden: Activation, weights: AttentionWeights, cache: LayerCache, step: Step, ops: Ops
    ) -> dict[str, Tensor]:
        """Write the step's tokens into the cache and no more: by pool, rows `[T, channels]` as it gives them back."""

    def attend(self, hidden: Activation, weights: AttentionWeights, cache: LayerCache, step: Step, ops: Ops) -> Tensor:
        """The attention block of a step: hidden `[T, H]` → `[T, H]`. Writes the cache."""
