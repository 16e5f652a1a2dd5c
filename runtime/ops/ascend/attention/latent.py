"""Latent attention on torch_npu: writing and reading NZ or ND pages, attention over keys, the fused prolog."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .....errors import BackendError
from ....attention.pools import LayerCache, Pages
from ...handles import Activation, Keys, Linear, Mla, MlaConfig, MlaParts, Projection, Quantized, Queries, own
from ...latent_attention import LATENT, ROPE, LatentAttention
from ...norms import Norms
from ...products import Products
from ...rotary import Rotary
from ...steps import Decode, Lengths, Positions, Step
from ..device import NO_MASK, RIGHT_DOWN_CAUSAL, Npu, causal_mask
from ..weights import AscendWeights, W8A8Linear
from .folding import fold_scale
from .int8_cache import Int8Cache, Int8Queries, holds_codes
from .limits import MOST_QUERIES, MOST_UPDATES, PrefillForm, absorbed_heads, pad_heads, prefill_form
from .mla import AscendMla, PrologWeights, lay_out_mla

OUTPUT_ALONE, OUTPUT_AND_LSE = 0, 1  # update_type of npu_attention_update
# Modes of the prolog.
PROLOG_INT8 = 2  # weight_quant_mode: q_a, q_b and kv_a are int8
PER_TENSOR, PER_HEAD = 1, 1  # kv_cache_quant_mode, query_quant_mode


class AscendLatentAttention(LatentAttention):
    """Attention on torch_npu. Caches with an int8 latent are left to `int8`.

    fused_prolog: lay weights out for `npu_mla_prolog_v3` where it takes them. prolog_works: False once it gave queries
    of another dtype than its documentation says.
    """

    most_queries = MOST_QUERIES

    def __init__(
        self, npu: Npu, weights: AscendWeights, norms: Norms, products: Products, rotary: Rotary, fused_prolog: bool
    ):
        super().__init__(npu.dtype, weights, norms, products, rotary)
        self.npu, self.layout, self.fused_prolog = npu, weights, fused_prolog
        self.prolog_works = True
        self._causal_mask = causal_mask(npu.device)
        self.int8 = Int8Cache(npu, norms, rotary, self._causal_mask)

    def findings(self) -> list[str]:
        """Results of the trials of int8 caches and of the prolog. See `Ops.findings`."""
        found = []
        if self.int8.by_operator is not None:
            way = "by npu_kv_rmsnorm_rope_cache" if self.int8.by_operator else "in steps, not by the fused operator"
            found.append(f"int8 latents are written {way}")
        if not self.prolog_works:
            found.append("npu_mla_prolog_v3 gives queries of another dtype than documented: its steps run one by one")
        return found

    def kv_rmsnorm_rope_cache(
        self, kv: Tensor, gamma: Tensor, eps: float, positions: Positions, cache: LayerCache, output_kv: bool
    ) -> tuple[Tensor, Tensor] | None:
        if holds_codes(cache):
            return self.int8.write(kv, gamma, eps, positions, cache, output_kv)
        # The rope cache comes first, in arguments and in results.
        _, _, k_rope, latent = self.npu.operators.npu_kv_rmsnorm_rope_cache(
            kv[:, None, None],
            gamma,
            positions.cos[:, None, None],
            positions.sin[:, None, None],
            positions.slots,
            self._pages(cache[ROPE], cache),
            self._pages(cache[LATENT], cache),
            epsilon=eps,
            cache_mode="PA_NZ" if cache[LATENT].pool.layout == "nz" else "PA",
            is_output_kv=output_kv,
        )
        # Without output_kv the two outputs are uninitialised memory.
        return (k_rope.flatten(0, 2), latent.flatten(0, 2)) if output_kv else None

    def fused_infer_attention(
        self, queries: Queries, keys: Keys, lengths: Lengths, scale: float
    ) -> tuple[Tensor, Tensor]:
        heads, widths = queries.nope.shape[1], (queries.nope.shape[2], queries.rope.shape[2], keys.value.shape[2])
        if prefill_form(*widths) is PrefillForm.JOINED:
            return self._attend_by_sequence(queries, keys, lengths, scale)
        out, lse = self.npu.operators.npu_fused_infer_attention_score(
            queries.nope.contiguous(),
            keys.nope.contiguous(),
            keys.value.contiguous(),
            query_rope=queries.rope.contiguous(),
            key_rope=keys.rope.unsqueeze(1).expand(-1, heads, -1).contiguous(),  # every head takes its own copy
            atten_mask=self._causal_mask if lengths.causal else None,
            sparse_mode=RIGHT_DOWN_CAUSAL if lengths.causal else NO_MASK,
            actual_seq_lengths=lengths.q_lens,
            actual_seq_lengths_kv=lengths.kv_lens,
            num_heads=heads,
            num_key_value_heads=heads,
            input_layout="TND",
            scale=scale,
            softmax_lse_flag=True,
        )
        return out, lse

    def _attend_by_sequence(
        self, queries: Queries, keys: Keys, lengths: Lengths, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`fused_infer_attention` with the rotary channels joined to the others."""
        heads = queries.nope.shape[1]
        query = torch.cat(queries, dim=-1)
        key = torch.cat([keys.nope, keys.rope.unsqueeze(1).expand(-1, heads, -1)], dim=-1)
        value = keys.value.contiguous()
        outs, lses = [], []
        for (q0, q1), (k0, k1) in zip(pairwise([0, *lengths.q_lens]), pairwise([0, *lengths.kv_lens]), strict=True):
            masked = lengths.causal and q1 - q0 > 1  # a single query sees all keys
            out, lse = self.npu.operators.npu_fused_infer_attention_score(
                query[q0:q1].unsqueeze(0),
                key[k0:k1].unsqueeze(0),
                value[k0:k1].unsqueeze(0),
                atten_mask=self._causal_mask if masked else None,
                sparse_mode=RIGHT_DOWN_CAUSAL if masked else NO_MASK,
                actual_seq_lengths=[q1 - q0],
                actual_seq_lengths_kv=[k1 - k0],
                num_heads=heads,
                num_key_value_heads=heads,
                input_layout="BSND",
                scale=scale,
                softmax_lse_flag=True,
            )
            outs.append(out.squeeze(0))
            lses.append(lse.squeeze(0).transpose(0, 1))  # [N, S, 1] → [S, N, 1]
        return torch.cat(outs), torch.cat(lses)

    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        heads = q_latent.shape[1]
        padded = absorbed_heads(heads)
        q_latent, q_rope = pad_heads(q_latent, padded), pad_heads(q_rope, padded)
        if holds_codes(cache):
            return self.int8.attend(self.int8.quantize(q_latent, q_rope), cache, decode, scale)[:, :heads]
        return self._attend_pages(q_latent, q_rope, cache, decode, scale)[:, :heads]

    def _attend_pages(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        latent = self._attention_pages(cache[LATENT], cache)
        single = decode.num_tokens == len(decode.q_lens)  # one query each: nothing to mask
        out: Tensor = self.npu.operators.npu_fused_infer_attention_score(
            q_latent,
            latent,
            latent,
            query_rope=q_rope,
            key_rope=self._attention_pages(cache[ROPE], cache),
            atten_mask=None if single else self._causal_mask,
            sparse_mode=NO_MASK if single else RIGHT_DOWN_CAUSAL,
            actual_seq_lengths=decode.q_lens,  # cumulative, for the queries
            actual_seq_lengths_kv=decode.kv_lens,  # a length each, for paged keys
            block_table=decode.block_table,
            block_size=cache.block_size,
            num_heads=q_latent.shape[1],
            num_key_value_heads=1,
            input_layout="TND_NTD",
            scale=scale,
        )[0]
        return out.transpose(0, 1)

    def attention_update(self, outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
        outs, weights = [out.flatten(0, 1) for out in outputs], [lse.flatten() for lse in lses]
        while len(outs) > MOST_UPDATES:
            some = self.npu.operators.npu_attention_update(weights[:MOST_UPDATES], outs[:MOST_UPDATES], OUTPUT_AND_LSE)
            outs, weights = [some[0], *outs[MOST_UPDATES:]], [some[1], *weights[MOST_UPDATES:]]
        merged: Tensor = self.npu.operators.npu_attention_update(weights, outs, OUTPUT_ALONE)[0]
        return merged.view(outputs[0].shape)

    def _pages(self, pages: Pages, cache: LayerCache) -> Tensor:
        """View the pages as the writing operators take both layouts: `[blocks, block_size, 1, channels]`."""
        return pages.tensor.view(pages.tensor.shape[0], cache.block_size, 1, -1)

    def _attention_pages(self, pages: Pages, cache: LayerCache) -> Tensor:
        """View pages for attention: NZ `[blocks, 1, D/16, block_size, 16]` or ND `[blocks, block_size, D]`."""
        tensor = pages.tensor
        return tensor.unsqueeze(1) if pages.pool.layout == "nz" else tensor.view(tensor.shape[0], cache.block_size, -1)

    def load(self, parts: MlaParts, config: MlaConfig) -> Mla:
        return lay_out_mla(parts, config, self.layout, self.fused_prolog)

    def with_cache_scale(self, mla: Mla, scale: Tensor) -> Mla:
        self.int8.find_writer()
        return fold_scale(own(mla, AscendMla), scale)

    def write_cache(
        self, kv: Tensor, mla: Mla, cache: LayerCache, positions: Positions, output_kv: bool
    ) -> tuple[Tensor, Tensor] | None:
        check_units(own(mla, AscendMla), cache)
        return super().write_cache(kv, mla, cache, positions, output_kv)

    def norm(
        self, x: Tensor | None, residual: Tensor, gamma: Tensor, eps: float, mla: Mla
    ) -> tuple[Activation, Tensor]:
        if x is None or not own(mla, AscendMla).takes_quantized:
            return super().norm(x, residual, gamma, eps, mla)
        codes, _, total, scale, _ = self.npu.operators.npu_add_rms_norm_dynamic_quant(x, residual, gamma, epsilon=eps)
        return Quantized(codes, scale), total

    def project(self, hidden: Activation, mla: Mla, reader: Linear | None = None) -> Projection:
        weights = own(mla, AscendMla)
        config = weights.config
        rows: Activation = hidden
        if weights.takes_quantized and not isinstance(hidden, Quantized):
            rows = self.norms.dynamic_quant(hidden)
        heads, projections = (config.heads, -1), weights.projections
        if isinstance(projections, PrologWeights):
            assert weights.q_a_norm is not None
            q_a, kv = self.products.linears(rows, [projections.q_a, projections.kv_a])
            q_a = self.norms.rms_norm(q_a, weights.q_a_norm, config.rms_norm_eps)
            codes = self.norms.dynamic_quant(q_a)
            q = self.products.linear(codes, projections.q_b).unflatten(-1, heads)
            q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
            return Projection(q_nope, q_rope, kv, codes if isinstance(reader, W8A8Linear) else q_a)
        queries: Activation = rows
        q_latent: Activation | None = None
        if projections.q_a is None:
            kv = self.products.linear(rows, projections.kv_a)
        else:
            assert weights.q_a_norm is not None
            q_a, kv = self.products.linears(rows, [projections.q_a, projections.kv_a])
            queries = q_latent = self.norms.rms_norm(q_a, weights.q_a_norm, config.rms_norm_eps)
            if isinstance(projections.q_nope, W8A8Linear):
                queries = self.norms.dynamic_quant(q_latent)
            if isinstance(reader, W8A8Linear):
                q_latent = queries
        q_nope, q_rope = self.products.linears(queries, [projections.q_nope, projections.q_rope])
        return Projection(q_nope.unflatten(-1, heads), q_rope.unflatten(-1, heads), kv, q_latent)

    def prolog_with_latent(
        self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step, reader: Linear | None
    ) -> tuple[Tensor, Tensor, Activation | None]:
        weights = own(mla, AscendMla)
        # The operator gives the latent of the queries as int8 codes only.
        float_reader = reader is not None and not isinstance(reader, W8A8Linear)
        if self._takes_prolog(weights) and not holds_codes(cache) and not float_reader:
            absorbed, q_rope, _, codes, scale = self._fused_prolog(hidden, weights, cache, step, reader is not None)
            if self._gave(absorbed, self.npu.dtype):
                return absorbed, q_rope, None if reader is None else Quantized(codes, scale.squeeze(1))
        return super().prolog_with_latent(hidden, mla, cache, step, reader)

    def decode(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> Tensor:
        weights = own(mla, AscendMla)
        if not holds_codes(cache) or not self._takes_prolog(weights):
            return super().decode(hidden, mla, cache, step)
        assert step.decode is not None
        codes, q_rope, scale, _, _ = self._fused_prolog(hidden, weights, cache, step, query_norm=False)
        if not self._gave(codes, torch.int8):
            return super().decode(hidden, mla, cache, step)
        queries = Int8Queries(codes, q_rope, scale.squeeze(-1))
        attended = self.int8.attend(queries, cache, step.decode, mla.config.softmax_scale)
        return self.output(self.bring_out(attended, mla), mla)

    def _takes_prolog(self, weights: AscendMla) -> bool:
        return isinstance(weights.projections, PrologWeights) and self.prolog_works

    def _gave(self, query: Tensor, dtype: torch.dtype) -> bool:
        """True for a query of the expected dtype. Another one, as some builds give, ends the use of the prolog."""
        self.prolog_works = query.dtype is dtype
        return self.prolog_works

    def _fused_prolog(
        self, hidden: Activation, weights: AscendMla, cache: LayerCache, step: Step, query_norm: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Run `npu_mla_prolog_v3`, in full int8 where the cache holds codes."""
        check_units(weights, cache)
        prolog = weights.projections
        assert isinstance(prolog, PrologWeights)
        rows = hidden if isinstance(hidden, Quantized) else self.norms.dynamic_quant(hidden)
        codes = {"quant_scale_ckv": self.int8.one, "kv_cache_quant_mode": PER_TENSOR, "query_quant_mode": PER_HEAD}
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = self.npu.operators.npu_mla_prolog_v3(
            rows.codes,
            prolog.q_a.weight,
            prolog.q_b.weight,
            weights.w_uk,
            prolog.kv_a.weight,
            weights.q_a_norm,
            weights.kv_a_norm,
            step.positions.sin,  # sine first
            step.positions.cos,
            self._pages(cache[LATENT], cache),
            self._pages(cache[ROPE], cache),
            cache_index=step.positions.slots,
            dequant_scale_x=rows.scale.unsqueeze(1),
            dequant_scale_w_dq=prolog.q_a.scale.unsqueeze(0),
            dequant_scale_w_uq_qr=prolog.q_b.scale.unsqueeze(0),
            dequant_scale_w_dkv_kr=prolog.kv_a.scale.unsqueeze(0),
            rmsnorm_epsilon_cq=weights.config.rms_norm_eps,
            rmsnorm_epsilon_ckv=weights.config.rms_norm_eps,
            cache_mode="PA_NZ" if cache[LATENT].pool.layout == "nz" else "PA_BSND",
            query_norm_flag=query_norm,
            weight_quant_mode=PROLOG_INT8,
            **(codes if holds_codes(cache) else {}),
        )
        return results

    def decompress(self, latent: Tensor, k_rope: Tensor, mla: Mla) -> Keys:
        weights = own(mla, AscendMla)
        k_nope, value = (
            self.products.linear(latent, linear).unflatten(-1, (weights.config.heads, -1))
            for linear in (weights.k_b, weights.v_b)
        )
        return Keys(k_nope, k_rope, value)


def check_units(mla: AscendMla, cache: LayerCache) -> None:
    """Raise BackendError for a cache of codes and weights without its scales, or the other way round."""
    if mla.caches_codes != holds_codes(cache):
        raise BackendError("the weights of attention and the KV cache do not belong together: one of them is int8")
