"""Attention to a window and compressed entries in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compressed_attention import CompressedAttention, Compressor
from .sparse_attention import largest


class ReferenceCompressedAttention(CompressedAttention):
    """Attention on the CPU, in float32, one head after the other."""

    def rotate(self, x: Tensor, positions: Tensor, frequencies: Tensor, back: bool = False) -> Tensor:
        angles = positions.double()[:, None] * frequencies
        angles = (-angles if back else angles).view(len(positions), *[1] * (x.ndim - 2), -1)
        cos, sin = angles.cos().float(), angles.sin().float()
        straight, rotary = x.split([x.shape[-1] - 2 * len(frequencies), 2 * len(frequencies)], dim=-1)
        even, odd = rotary.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        return torch.cat([straight, turned.to(x.dtype)], dim=-1)

    def pool_windows(self, tokens: Tensor, compressor: Compressor, absent: bool) -> Tensor:
        windows = tokens.float().unflatten(0, (-1, compressor.ratio))  # [windows, ratio, 2 · series]
        series, gates = windows.chunk(2, dim=-1)
        gates = gates + compressor.ape
        if compressor.overlaps:
            series, gates = _overlapped(series), _overlapped(gates)
            if absent:
                gates[0, : compressor.ratio] = -torch.inf
        return (series * gates.softmax(1)).sum(1).to(self.dtype)

    def select_entries(self, query: Tensor, weights: Tensor, keys: Tensor, seen: Tensor, count: int) -> Tensor:
        transposed, scores = keys.float().T, torch.zeros(len(query), len(keys))
        for head, weight in zip(query.float().unbind(1), weights.float().unbind(1), strict=True):
            scores += (head @ transposed).relu() * weight[:, None]
        unseen = torch.arange(len(keys)) >= seen[:, None]
        columns = largest(scores, unseen, min(count, len(keys))).long()
        # One column more takes what is not selected.
        chosen = F.pad(torch.zeros_like(unseen), (0, 1)).scatter_(1, columns.where(columns >= 0, len(keys)), True)
        return chosen[:, :-1]

    def sink_attention(self, query: Tensor, keys: Tensor, visible: Tensor, sink: Tensor, scale: float) -> Tensor:
        keys = keys.float()
        heads = [self._head(query[:, head], keys, visible, sink[head], scale) for head in range(query.shape[1])]
        return torch.stack(heads, dim=1)

    def _head(self, query: Tensor, keys: Tensor, visible: Tensor, sink: Tensor, scale: float) -> Tensor:
        scores = (query.float() @ keys.T * scale).masked_fill(~visible, -torch.inf)
        weights = torch.cat([scores, sink.expand(len(scores), 1)], dim=1).softmax(1)
        return (weights[:, :-1] @ keys).to(self.dtype)


def _overlapped(windows: Tensor) -> Tensor:
    """The first half of the channels of each window beside the second half of the next: `[W, r, 2·d]` →
    `[W − 1, 2·r, d]`."""
    before, own = windows.chunk(2, dim=-1)
    return torch.cat([before[:-1], own[1:]], dim=1)
