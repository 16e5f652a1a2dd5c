"""The int8 latent cache on torch_npu, for weights that `folding.py` made: its writing, and attention in full int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ....attention.pools import LayerCache, Pages, StoredPool
from ...latent_attention import LATENT, ROPE
from ...norms import Norms
from ...rotary import Rotary
from ...steps import Decode, Positions
from ..device import NO_MASK, RIGHT_DOWN_CAUSAL, Npu
from .limits import INT8_BLOCK_SIZE, LATENT_DIM, ROPE_DIM

PER_TOKEN_HEAD, PER_TENSOR = 3, 0  # quant modes of queries, and of keys and values
TILE = 32  # int8 channels of an NZ tile
# A query of zeros has the scale 0, and its rope part is divided by the scale.
_LEAST_SCALE = 1e-30

Written = tuple[Tensor, Tensor]
"""Rope `[T, D]` and latent `[T, L]` of tokens, in the compute dtype."""


class Int8Queries(NamedTuple):
    """Absorbed queries: codes int8 `[T, N, L]`, scale float32 `[T, N]`, and rope `[T, N, D]` divided by the scale.

    Attention multiplies both parts of a score by the scale.
    """

    codes: Tensor
    rope: Tensor
    scale: Tensor


class Int8Cache:
    """Writing of, and attention over, caches whose latents are codes.

    by_operator: write with `npu_kv_rmsnorm_rope_cache`, once `find_writer` has seen that it can.
    """

    def __init__(self, npu: Npu, norms: Norms, rotary: Rotary, causal_mask: Tensor):
        self.npu, self.norms, self.rotary = npu, norms, rotary
        self.by_operator: bool | None = None
        self.one = torch.ones(1, dtype=torch.float32, device=npu.device)
        self._ones = torch.ones(LATENT_DIM, dtype=torch.float32, device=npu.device)
        self._causal_mask = causal_mask

    def find_writer(self) -> None:
        """Try the operator on two tokens, the first time.

        CANN's registration of it lists an int8 latent beside a rope in the compute dtype, and its tiling takes one of
        the two scales; torch_npu's page wants both scales and both caches int8.
        """
        if self.by_operator is None:
            self.by_operator = writes_codes(self.write_by_operator, self.npu)

    def write(
        self, kv: Tensor, gamma: Tensor, eps: float, positions: Positions, cache: LayerCache, output_kv: bool
    ) -> Written | None:
        """Write tokens: see `LatentAttention.kv_rmsnorm_rope_cache`. gamma: the folded gain."""
        write = self.write_by_steps if self.by_operator is False else self.write_by_operator
        written = write(kv, gamma, eps, positions, cache, output_kv)
        if written is None:
            return None
        k_rope, latent = written
        return k_rope, latent.round().clamp_(-128, 127)

    def write_by_operator(
        self, kv: Tensor, gamma: Tensor, eps: float, positions: Positions, cache: LayerCache, output_kv: bool
    ) -> Written | None:
        """Write tokens in one launch. With `output_kv`: the rows before they are rounded to codes."""
        rope, latent = cache[ROPE].tensor, cache[LATENT].tensor
        _, _, k_rope, rows = self.npu.operators.npu_kv_rmsnorm_rope_cache(
            kv[:, None, None],
            gamma,
            positions.cos[:, None, None],
            positions.sin[:, None, None],
            positions.slots,
            rope.view(rope.shape[0], cache.block_size, 1, -1),
            latent.view(latent.shape[0], cache.block_size, 1, -1),
            c_kv_scale=self._ones,
            epsilon=eps,
            cache_mode="PA_NZ",
            is_output_kv=output_kv,
        )
        return (k_rope.flatten(0, 2), rows.flatten(0, 2)) if output_kv else None

    def write_by_steps(
        self, kv: Tensor, gamma: Tensor, eps: float, positions: Positions, cache: LayerCache, output_kv: bool
    ) -> Written:
        """As `write_by_operator`, where the operator does not: tiles are the rows of one axis, written by index."""
        latent, k_rope = kv.split([gamma.shape[0], positions.cos.shape[-1]], dim=-1)
        rows = self.norms.rms_norm(latent.contiguous(), gamma, eps)
        k_rope = self.rotary.interleave_rope(k_rope.unsqueeze(1), positions.cos, positions.sin).squeeze(1)
        codes = rows.round().clamp_(-128, 127).to(torch.int8)
        for name, values in ((LATENT, codes), (ROPE, k_rope)):
            tensor = cache[name].tensor
            _, tiles, size, width = tensor.shape
            first = torch.div(positions.slots, size, rounding_mode="floor") * ((tiles - 1) * size) + positions.slots
            places = first.unsqueeze(1) + size * torch.arange(tiles, device=self.npu.device)
            tensor.view(-1, width).index_put_((places.flatten(),), values.reshape(-1, width))
        return k_rope, rows

    def quantize(self, q_latent: Tensor, q_rope: Tensor) -> Int8Queries:
        """Quantize absorbed queries `[T, N, L]` for each token and head."""
        rows = self.norms.dynamic_quant(q_latent.flatten(0, 1))
        scale = rows.scale.clamp_min(_LEAST_SCALE).view(q_latent.shape[:2])
        return Int8Queries(rows.codes.view(q_latent.shape), (q_rope / scale.unsqueeze(-1)).to(self.npu.dtype), scale)

    def attend(self, queries: Int8Queries, cache: LayerCache, decode: Decode, scale: float) -> Tensor:
        """Attend: see `LatentAttention.fused_infer_attention_paged`. The result is in the units of the codes."""
        tokens, heads, width = queries.codes.shape
        single = tokens == len(decode.q_lens)
        if single:  # a batch of one query each: nothing to mask
            queries = Int8Queries(*(each.unsqueeze(1) for each in queries))
        latent = cache[LATENT].tensor.unsqueeze(1)
        out: Tensor = self.npu.operators.npu_fused_infer_attention_score_v2(
            queries.codes,
            latent,
            latent,
            query_rope=queries.rope,
            key_rope=cache[ROPE].tensor.unsqueeze(1),
            atten_mask=None if single else self._causal_mask,
            sparse_mode=NO_MASK if single else RIGHT_DOWN_CAUSAL,
            actual_seq_qlen=None if single else decode.q_lens,
            actual_seq_kvlen=decode.kv_lens,
            block_table=decode.block_table,
            block_size=cache.block_size,
            dequant_scale_query=queries.scale,
            dequant_scale_key=self.one,
            dequant_scale_value=self.one,
            query_quant_mode=PER_TOKEN_HEAD,
            key_quant_mode=PER_TENSOR,
            value_quant_mode=PER_TENSOR,
            num_query_heads=heads,
            num_key_value_heads=1,
            input_layout="BSND_NBSD" if single else "TND_NTD",
            softmax_scale=scale,
        )[0]
        return out.view(heads, tokens, width).transpose(0, 1)


def holds_codes(cache: LayerCache) -> bool:
    """True if the latents of a cache are int8 codes."""
    return cache[LATENT].pool.dtype is torch.int8


def writes_codes(write: Callable[..., Written | None], npu: Npu) -> bool:
    """True if `write` puts int8 latents and ropes in the compute dtype where they belong. It waits for the device."""
    kv = torch.arange(2 * (LATENT_DIM + ROPE_DIM)).mul(37).remainder(251).sub(125).view(2, -1).div(50).to(npu.dtype)
    gain = torch.full((LATENT_DIM,), 40.0, dtype=npu.dtype)
    latent, rope = kv.float().split([LATENT_DIM, ROPE_DIM], dim=-1)
    wanted = (latent * torch.rsqrt(latent.square().mean(-1, keepdim=True)) * gain.float()).round().clamp(-128, 127)
    parted = torch.cat([rope[:, 0::2], rope[:, 1::2]], dim=-1)  # a rotation by nothing parts the pairs, no more
    pools = StoredPool(LATENT, LATENT_DIM, torch.int8, "nz"), StoredPool(ROPE, ROPE_DIM, npu.dtype, "nz")
    pages = {
        pool.name: Pages(pool, torch.zeros(pool.shape(1, INT8_BLOCK_SIZE), dtype=pool.dtype, device=npu.device))
        for pool in pools
    }
    slots = [3, 77]
    cos, sin = (torch.full((2, ROPE_DIM), value, dtype=npu.dtype, device=npu.device) for value in (1.0, 0.0))
    positions = Positions(torch.tensor(slots, device=npu.device), cos, sin)
    try:
        write(kv.to(npu.device), gain.to(npu.device), 0.0, positions, LayerCache(pages, INT8_BLOCK_SIZE), False)
        codes, ropes = (_rows(pages[name], slots) for name in (LATENT, ROPE))
    except RuntimeError:  # CANN's refusal
        return False
    return bool((codes - wanted).abs().max() <= 1) and torch.equal(ropes, parted)


def _rows(pages: Pages, slots: list[int]) -> Tensor:
    return Pages(pages.pool, pages.tensor.cpu()).at(torch.tensor(slots)).float()
