"""Grouped-query attention on torch_npu: keys and values in ND pages, which attention reads in one call for any step.

The NPU's attention reads an int8 cache of several heads only for numbers of heads that no supported model has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from ....attention.pools import LayerCache, Pages
from ...grouped_attention import KEY, VALUE, Gqa, GqaConfig, GqaParts, GroupedAttention
from ...handles import Activation, Quantized, own
from ...norms import Norms
from ...products import Products
from ...rotary import Rotary
from ...steps import Decode, Lengths, Positions
from ...weights import Weights
from ..device import NO_MASK, RIGHT_DOWN_CAUSAL, Npu, causal_mask
from ..weights import W8A8Linear
from .limits import ROTARY_DIMS, check_gqa


@dataclass(frozen=True)
class AscendGqa(Gqa):
    """Default handle. takes_quantized: q, k and v all take rows quantized per token."""

    takes_quantized: bool


class AscendGroupedAttention(GroupedAttention):
    """Attention on torch_npu."""

    def __init__(self, npu: Npu, weights: Weights, norms: Norms, products: Products, rotary: Rotary):
        super().__init__(npu.dtype, weights, norms, products, rotary)
        self.npu = npu
        self._causal_mask = causal_mask(npu.device)

    def load(self, parts: GqaParts, config: GqaConfig) -> Gqa:
        check_gqa(parts.q.name, config.heads, config.kv_heads, config.head_dim)
        gqa = super().load(parts, config)
        quantized = all(isinstance(linear, W8A8Linear) for linear in gqa.qkv)
        return AscendGqa(**{each.name: getattr(gqa, each.name) for each in fields(Gqa)}, takes_quantized=quantized)

    def norm(
        self, x: Tensor | None, residual: Tensor, gamma: Tensor, eps: float, gqa: Gqa
    ) -> tuple[Activation, Tensor]:
        if x is None or not own(gqa, AscendGqa).takes_quantized:
            return super().norm(x, residual, gamma, eps, gqa)
        codes, _, total, scale, _ = self.npu.operators.npu_add_rms_norm_dynamic_quant(x, residual, gamma, epsilon=eps)
        return Quantized(codes, scale), total

    def rotate(self, q: Tensor, k: Tensor, config: GqaConfig, positions: Positions) -> tuple[Tensor, Tensor]:
        if config.rope_dim != config.head_dim or config.head_dim not in ROTARY_DIMS:
            return super().rotate(q, k, config, positions)
        tables = (table.unsqueeze(1) for table in (positions.cos, positions.sin))  # [T, 1, d]
        rotated: tuple[Tensor, Tensor] = self.npu.operators.npu_apply_rotary_pos_emb(
            q.contiguous(), k.contiguous(), *tables, layout="TND"
        )
        return rotated

    def scatter_pa_kv_cache(self, key: Tensor, value: Tensor, cache: LayerCache, slots: Tensor) -> None:
        pages = (self._pages(cache[name], cache).view(-1, cache.block_size, *key.shape[1:]) for name in (KEY, VALUE))
        self.npu.operators.npu_scatter_pa_kv_cache(
            key.contiguous(), value.contiguous(), *pages, slots, cache_mode="Norm"
        )

    def write(
        self, hidden: Activation, gqa: Gqa, cache: LayerCache, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The operator takes no negative slot. Counted from the end, −1 lies in the block that belongs to no sequence
        # (AscendCaches.new). Steps of decodes alone have none.
        slots = cache[KEY].tensor.shape[0] * cache.block_size
        return super().write(hidden, gqa, cache, replace(positions, slots=positions.slots.remainder(slots)))

    def fused_infer_attention(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float
    ) -> Tensor:
        attended: Tensor = self.npu.operators.npu_fused_infer_attention_score_v2(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            **self._mask(lengths.causal),
            actual_seq_qlen=lengths.q_lens,
            actual_seq_kvlen=lengths.kv_lens,
            num_query_heads=query.shape[1],
            num_key_value_heads=key.shape[1],
            softmax_scale=scale,
            input_layout="TND",
        )[0]
        return attended

    def fused_infer_attention_paged(self, query: Tensor, cache: LayerCache, decode: Decode, scale: float) -> Tensor:
        key, value = (self._pages(cache[name], cache) for name in (KEY, VALUE))
        attended: Tensor = self.npu.operators.npu_fused_infer_attention_score_v2(
            query.contiguous(),
            key,
            value,
            **self._mask(causal=_has_chunks(decode.q_lens)),
            actual_seq_qlen=decode.q_lens,  # cumulative, for the queries
            actual_seq_kvlen=decode.kv_lens,  # a length each, for paged keys
            block_table=decode.block_table,
            block_size=cache.block_size,
            num_query_heads=query.shape[1],
            num_key_value_heads=key.shape[2] // query.shape[2],
            softmax_scale=scale,
            input_layout="TND",
        )[0]
        return attended

    def _mask(self, causal: bool) -> dict[str, object]:
        if not causal:
            return {"atten_mask": None, "sparse_mode": NO_MASK}
        return {"atten_mask": self._causal_mask, "sparse_mode": RIGHT_DOWN_CAUSAL}

    def _pages(self, pages: Pages, cache: LayerCache) -> Tensor:
        """View pages as attention takes them: `[blocks, block_size, K·d]`."""
        return pages.tensor.view(pages.tensor.shape[0], cache.block_size, -1)


def _has_chunks(q_lens: Sequence[int]) -> bool:
    """True if a sequence has several queries; a single one sees all of its keys."""
    return q_lens[-1] > len(q_lens)
