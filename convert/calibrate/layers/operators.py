"""The runtime's operators for calibration: the reference's in float32, on linears as engines will have them, or that
record their inputs.

They differ from the reference where it would change the last bits of results, or hold memory for nothing:
- a linear multiplies float32 weights behind their codes with rounded float32 inputs, not integers;
- linears of one input are not fused, nor gate and up of a feed-forward block: side by side, the vector loops of an
  activation function end elsewhere, and round their remainder otherwise;
- a feed-forward block takes some thousand rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ....formats.schemes import Scheme
from ....formats.static_w8a8 import InputScale
from ....models.sparse_mla import GATHERED_NUMBERS
from ....quant.arithmetic import Arithmetic
from ....runtime.attention.pools import LayerCache
from ....runtime.ops import Activation, Linear, LinearPart, MlpWeights, Ops
from ....runtime.ops.handles import own
from ....runtime.ops.reference.cache import ReferenceCaches
from ....runtime.ops.reference.grouped_attention import ReferenceGroupedAttention
from ....runtime.ops.reference.latent_attention import ReferenceLatentAttention
from ....runtime.ops.reference.norms import ReferenceNorms
from ....runtime.ops.reference.products import ReferenceProducts
from ....runtime.ops.reference.rotary import ReferenceRotary
from ....runtime.ops.reference.routing import ReferenceRouting
from ....runtime.ops.reference.sparse_attention import ReferenceSparseAttention
from ....runtime.ops.reference.weights import ReferenceWeights
from ....runtime.ranks.division import Division


@dataclass(frozen=True)
class Deployed(LinearPart, Linear):
    """A linear as engines will run it: `weight` float32 `[N, K]` behind its codes, and the rounding of its inputs.

    error: √ of the squared relative output error on the calibration inputs; None: not measured.
    """

    inputs: InputScale | None = None
    error: float | None = None

    def __call__(self, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        """Multiply x float32 `[T, K]` → `[T, N]`."""
        return arithmetic.linear(round_inputs(x, self.scheme, self.inputs), self.weight)


class ReachedError(Exception):
    """Ends a pass at the linear that it was to reach. `inputs`: that linear's inputs, float32 `[T, K]`."""

    def __init__(self, inputs: Tensor):
        super().__init__()
        self.inputs = inputs


@dataclass(frozen=True)
class Recording(Deployed):
    """A linear that raises ReachedError with its inputs."""

    def __call__(self, x: Tensor, arithmetic: Arithmetic) -> NoReturn:
        raise ReachedError(x)


@dataclass(frozen=True)
class GateUp(Linear):
    """The pair gate and up of a feed-forward block, not fused."""

    gate: Deployed
    up: Deployed


def mlp_weights(gate: Deployed, up: Deployed, down: Deployed) -> MlpWeights:
    """The three linears of a feed-forward block as a handle."""
    return MlpWeights(GateUp(gate, up), down, quantized=False)


def float_mlp(tensors: Sequence[Tensor]) -> MlpWeights:
    """A feed-forward block of gate, up and down, float32."""
    return mlp_weights(*(Deployed("", Scheme.FLOAT, weight) for weight in tensors))


class CalibrationWeights(ReferenceWeights):
    """Keeps every linear apart."""

    def fusible(self, parts: Sequence[LinearPart]) -> list[list[LinearPart]]:
        return [[part] for part in parts]

    def linear_of(self, parts: Sequence[LinearPart]) -> Linear:
        (part,) = parts
        return own(part, Deployed)

    def float_linear(self, weights: Sequence[Tensor], outputs: Sequence[Division | None] = ()) -> Linear:
        (weight,) = weights
        return Deployed("", Scheme.FLOAT, weight)


class CalibrationProducts(ReferenceProducts):
    """Computes products with deployed linears."""

    def __init__(self, dtype: torch.dtype, norms: ReferenceNorms, arithmetic: Arithmetic):
        super().__init__(dtype, norms)
        self._arithmetic = arithmetic

    def linear(self, x: Activation, linear: Linear) -> Tensor:
        return own(linear, Deployed)(own(x, Tensor), self._arithmetic)


class CalibrationRouting(ReferenceRouting):
    """Computes feed-forward blocks some rows at a time."""

    def mlp(self, hidden: Tensor, weights: MlpWeights) -> Tensor:
        parts = [super(CalibrationRouting, self).mlp(hidden[part], weights) for part in row_chunks(hidden.shape[0])]
        return torch.cat(parts or [hidden])

    def mlp_inner(self, hidden: Tensor, weights: MlpWeights) -> Tensor:
        """Compute as `Routing.mlp_inner`, never quantized."""
        both = own(weights.gate_up, GateUp)
        return F.silu(self.products.linear(hidden, both.gate)) * self.products.linear(hidden, both.up)


class CalibrationSparseAttention(ReferenceSparseAttention):
    """Selects tokens and gathers them for some queries at a time. Samples are longer than a step of the runtime."""

    heads_together = None  # no ranks divide them

    def _select(self, query: Tensor, weights: Tensor, key: Tensor, past: int, count: int) -> Tensor:
        size = max(1, GATHERED_NUMBERS // (query.shape[1] * key.shape[0]))
        parts = row_chunks(query.shape[0], size)
        return torch.cat(
            [
                super(CalibrationSparseAttention, self)._select(query[p], weights[p], key, past + p.start, count)
                for p in parts
            ]
        )

    def _attention_to(self, query: Tensor, cache: LayerCache, slots: Tensor, none: Tensor, scale: float) -> Tensor:
        size = max(1, GATHERED_NUMBERS // (slots.shape[1] * (2 * query.shape[2] + query.shape[1])))
        parts = row_chunks(query.shape[0], size)
        return torch.cat(
            [
                super(CalibrationSparseAttention, self)._attention_to(query[p], cache, slots[p], none[p], scale)
                for p in parts
            ]
        )


class CalibrationOps(Ops):
    """The operators of a walk. Stateless: threads share them."""

    name = "calibration"
    routing: CalibrationRouting

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.weights = weights = CalibrationWeights()
        self.norms = ReferenceNorms(self.dtype)
        self.products = CalibrationProducts(self.dtype, self.norms, arithmetic)
        self.routing = CalibrationRouting(self.dtype, self.norms, self.products)
        # ND takes any number of channels.
        self.caches = ReferenceCaches(self.dtype, "nd")
        self.rotary = ReferenceRotary(self.dtype)
        self.mla = ReferenceLatentAttention(self.dtype, weights, self.norms, self.products, self.rotary)
        self.gqa = ReferenceGroupedAttention(self.dtype, weights, self.norms, self.products, self.rotary)
        self.sparse = CalibrationSparseAttention(self.dtype, weights, self.norms, self.products, self.rotary)


def round_inputs(x: Tensor, scheme: Scheme, inputs: InputScale | None) -> Tensor:
    """Round activations float32 `[T, K]` as a linear of this scheme does: to int8 per token, to a fixed grid, or not at
    all."""
    if scheme is Scheme.FLOAT:
        return x
    if inputs is not None:
        codes = (x / inputs.scale + inputs.offset).round_().clamp_(-128, 127)
        return codes.sub_(inputs.offset).mul_(inputs.scale)
    factors = 127.0 / x.abs().amax(dim=1, keepdim=True)
    factors.masked_fill_(factors.isinf(), 0.0)
    return (x * factors).round_().mul_(factors.reciprocal().masked_fill_(factors == 0, 0.0))


def is_finite(tensor: Tensor) -> bool:
    """True for a tensor without infinities and NaN.

    In chunks: a mask of all values at once would exceed any budget. A finite sum proves finite values, and takes a
    fraction of the time of a look at each.
    """
    chunks = (tensor[part] for part in row_chunks(tensor.shape[0]))
    return all(bool(torch.isfinite(chunk.sum())) or bool(torch.isfinite(chunk).all()) for chunk in chunks)


def row_chunks(count: int, size: int = 4096) -> Iterator[slice]:
    """Ranges of at most `size` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
