"""Weights between store and backend: stored linears, widths and constants, and the handles that operators take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from ...errors import BackendError
from ...formats.schemes import Scheme
from ...formats.static_w8a8 import InputScale
from ...models.mla import Mla as MlaWidths
from ..ranks.division import Division


class Linear:
    """Handle of one or several linears, fused along their outputs. Only the backend that made it takes it."""


class Experts:
    """Handle of one linear (or fused gate|up) of every expert of a layer, for one grouped matmul."""


class Router:
    """Handle of a router's weight, multiplied in float32."""


Handle = TypeVar("Handle")


def own(handle: object, kind: type[Handle]) -> Handle:
    """Narrow a handle to a backend's own kind. Raises BackendError for a handle of another backend."""
    if not isinstance(handle, kind):
        raise BackendError(f"{type(handle).__name__} is no {kind.__name__}: another backend made it")
    return handle


class Quantized(NamedTuple):
    """Rows quantized per token: `codes` int8 `[rows, K]`, `scale` float32 `[rows]`; value = codes · scale."""

    codes: Tensor
    scale: Tensor


Activation: TypeAlias = Tensor | Quantized
"""Input of a linear: rows `[T, K]` in the compute dtype, or quantized rows."""


@dataclass(frozen=True)
class Static:
    """Constants of a static W8A8 linear, whose activations become clamp(round(x / scale + offset)).

    deq_scale: float32 `[N]`, the product's scale; quant_bias: int32 `[N]`, added to the integer product before it.
    """

    inputs: InputScale
    deq_scale: Tensor
    quant_bias: Tensor


@dataclass(frozen=True)
class LinearPart:
    """One stored linear, or one rank's part of it. Tensors are memory-mapped or copies, and must not be written to.

    weight: FLOAT: float `[N, K]` (bf16, fp16 or fp32); W8A8_DYNAMIC and W8A8: int8 `[N, K]`; W4A8_DYNAMIC: int8
    `[N/2, K]`, byte `[j, k]` holding row 2j in the low and row 2j+1 in the high nibble.
    scale: float32 `[N, 1]`, None for FLOAT and W8A8.
    scale_bias: float32 `[N, 1]` or `[N, 16]` (partial sums over K, to be added), only for W4A8_DYNAMIC.
    static: only for W8A8.
    output_division, input_division: how ranks divide the linear's outputs and inputs, where the tensors are one rank's
    part; None for a whole one. A float linear with divided inputs has whole columns, and some of the rows
    (`RowParallel`). Never of W4A8_DYNAMIC.
    """

    name: str
    scheme: Scheme
    weight: Tensor
    scale: Tensor | None = None
    scale_bias: Tensor | None = None
    static: Static | None = None
    output_division: Division | None = None
    input_division: Division | None = None


@dataclass(frozen=True)
class RowParallel(Linear):
    """Handle of a linear whose inputs come divided among ranks, and whose outputs every rank gets whole.

    linear: this rank's part. Of int8 codes (`sums`): the columns of its inputs, whose products are added as integers.
    Of floats: the rows of its outputs, because a sum of floats depends on its order.
    inputs: the division of the rows that it is given. outputs: of floats, the division of the products.
    """

    linear: Linear
    scheme: Scheme
    inputs: Division
    outputs: Division | None

    @property
    def sums(self) -> bool:
        """True if the ranks' products are added, False if they are joined."""
        return self.scheme is not Scheme.FLOAT


class AttentionWeights:
    """Handle of a layer's attention weights, for one kind of attention and one backend."""


@dataclass(frozen=True)
class MlaConfig(MlaWidths):
    """Widths and constants of multi-head latent attention."""

    rms_norm_eps: float
    softmax_scale: float


@dataclass(frozen=True)
class MlaParts:
    """The stored attention weights of one layer, from which `LatentAttention.load` makes its handle.

    q_a, q_b and q_a_norm (float `[q_lora]`) are None, and q set, in models without q_lora; otherwise q is None.
    kv_b is float `[N·(nope+v), L]`; kv_a_norm is float `[L]`.

    Where ranks divide the heads, q or q_b, kv_b and o have those of this rank alone, and `MlaConfig.heads` counts them.
    """

    q: LinearPart | None
    q_a: LinearPart | None
    q_a_norm: Tensor | None
    q_b: LinearPart | None
    kv_a: LinearPart
    kv_a_norm: Tensor
    kv_b: Tensor
    o: LinearPart


@dataclass(frozen=True)
class Mla(AttentionWeights):
    """Handle of a layer's multi-head latent attention: the fields of all backends.

    w_uk: `[N, nope, L]`, absorbs a query into latent space; w_uv: `[N, L, v]`, brings attention out of it.
    """

    config: MlaConfig
    kv_a_norm: Tensor
    w_uk: Tensor
    w_uv: Tensor
    o: Linear


@dataclass(frozen=True)
class MlaWeights(Mla):
    """Default handle of multi-head latent attention.

    qkv_a: one fused linear for (q_a or q | kv_a), or two where their schemes differ.
    """

    qkv_a: tuple[Linear, ...]
    q_a_norm: Tensor | None
    q_b: Linear | None
    kv_b: Linear


@dataclass(frozen=True)
class IndexerConfig:
    """Widths and constants of a lightning indexer.

    topk: tokens that a query selects. rope_dim: the first channels of a head, which are rotary. rope_interleave: pairs
    are channels (2i, 2i + 1), and not (i, i + rope_dim / 2).
    """

    n_heads: int
    head_dim: int
    rope_dim: int
    topk: int
    rope_interleave: bool


@dataclass(frozen=True)
class IndexerParts:
    """The stored indexer weights of one layer: q `[n·d, q_lora]`, k `[d, H]`, k_norm and its bias float `[d]`, weights
    `[n, H]`."""

    q: LinearPart
    k: LinearPart
    k_norm: Tensor
    k_norm_bias: Tensor
    weights: LinearPart


@dataclass(frozen=True)
class IndexerWeights:
    """Handle of a layer's lightning indexer. k_norm, k_norm_bias: float32."""

    config: IndexerConfig
    q: Linear
    k: Linear
    k_norm: Tensor
    k_norm_bias: Tensor
    weights: Linear


@dataclass(frozen=True)
class SparseMla(AttentionWeights):
    """Handle of a layer's sparse latent attention. indexer: None in a layer that attends to another's selection."""

    mla: Mla
    indexer: IndexerWeights | None


class Projection(NamedTuple):
    """Projections of hidden rows, before norm and rope of keys and rope of queries.

    q_nope `[T, N, nope]`, q_rope `[T, N, D]`, kv `[T, L + D]`. q_latent: the input of q_b `[T, q_lora]`, normed; None
    in models whose queries have no latent.
    """

    q_nope: Tensor
    q_rope: Tensor
    kv: Tensor
    q_latent: Activation | None


class Queries(NamedTuple):
    """Queries in two parts: nope `[T, N, nope]`, and rope `[T, N, D]`, rotated."""

    nope: Tensor
    rope: Tensor


class Keys(NamedTuple):
    """Decompressed keys and values: nope `[S, N, nope]`, rope `[S, D]` (shared by the heads), value `[S, N, v]`."""

    nope: Tensor
    rope: Tensor
    value: Tensor


@dataclass(frozen=True)
class Gating:
    """Gating of a router: from its logits to k experts and their weights.

    scoring: "sigmoid", "softmax" or "sqrtsoftplus". group_count: groups of E/group_count neighbours; the best `k_group`
    groups stay. A group's score is the sum of its two best (group_select_mode 1) or its best (mode 0) biased score.
    renormalize: divide the k weights by (their sum + 1e-20). scaling: then multiply by this.
    """

    k: int
    scoring: str
    group_count: int = 1
    k_group: int = 1
    group_select_mode: int = 0
    renormalize: bool = False
    scaling: float = 1.0


@dataclass(frozen=True)
class MlpWeights:
    """Weights of a dense or shared MLP: `gate_up` gives `[T, 2·I]` with gate in the left half.

    limit: gate is clamped to limit at most, up to ±limit, before the activation function; None: neither.
    """

    gate_up: Linear
    down: Linear
    quantized: bool  # down takes rows quantized per token
    limit: float | None = None


@dataclass(frozen=True)
class MoeWeights:
    """The routed experts of one layer: `gate_up` gives `[R, 2·I]` with gate in the left half, `down` gives `[R, H]`.

    num_experts: of the layer. ranks: that many ranks divide them evenly and in order; `gate_up` and `down` have those
    of this rank. limit: as of `MlpWeights`. expert_table: int64 `[vocab, k]`, the experts of each token id; None where
    scores choose them.
    """

    router: Router
    correction_bias: Tensor | None  # float32 [E]; only for selection, never in the weights
    gating: Gating
    gate_up: Experts
    down: Experts
    num_experts: int
    quantized: bool  # both linears take int8 activations
    shared: MlpWeights | None = None  # the experts that every token takes
    ranks: int = 1
    limit: float | None = None
    expert_table: Tensor | None = None
