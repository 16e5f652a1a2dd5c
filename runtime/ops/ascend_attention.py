"""Latent attention on torch_npu: the paged cache in FRACTAL_NZ (or ND) pages, attention over it, and its prologue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import Activation, Decode, LayerCache, Mla, Ops, PrefixSegment, Quantized, Step
from .ascend_mla import AscendMla
from .ascend_weights import W8A8Linear

KvLayout = Literal["nz", "nd"]

CAUSAL_MASK_SIDE = 2048
RIGHT_DOWN_CAUSAL = 3  # sparse_mode: query i of S_q sees key j ≤ i + S_kv − S_q
NO_MASK = 0
PROLOG_INT8 = 2  # weight_quant_mode: q_a, q_b and kv_a are int8


def causal_mask(device: torch.device) -> Tensor:
    """The compressed mask that sparse modes 2 to 4 ask for, whatever the lengths: true is hidden."""
    return torch.ones(CAUSAL_MASK_SIDE, CAUSAL_MASK_SIDE, dtype=torch.bool, device=device).triu_(1)


class AscendAttention(Ops):
    """The attention operators of the Ascend set."""

    kv_layout: KvLayout
    _npu: Any  # torch.ops.npu
    _causal_mask: Tensor

    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        # What comes out of decode attention is stored head by head: then x needs no transposition in the kernel, which
        # limits heads · K to 65535 (128 heads of 512 exceed it).
        by_head = x.transpose(0, 1)
        stored, order = (by_head, (0, 1, 2)) if by_head.is_contiguous() else (x, (1, 0, 2))
        product: Tensor = self._npu.npu_transpose_batchmatmul(stored, weight, perm_x1=order, perm_y=(1, 0, 2))
        return product

    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tables = (table[:, None, None] for table in (cos, sin))  # [T, 1, 1, D]: every token is a batch of its own
        rotated: Tensor = self._npu.npu_interleave_rope(x.contiguous().unsqueeze(2), *tables)
        return rotated.squeeze(2)

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
        # The rope cache comes first, in arguments and in results.
        _, _, k_rope, latent = self._npu.npu_kv_rmsnorm_rope_cache(
            kv[:, None, None],
            gamma,
            cos[:, None, None],
            sin[:, None, None],
            slots,
            self._pages(cache.rope, cache),
            self._pages(cache.latent, cache),
            epsilon=eps,
            cache_mode="PA_NZ" if self.kv_layout == "nz" else "PA",
            is_output_kv=output_kv,
        )
        # Without output_kv the two outputs are memory that nothing was written to.
        return (k_rope.flatten(0, 2), latent.flatten(0, 2)) if output_kv else None

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
        heads = q_nope.shape[1]
        out, lse = self._npu.npu_fused_infer_attention_score(
            q_nope.contiguous(),
            k_nope.contiguous(),
            value.contiguous(),
            query_rope=q_rope.contiguous(),
            key_rope=k_rope.unsqueeze(1).expand(-1, heads, -1).contiguous(),  # every head wants its own copy
            atten_mask=self._causal_mask if causal else None,
            sparse_mode=RIGHT_DOWN_CAUSAL if causal else NO_MASK,
            actual_seq_lengths=list(q_lens),
            actual_seq_lengths_kv=list(kv_lens),
            num_heads=heads,
            num_key_value_heads=heads,
            input_layout="TND",
            scale=scale,
            softmax_lse_flag=True,
        )
        return out, lse

    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        latent = self._attention_pages(cache.latent, cache)
        single = decode.num_tokens == len(decode.q_lens)  # one query each: nothing to mask
        out: Tensor = self._npu.npu_fused_infer_attention_score(
            q_latent,
            latent,
            latent,
            query_rope=q_rope,
            key_rope=self._attention_pages(cache.rope, cache),
            atten_mask=None if single else self._causal_mask,
            sparse_mode=NO_MASK if single else RIGHT_DOWN_CAUSAL,
            actual_seq_lengths=list(decode.q_lens),  # cumulative, for the queries
            actual_seq_lengths_kv=list(decode.kv_lens),  # a length each, for paged keys
            block_table=decode.block_table,
            block_size=cache.block_size,
            num_heads=q_latent.shape[1],
            num_key_value_heads=1,
            input_layout="TND_NTD",
            scale=scale,
        )[0]
        return out.transpose(0, 1)

    def gather_pa_kv_cache(self, cache: LayerCache, segment: PrefixSegment) -> tuple[Tensor, Tensor]:
        # npu_gather_pa_kv_cache knows NZ pages by the tensor's format, which a cache must not have: hence plain copies.
        blocks = segment.block_table[0]

        def rows(pool: Tensor) -> Tensor:
            pages = pool.index_select(0, blocks)
            tokens = pages.transpose(1, 2).flatten(2) if self.kv_layout == "nz" else pages.flatten(2)
            return tokens.flatten(0, 1)[: segment.length]

        return rows(cache.latent), rows(cache.rope)

    def attention_update(self, outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
        merged: Tensor = self._npu.npu_attention_update(
            [lse.flatten() for lse in lses], [out.flatten(0, 1) for out in outputs], 0
        )[0]
        return merged.view(outputs[0].shape)

    def _pages(self, pool: Tensor, cache: LayerCache) -> Tensor:
        """The shape that the writing operators want in either layout: `[blocks, block_size, 1, channels]`."""
        return pool.view(pool.shape[0], cache.block_size, 1, -1)

    def _attention_pages(self, pool: Tensor, cache: LayerCache) -> Tensor:
        """The shape by which attention tells the layout: `[blocks, 1, D/16, block_size, 16]` is NZ, 3-D is ND."""
        return pool.unsqueeze(1) if self.kv_layout == "nz" else pool.view(pool.shape[0], cache.block_size, -1)

    def attention_norm(
        self, x: Tensor | None, residual: Tensor, gamma: Tensor, eps: float, mla: Mla
    ) -> tuple[Activation, Tensor]:
        if x is None or not mla.takes_quantized:
            return super().attention_norm(x, residual, gamma, eps, mla)
        codes, _, total, scale, _ = self._npu.npu_add_rms_norm_dynamic_quant(x, residual, gamma, epsilon=eps)
        return Quantized(codes, scale), total

    def mla_project(self, hidden: Activation, mla: Mla) -> tuple[Tensor, Tensor, Tensor]:
        weights: AscendMla = mla
        config = weights.config
        rows: Activation = hidden
        if weights.takes_quantized and not isinstance(hidden, Quantized):
            rows = self.dynamic_quant(hidden)
        heads = (config.num_heads, -1)
        if weights.prolog is not None:
            assert weights.q_a_norm is not None
            kv = self.linear(rows, weights.prolog.kv_a)
            q_a = self.rms_norm(self.linear(rows, weights.prolog.q_a), weights.q_a_norm, config.rms_norm_eps)
            q = self.linear(q_a, weights.prolog.q_b).unflatten(-1, heads)
            q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
            return q_nope, q_rope, kv
        projected = [self.linear(rows, linear) for linear in weights.down]
        if config.q_lora_rank is None:
            kv, queries = projected[0], rows
        else:
            assert weights.q_a_norm is not None
            widths = [config.q_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim]
            q_a, kv = projected[0].split(widths, dim=-1) if len(projected) == 1 else projected
            queries = self.rms_norm(q_a, weights.q_a_norm, config.rms_norm_eps)
            if isinstance(weights.q_nope, W8A8Linear):
                queries = self.dynamic_quant(queries)
        q_nope, q_rope = (self.linear(queries, linear) for linear in (weights.q_nope, weights.q_rope))
        return q_nope.unflatten(-1, heads), q_rope.unflatten(-1, heads), kv

    def mla_prolog(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> tuple[Tensor, Tensor]:
        weights: AscendMla = mla
        prolog = weights.prolog
        if prolog is None or cache.latent_scale is not None:
            return super().mla_prolog(hidden, mla, cache, step)
        rows = hidden if isinstance(hidden, Quantized) else self.dynamic_quant(hidden)
        q_latent, q_rope, *_ = self._npu.npu_mla_prolog_v3(
            rows.codes,
            prolog.q_a.weight,
            prolog.q_b.weight,
            weights.w_uk,
            prolog.kv_a.weight,
            weights.q_a_norm,
            weights.kv_a_norm,
            step.sin,  # sine first
            step.cos,
            self._pages(cache.latent, cache),
            self._pages(cache.rope, cache),
            cache_index=step.slots,
            dequant_scale_x=rows.scale.unsqueeze(1),
            dequant_scale_w_dq=prolog.q_a.scale.unsqueeze(0),
            dequant_scale_w_uq_qr=prolog.q_b.scale.unsqueeze(0),
            dequant_scale_w_dkv_kr=prolog.kv_a.scale.unsqueeze(0),
            rmsnorm_epsilon_cq=weights.config.rms_norm_eps,
            rmsnorm_epsilon_ckv=weights.config.rms_norm_eps,
            cache_mode="PA_NZ" if self.kv_layout == "nz" else "PA_BSND",
            weight_quant_mode=PROLOG_INT8,
        )
        return q_latent, q_rope

    def mla_write_cache(
        self, kv: Tensor, mla: Mla, cache: LayerCache, step: Step, output_kv: bool
    ) -> tuple[Tensor, Tensor] | None:
        weights: AscendMla = mla
        eps = weights.config.rms_norm_eps
        return self.kv_rmsnorm_rope_cache(kv, weights.kv_a_norm, step.cos, step.sin, step.slots, cache, eps, output_kv)

    def mla_decompress(self, latent: Tensor, mla: Mla) -> tuple[Tensor, Tensor]:
        weights: AscendMla = mla
        heads = (weights.config.num_heads, -1)
        return (
            self.linear(latent, weights.k_b).unflatten(-1, heads),
            self.linear(latent, weights.v_b).unflatten(-1, heads),
        )
