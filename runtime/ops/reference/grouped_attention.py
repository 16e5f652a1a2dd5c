"""Grouped-query attention in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...attention.pools import LayerCache, Pages
from ..grouped_attention import KEY, VALUE, GroupedAttention
from ..steps import Decode, Lengths


class ReferenceGroupedAttention(GroupedAttention):
    """Attention on the CPU."""

    def scatter_pa_kv_cache(self, key: Tensor, value: Tensor, cache: LayerCache, slots: Tensor) -> None:
        cache[KEY].write(slots, key.flatten(1))
        cache[VALUE].write(slots, value.flatten(1))

    def fused_infer_attention(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float
    ) -> Tensor:
        outputs = []
        ends = pairwise([0, *lengths.q_lens]), pairwise([0, *lengths.kv_lens])
        for (q0, q1), (k0, k1) in zip(*ends, strict=True):
            past = (k1 - k0) - (q1 - q0) if lengths.causal else k1 - k0
            outputs.append(self._attention(query[q0:q1], key[k0:k1], value[k0:k1], scale, past))
        return torch.cat(outputs)

    def fused_infer_attention_paged(self, query: Tensor, cache: LayerCache, decode: Decode, scale: float) -> Tensor:
        outputs = []
        for (q0, q1), length, blocks in zip(
            pairwise([0, *decode.q_lens]), decode.kv_lens, decode.block_table, strict=True
        ):
            used = blocks[: -(-length // cache.block_size)]
            key, value = (self._rows(cache[name], used, length, query.shape[-1]) for name in (KEY, VALUE))
            outputs.append(self._attention(query[q0:q1], key, value, scale, length - (q1 - q0)))
        return torch.cat(outputs)

    def _rows(self, pages: Pages, blocks: Tensor, length: int, head_dim: int) -> Tensor:
        """Cached keys or values `[length, K, d]`, codes decoded."""
        rows = pages.read(blocks, length)
        decoded = rows if pages.scale is None else (rows * pages.scale.float()).to(self.dtype)
        return decoded.unflatten(-1, (-1, head_dim))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float, past: int) -> Tensor:
        """Attend in float32: query `[Q, N, d]`, key and value `[S, K, d]` → `[Q, N, d]` in the compute dtype.

        Query i sees keys up to past + i.
        """
        group = query.shape[1] // key.shape[1]
        # One head after the other: the last bits of torch's products of several depend on how many there are.
        heads = [
            self._head(query[:, head], key[:, head // group], value[:, head // group], scale, past)
            for head in range(query.shape[1])
        ]
        return torch.stack(heads, dim=1)

    def _head(self, query: Tensor, key: Tensor, value: Tensor, scale: float, past: int) -> Tensor:
        scores = query.float() @ key.float().T * scale  # [Q, S]
        unseen = torch.ones_like(scores, dtype=torch.bool).triu(past + 1)
        # A row that sees no key is NaN in a softmax.
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1).masked_fill(unseen, 0.0)
        return (weights @ value.float()).to(self.dtype)
