"""Hyper-connections in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..hyper_connections import HyperOps, HyperWeights


class ReferenceHyperOps(HyperOps):
    """Hyper-connections on the CPU, in float32."""

    def connect(self, streams: Tensor, weights: HyperWeights) -> tuple[Tensor, Tensor, Tensor]:
        count = streams.shape[1]
        parts = [count, count, count * count]
        read, write, mixed = _projected(streams, weights).split(parts, dim=-1)
        read_base, write_base, mixed_base = weights.base.split(parts)
        read_scale, write_scale, mixed_scale = weights.scale
        post = 2 * (write * write_scale + write_base).sigmoid()
        comb = (mixed * mixed_scale + mixed_base).unflatten(-1, (count, count)).softmax(-1) + weights.eps
        comb = comb / (comb.sum(-2, keepdim=True) + weights.eps)
        for _ in range(weights.iterations - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + weights.eps)
            comb = comb / (comb.sum(-2, keepdim=True) + weights.eps)
        return _weighted(streams, read * read_scale + read_base, weights.eps), post, comb

    def mix(self, streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        written = post.unsqueeze(-1) * output.float().unsqueeze(1)
        return (written + comb.transpose(1, 2) @ streams.float()).to(streams.dtype)

    def collapse(self, streams: Tensor, weights: HyperWeights) -> Tensor:
        return _weighted(streams, _projected(streams, weights) * weights.scale + weights.base, weights.eps)


def _projected(streams: Tensor, weights: HyperWeights) -> Tensor:
    flat = F.rms_norm(streams.float().flatten(1), (streams[0].numel(),), eps=weights.norm_eps)
    return F.linear(flat, weights.fn)


def _weighted(streams: Tensor, logits: Tensor, eps: float) -> Tensor:
    pre = logits.sigmoid() + eps
    return (pre.unsqueeze(-1) * streams.float()).sum(1).to(streams.dtype)
