"""Protocol of a kind of attention, as the model, the engine and calibration call it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from ..ops import Activation, AttentionWeights, LinearPart, Ops, Step
from .pools import LayerCache, Pool


class Parts(Protocol):
    """The stored weights of one attention block, by the parts of the family's table ("q_a", "kv_a_norm", …)."""

    def linear(self, part: str) -> LinearPart:
        """The linear and the tensors that its scheme stores beside it."""

    def tensor(self, part: str) -> Tensor:
        """The float tensor, in its stored dtype."""


class Attended(NamedTuple):
    """The output of an attention block `[T, H]`.

    selected: what the layer hands on to the next one in the same step, the tokens that each query attends to, int32
    `[T, 1, k]`; None where queries attend to all that they see.
    """

    output: Tensor
    selected: Tensor | None = None


class AttentionKind(Protocol):
    """One kind of attention, with the widths and constants of one model."""

    @property
    def dense_tokens(self) -> int | None:
        """The longest sequence in which every query attends to all earlier tokens; None: any.

        A step with a longer one attends to the cache alone, in absorbed form (`Step.decode`).
        """

    @property
    def absorbed_tokens(self) -> int:
        """The longest chunk behind cached tokens that takes less arithmetic in absorbed form than in any other."""

    @property
    def continues_on_pages(self) -> bool:
        """True if a chunk behind cached tokens attends to the pages alone (`Step.decode`), its own tokens among them.

        Otherwise it attends to decompressed keys and values (`Step.prefill`).
        """

    def pools(self, layer: int) -> tuple[Pool, ...]:
        """Pools of a layer's cache."""

    def load(self, layer: int, parts: Parts, ops: Ops) -> AttentionWeights:
        """Weights of a layer, laid out by the backend."""

    def with_cache_scales(self, weights: AttentionWeights, scales: Mapping[str, Tensor], ops: Ops) -> AttentionWeights:
        """Weights of a layer for a cache whose pools named in `scales` hold codes. scales: float32 `[channels]`."""

    def norm(
        self, x: Tensor | None, residual: Tensor, gain: Tensor, weights: AttentionWeights, ops: Ops
    ) -> tuple[Activation, Tensor]:
        """Normalise x + residual, float `[T, H]` each, before attention: (normed, x + residual).

        x is None where the residual alone is the input. The normed rows may be quantized, if the weights take them so.
        """

    def write(
        self, hidden: Activation, weights: AttentionWeights, cache: LayerCache, step: Step, ops: Ops
    ) -> dict[str, Tensor]:
        """Write the step's tokens into the cache without attending: rows `[T, channels]` by pool, as read back."""

    def attend(
        self,
        hidden: Activation,
        weights: AttentionWeights,
        cache: LayerCache,
        step: Step,
        ops: Ops,
        selected: Tensor | None = None,
    ) -> Attended:
        """Run the attention block of a step on hidden rows `[T, H]`, and write the cache.

        selected: what the layer below handed on.
        """
