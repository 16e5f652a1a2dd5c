"""Sparse latent attention in plain torch."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention.pools import LayerCache, Pages
from ..latent_attention import LATENT, ROPE
from ..sparse_attention import SparseAttention
from ..steps import Decode


class ReferenceSparseAttention(SparseAttention):
    """Selection and attention on the CPU.

    heads_together: attention is computed for so many heads at a time, however many there are, because the last bits of
    torch's products depend on it; None computes all at once.
    """

    heads_together: ClassVar[int | None] = 4

    def lightning_indexer(self, query: Tensor, weights: Tensor, keys: Pages, decode: Decode, count: int) -> Tensor:
        selected = []
        for (q0, q1), length, blocks in zip(
            pairwise([0, *decode.q_lens]), decode.kv_lens, decode.block_table, strict=True
        ):
            key = keys.read(blocks, length).float()
            selected.append(self._select(query[q0:q1].float(), weights[q0:q1].float(), key, length - (q1 - q0), count))
        return torch.cat(selected).unsqueeze(1)

    def _select(self, query: Tensor, weights: Tensor, key: Tensor, past: int, count: int) -> Tensor:
        """Select for queries `[Q, n, d]` among keys `[S, d]`, of which query i sees those up to past + i."""
        scores = ((query @ key.T).relu() * weights.unsqueeze(-1)).sum(1)  # [Q, S]
        unseen = torch.ones_like(scores, dtype=torch.bool).triu(past + 1)
        return largest(scores, unseen, count)

    def sparse_flash_attention(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, selected: Tensor, scale: float
    ) -> Tensor:
        query = torch.cat([q_latent, q_rope], dim=-1).float()
        outputs = []
        for (q0, q1), blocks in zip(pairwise([0, *decode.q_lens]), decode.block_table, strict=True):
            positions = selected[q0:q1, 0].long()
            seen = positions.clamp_min(0)
            slots = blocks[seen // cache.block_size] * cache.block_size + seen % cache.block_size
            outputs.append(self._attention_to(query[q0:q1], cache, slots, positions < 0, scale).to(self.dtype))
        return torch.cat(outputs)

    def _attention_to(self, query: Tensor, cache: LayerCache, slots: Tensor, none: Tensor, scale: float) -> Tensor:
        """Attend in float32: query `[Q, N, L + D]` to the rows at slots `[Q, k]`, but those of `none` → `[Q, N, L]`."""
        latent = cache[LATENT].at(slots).float()
        key = torch.cat([latent, cache[ROPE].at(slots).float()], dim=-1)
        outputs, together = [], self.heads_together or query.shape[1]
        for heads in F.pad(query, (0, 0, 0, -query.shape[1] % together)).split(together, dim=1):
            scores = (heads @ key.transpose(1, 2) * scale).masked_fill(none.unsqueeze(1), -torch.inf)  # [Q, heads, k]
            outputs.append(scores.softmax(-1) @ latent)
        return torch.cat(outputs, dim=1)[:, : query.shape[1]]


def largest(scores: Tensor, unseen: Tensor, count: int) -> Tensor:
    """The columns of the `count` largest scores `[Q, S]` but the unseen, ascending and then −1: int32 `[Q, count]`.

    Of equal scores the first column wins; a NaN is larger than any number.
    """
    # A stable sort of rank: NaN and infinities are ordered, and what is not seen comes last.
    order = scores.masked_fill(unseen, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, unseen.gather(1, order).byte().sort(dim=1, stable=True).indices)[:, :count]
    past_all = torch.iinfo(torch.int32).max
    columns = order.masked_fill(unseen.gather(1, order), past_all).sort(dim=1).values
    found = columns.masked_fill(columns == past_all, -1).int()
    return F.pad(found, (0, count - found.shape[1]), value=-1)
