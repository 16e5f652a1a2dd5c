"""The small operators: no bodies here, and one device call each. See the package for shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .parts import Activation, Experts, Gating, Linear, LinearPart, Quantized, Router
from .steps import Decode, LayerCache, PrefixSegment


class Operators(ABC):
    """A set of operators: how one backend computes.

    name: "reference", "cpu" or "ascend". dtype: the compute dtype. device: where a step's tensors live.
    """

    name: str
    dtype: torch.dtype
    device: torch.device

    @property
    def has_int8_cache(self) -> bool:
        """Whether `new_kv_cache` takes scales."""
        return True

    def one_thread(self) -> AbstractContextManager[None]:
        """Torch's own operators inside work on the calling thread alone, where this set has threads of its own.

        Torch's threads stay awake for a while after each operator they shared, on the cores that the set's want next.
        """
        return nullcontext()

    # ---- at load: stored weights become handles -------------------------------------------------------------------

    @abstractmethod
    def float_linear(self, weights: Sequence[Tensor]) -> Linear:
        """Fuse float `[N_i, K]` weights (stored dtype) along their outputs: x `[T, K]` → `[T, ΣN_i]`."""

    @abstractmethod
    def w8a8_linear(self, parts: Sequence[LinearPart]) -> Linear:
        """Fuse W8A8 parts (`weight` int8 `[N_i, K]`, `scale` float32 `[N_i, 1]`) along their outputs."""

    @abstractmethod
    def static_linear(self, parts: Sequence[LinearPart]) -> Linear:
        """Fuse W8A8 parts (`weight` int8 `[N_i, K]`, `static` with one InputScale for all) along their outputs."""

    @abstractmethod
    def float_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        """For each expert the FLOAT parts to fuse along their outputs (gate, up) or (down,)."""

    @abstractmethod
    def w8a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        """For each expert the W8A8 parts to fuse along their outputs."""

    @abstractmethod
    def w4a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        """For each expert the W4A8 parts to fuse along their outputs; the N_i are even."""

    @abstractmethod
    def router(self, weight: Tensor) -> Router:
        """The router's float `[E, H]` weight."""

    @abstractmethod
    def parameter(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A small tensor (norm gain, router bias, rope table) or the embedding, on the device; dtype None keeps it."""

    @abstractmethod
    def new_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_lora_rank: int,
        rope_dim: int,
        latent_scales: Sequence[Tensor] | None = None,
    ) -> tuple[LayerCache, ...]:
        """Allocate the paged cache of every layer; with scales (float32 `[L]` a layer) its latent is int8.

        Raises BackendError for a setting that the backend's operators do not take.
        """

    # ---- norms and activations -------------------------------------------------------------------------------------

    @abstractmethod
    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """Rows of `table` `[vocab, H]` (stored dtype), in the compute dtype: `[T, H]`."""

    @abstractmethod
    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        """x · rsqrt(mean(x²) + eps) · gamma over the last dimension, float32 inside, rounded once."""

    @abstractmethod
    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum), both `[T, H]`. bf16: normalised sum is rounded before it is times gamma."""

    @abstractmethod
    def swiglu(self, x: Tensor) -> Tensor:
        """silu(left half) · right half: `[rows, 2·I]` → `[rows, I]`, float32 inside."""

    @abstractmethod
    def dynamic_quant(self, x: Tensor, smooth: Tensor | None = None) -> Quantized:
        """Per row: f = 127 / max|x|, codes = round-half-even(x · f), scale = 1 / f. A zero row gives zeros.

        With `smooth`, float `[K]`, of x · smooth instead, in float32.
        """

    @abstractmethod
    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        """y = swiglu(x) in float32, then per row scale = max|y| / 127, codes = round-half-even(y / scale)."""

    # ---- matmuls ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def linear(self, x: Activation, linear: Linear) -> Tensor:
        """x `[rows, K]` times a handle of one of the `…_linear` methods → `[rows, N]` in the compute dtype.

        A W8A8 handle takes a `Quantized`, or quantizes a tensor with `dynamic_quant` first; the result is
        float32(int32 accumulator) · scale[n] · token_scale[m], in this order in float32, rounded once.
        A FLOAT handle takes a tensor only, and so does a static W8A8 one. That quantizes it, in float32, to
        clamp(round-half-even(x · f + offset)), f = 1 / scale in the compute dtype; the result is
        float32(int32 accumulator + quant_bias[n]) · deq_scale[n], rounded once.
        """

    @abstractmethod
    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        """x `[T, H]` times the router in float32 → float32 `[T, E]`."""

    @abstractmethod
    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """One matrix a head: x `[T, N, A]`, weight `[N, A, B]` → `[T, N, B]` in the compute dtype."""

    @abstractmethod
    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        """Rows of x sorted by expert, `group_list` int64 `[E]` the number of rows of each → `[R, N]`, compute dtype.

        Quantized handles take a `Quantized` (consumed: the device may overwrite its codes), float ones a tensor.
        Numerics as in `linear`; rows past the sum of `group_list` are undefined.
        """

    # ---- routing ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def moe_gating_top_k(self, logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
        """logits float32 `[T, E]`, bias float32 `[E]` → (weights float32 `[T, k]`, expert ids int32 `[T, k]`).

        In order of descending biased score, the lower index first among equals. All in float32.
        """

    @abstractmethod
    def moe_init_routing(
        self, x: Tensor, expert_ids: Tensor, num_experts: int, quantize: bool
    ) -> tuple[Activation, Tensor, Tensor]:
        """Sort the T·k copies of the tokens by expert (stable).

        x `[T, H]`, expert_ids int32 `[T, k]` → (rows `[R, H]`; row_index int32 `[R]`, where flat copy t·k + j went;
        group_list int64 `[E]`, the number of rows of each expert). With `quantize` the rows come quantized per row:
        scale = max|x| / 127, codes = round-half-away(x / scale); a zero row gives zeros.
        """

    @abstractmethod
    def moe_finalize_routing(
        self, rows: Tensor, weights: Tensor, row_index: Tensor, expert_ids: Tensor, skip: Tensor | None
    ) -> Tensor:
        """out[t] = skip[t] + Σ_j weights[t, j] · rows[row_index[t·k + j]] → `[T, H]`, float32 inside, rounded once.

        weights float32 `[T, k]` (rounded to the compute dtype first), skip `[T, H]` or None (the shared experts).
        """

    # ---- attention -------------------------------------------------------------------------------------------------

    @abstractmethod
    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate interleaved pairs, half-split output: x `[T, N, D]`, cos/sin `[T, D]` → `[T, N, D]`.

        u = the even channels then the odd ones; out = u · cos + (−second half, first half of u) · sin.
        """

    @abstractmethod
    def kv_rmsnorm_rope_cache(
        self,
        kv: Tensor,
        gamma: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        cache: LayerCache,
        eps: float,
        output_kv: bool,
    ) -> tuple[Tensor, Tensor] | None:
        """Normalise the latent, rotate the rope channels, write both into the cache in place.

        kv `[T, L + D]` (a view with a row stride is fine), gamma `[L]`, slots int64 `[T]` (negative: not written).
        Norm and rope in float32 with one rounding each. With `output_kv` returns (k_rope `[T, D]`, latent `[T, L]`) as
        the cache holds them: of an int8 cache what its codes stand for, so that a token is the same key and value to
        those of its own chunk as to all later ones.
        """

    @abstractmethod
    def fused_infer_attention(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        k_nope: Tensor,
        k_rope: Tensor,
        value: Tensor,
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Multi-head attention over ragged sequences ("TND") → (out `[T, N, v]`, log-sum-exp float32 `[T, N, 1]`).

        q_nope `[T, N, nope]`, q_rope `[T, N, D]`, k_nope `[S, N, nope]`, k_rope `[S, D]` (shared by the heads), value
        `[S, N, v]`; q_lens and kv_lens are cumulative without a leading 0. causal: query i of a sequence sees keys
        j ≤ i + (kv length − query length). Softmax in float32; a row that sees no key gives 0 and −inf.
        """

    @abstractmethod
    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        """Absorbed attention on the paged cache, the latent being both key and value: `[T, N, L]`.

        q_latent `[T, N, L]`, q_rope `[T, N, D]`. Causal within a sequence, aligned at the end. With an int8 cache the
        latent query is multiplied by the channels' scales and quantized, per token and head, as `dynamic_quant` does.
        """

    @abstractmethod
    def gather_pa_kv_cache(self, cache: LayerCache, segment: PrefixSegment) -> tuple[Tensor, Tensor]:
        """Copy a segment of cached tokens out of the pages: (latent `[length, L]`, k_rope `[length, D]`), both in the
        compute dtype."""

    @abstractmethod
    def attention_update(self, outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
        """Merge attention over disjoint key sets: w_i = exp(lse_i − max), out = Σ w_i · o_i / Σ w_i in float32.

        outputs: each `[T, N, v]`; lses: each float32 `[T, N, 1]`.
        """
