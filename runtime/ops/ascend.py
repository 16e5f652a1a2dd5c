"""The operator set on torch_npu: weights in FRACTAL_NZ, the latent cache in NZ pages, one device call an operator.

A decode step of a MoE layer is 27 launches, or 20 where `npu_mla_prolog_v3` takes the layer (docs/ascend.md has the
table). No call here waits for the device: lengths come from the step as host integers, everything else stays a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import BackendError
from ...quant.schemes import Scheme
from ..layout import CHANNELS
from . import (
    Activation,
    Decode,
    Experts,
    Gating,
    LayerCache,
    Linear,
    LinearPart,
    Mla,
    MlaConfig,
    MlaParts,
    Ops,
    PrefixSegment,
    Quantized,
    Router,
    Step,
)
from .ascend_support import import_torch_npu, require_soc
from .ascend_weights import (
    AscendMla,
    FloatExperts,
    FloatLinear,
    Layout,
    PrologWeights,
    W4A8Experts,
    W8A8Experts,
    W8A8Linear,
    fits_nz,
    head_rows,
)

KvLayout = Literal["nz", "nd"]

# Sizes that the attention operators fix: absorbed attention has 512 + 64 channels, decompressed attention 128 + 64.
LATENT_DIM, ROPE_DIM, HEAD_DIM = 512, 64, 128
MAX_HEADS = 128
# Documented shapes of npu_mla_prolog_v3.
PROLOG_HIDDEN = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192)
PROLOG_Q_LORA = (1536, 2048)
PROLOG_INT8 = 2  # weight_quant_mode: q_a, q_b and kv_a are int8

CAUSAL_MASK_SIDE = 2048
RIGHT_DOWN_CAUSAL = 3  # sparse_mode: query i of S_q sees key j ≤ i + S_kv − S_q
NO_MASK = 0
COUNTS = 1  # group_list_type and expert_tokens_num_type: rows of each expert, not running sums
ROW_ORDER = 2  # drop_pad_mode of finalize: row_index[t · k + j], as init_routing_v2 gives it (the default is columns)
DYNAMIC_INT8, NOT_QUANTIZED = 1, -1  # quant_mode of init_routing_v2


class AscendOps(Ops):
    """Operators on one NPU.

    kv_layout: "nz" (pages in FRACTAL_NZ, what decode attention reads fastest) or "nd". fused_prolog: use
    `npu_mla_prolog_v3` for layers whose shapes it documents. soc: the chip's name; None asks the driver.
    Raises BackendError without torch_npu or CANN, on a chip that lacks the operators, and for unknown settings.
    """

    name = "ascend"
    COMPUTE_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    def __init__(
        self,
        device: str | torch.device = "npu:0",
        dtype: torch.dtype = torch.bfloat16,
        kv_layout: KvLayout = "nz",
        fused_prolog: bool = True,
        soc: str | None = None,
    ):
        if kv_layout not in ("nz", "nd"):
            raise BackendError(f"kv_layout {kv_layout!r} is neither 'nz' nor 'nd'")
        if dtype not in self.COMPUTE_DTYPES:
            known = " or ".join(str(known).removeprefix("torch.") for known in self.COMPUTE_DTYPES)
            raise BackendError(f"the ascend backend computes in {known}, not {str(dtype).removeprefix('torch.')}")
        torch_npu = import_torch_npu()
        self.device = torch.device(device)
        if self.device.type == "npu":
            if not torch_npu.npu.is_available():
                raise BackendError("torch_npu finds no NPU: check `npu-smi info` and the driver, or run `npuq doctor`")
            torch_npu.npu.config.allow_internal_format = True  # else npu_format_cast keeps ND
            torch_npu.npu.set_device(self.device)
            soc = soc or torch_npu.npu.get_device_name(self.device)
        if soc is None:
            raise BackendError(f"{self.device} is not an NPU")
        self.soc = require_soc(soc)
        self.dtype = dtype
        self.kv_layout = kv_layout
        self.fused_prolog = fused_prolog
        self._npu: Any = torch.ops.npu
        self._layout = Layout(self.device, dtype)
        side = CAUSAL_MASK_SIDE
        self._causal_mask = torch.ones(side, side, dtype=torch.bool, device=self.device).triu_(1)

    # ---- at load ---------------------------------------------------------------------------------------------------

    def float_linear(self, weights: Sequence[Tensor]) -> Linear:
        return self._layout.float_linear(weights)

    def w8a8_linear(self, parts: Sequence[LinearPart]) -> Linear:
        return self._layout.w8a8_linear(parts)

    def float_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        return self._layout.float_experts(experts)

    def w8a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        return self._layout.w8a8_experts(experts)

    def w4a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        return self._layout.w4a8_experts(experts)

    def router(self, weight: Tensor) -> Router:
        return weight.float().to(self.device)

    def parameter(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor.to(self.device, dtype or tensor.dtype).contiguous()

    def new_kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, kv_lora_rank: int, rope_dim: int
    ) -> tuple[LayerCache, ...]:
        if block_size % 16 or not 0 < block_size <= 1024:
            raise BackendError(f"block_size {block_size}: the NPU's paged attention takes multiples of 16 up to 1024")

        def pool(channels: int) -> Tensor:
            pages = (
                (channels // CHANNELS, block_size, CHANNELS) if self.kv_layout == "nz" else (block_size, 1, channels)
            )
            return torch.zeros(num_blocks, *pages, dtype=self.dtype, device=self.device)

        return tuple(LayerCache(pool(kv_lora_rank), pool(rope_dim), block_size) for _ in range(num_layers))

    def mla(self, parts: MlaParts, config: MlaConfig) -> Mla:
        check_mla(parts.kv_a.name, config)
        widths = (config.qk_nope_head_dim, config.v_head_dim)
        k_b, v_b = parts.kv_b.view(config.num_heads, sum(widths), config.kv_lora_rank).split(list(widths), dim=1)
        prolog = self._prolog(parts, config)
        down: tuple[Linear, ...] = ()
        q_nope = q_rope = None
        if prolog is None:
            down, q_nope, q_rope = self._projections(parts, config)
        first = parts.q if parts.q_a is None else parts.q_a
        return AscendMla(
            config=config,
            prolog=prolog,
            down=down,
            q_nope=q_nope,
            q_rope=q_rope,
            q_a_norm=None if parts.q_a_norm is None else self.parameter(parts.q_a_norm, self.dtype),
            kv_a_norm=self.parameter(parts.kv_a_norm, self.dtype),
            k_b=self._layout.float_linear([k_b.reshape(-1, config.kv_lora_rank)]),
            v_b=self._layout.float_linear([v_b.reshape(-1, config.kv_lora_rank)]),
            w_uk=self.parameter(k_b, self.dtype),
            w_uv=self.parameter(v_b.transpose(1, 2), self.dtype),
            o=self.linear_of([parts.o]),
            takes_quantized=all(part is not None and part.scheme is Scheme.W8A8 for part in (first, parts.kv_a)),
        )

    def _prolog(self, parts: MlaParts, config: MlaConfig) -> PrologWeights | None:
        if not (self.fused_prolog and self.dtype == torch.bfloat16 and parts.q_a and parts.q_b):
            return None
        linears = (parts.q_a, parts.q_b, parts.kv_a)
        hidden = parts.kv_a.weight.shape[1]
        documented = hidden in PROLOG_HIDDEN and config.q_lora_rank in PROLOG_Q_LORA
        if not documented or any(part.scheme is not Scheme.W8A8 or not fits_nz(part.weight.t()) for part in linears):
            return None
        return PrologWeights(*(self._layout.w8a8_linear([part]) for part in linears))

    def _projections(self, parts: MlaParts, config: MlaConfig) -> tuple[tuple[Linear, ...], Linear, Linear]:
        """(down, q_nope, q_rope) of `AscendMla`."""
        queries = parts.q_b if parts.q is None else parts.q
        if queries is None:
            raise BackendError(f"{parts.kv_a.name}: the layer has no q_proj and no q_b_proj")
        halves = head_rows(queries, config.num_heads, (config.qk_nope_head_dim, config.qk_rope_head_dim))
        q_nope, q_rope = (self.linear_of([half]) for half in halves)
        if parts.q_a is None:
            return (self.linear_of([parts.kv_a]),), q_nope, q_rope
        fused = parts.q_a.scheme == parts.kv_a.scheme
        groups = [[parts.q_a, parts.kv_a]] if fused else [[parts.q_a], [parts.kv_a]]
        return tuple(self.linear_of(group) for group in groups), q_nope, q_rope

    # ---- norms and activations -------------------------------------------------------------------------------------

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(token_ids, table).to(self.dtype)

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        normed: Tensor = self._npu.npu_rms_norm(x, gamma, epsilon=eps)[0]
        return normed

    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, _, total = self._npu.npu_add_rms_norm(x, residual, gamma, epsilon=eps)
        return normed, total

    def swiglu(self, x: Tensor) -> Tensor:
        activated: Tensor = self._npu.npu_swiglu(x, dim=-1)
        return activated

    def dynamic_quant(self, x: Tensor) -> Quantized:
        return Quantized(*self._npu.npu_dynamic_quant(x))

    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        # Both defaults are wrong here: they activate the right half and quantize statically.
        return Quantized(*self._npu.npu_dequant_swiglu_quant(x, activate_left=True, quant_mode=1))

    # ---- matmuls ---------------------------------------------------------------------------------------------------

    def linear(self, x: Activation, linear: Linear) -> Tensor:
        handle: FloatLinear | W8A8Linear = linear
        if isinstance(handle, FloatLinear):
            if isinstance(x, Quantized):
                raise BackendError("a float linear was given quantized rows")
            return F.linear(x, handle.weight)
        rows = x if isinstance(x, Quantized) else self.dynamic_quant(x)
        product: Tensor = self._npu.npu_quant_matmul(
            rows.codes, handle.weight, handle.scale, pertoken_scale=rows.scale, output_dtype=self.dtype
        )
        return product

    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        return F.linear(x.float(), router)

    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        # What comes out of decode attention is stored head by head: then x needs no transposition in the kernel, which
        # limits heads · K to 65535 (128 heads of 512 exceed it).
        by_head = x.transpose(0, 1)
        stored, order = (by_head, (0, 1, 2)) if by_head.is_contiguous() else (x, (1, 0, 2))
        product: Tensor = self._npu.npu_transpose_batchmatmul(stored, weight, perm_x1=order, perm_y=(1, 0, 2))
        return product

    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        handle: FloatExperts | W8A8Experts | W4A8Experts = experts
        if isinstance(handle, FloatExperts):
            if isinstance(x, Quantized):
                raise BackendError("float experts were given quantized rows")
            return self._grouped_matmul(x, handle.weight, group_list)
        rows = x if isinstance(x, Quantized) else self.dynamic_quant(x)
        scales = {"scale": [handle.scale], "per_token_scale": [rows.scale]}
        if isinstance(handle, W4A8Experts):
            return self._grouped_matmul(rows.codes, handle.weight, group_list, bias=[handle.scale_bias], **scales)
        return self._grouped_matmul(rows.codes, handle.weight, group_list, **scales)

    def _grouped_matmul(self, rows: Tensor, weight: Tensor, group_list: Tensor, **scales: list[Tensor]) -> Tensor:
        product: Tensor = self._npu.npu_grouped_matmul(
            [rows],
            [weight],
            group_list=group_list,
            group_list_type=COUNTS,
            group_type=0,
            split_item=2,
            output_dtype=self.dtype,
            **scales,
        )[0]
        return product

    # ---- routing ---------------------------------------------------------------------------------------------------

    def moe_gating_top_k(self, logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
        sigmoid = gating.scoring == "sigmoid"
        if sigmoid == gating.renormalize:
            weights, ids, _ = self._npu.npu_moe_gating_top_k(
                logits,
                gating.k,
                bias=bias,
                k_group=gating.k_group,
                group_count=gating.group_count,
                group_select_mode=gating.group_select_mode,
                renorm=0,
                norm_type=int(sigmoid),
                routed_scaling_factor=gating.scaling,
                eps=1e-20,
            )
            return weights, ids
        if sigmoid or bias is not None or gating.group_count > 1:
            raise BackendError(f"the NPU has no router for {gating.scoring} with renormalize={gating.renormalize}")
        # Softmax over the chosen logits is softmax over all of them, normalised.
        weights, ids, _ = self._npu.npu_moe_gating_top_k_softmax_v2(logits, k=gating.k, renorm=1)
        return (weights if gating.scaling == 1.0 else weights * gating.scaling), ids

    def moe_init_routing(
        self, x: Tensor, expert_ids: Tensor, num_experts: int, quantize: bool
    ) -> tuple[Activation, Tensor, Tensor]:
        rows, row_index, group_list, scale = self._npu.npu_moe_init_routing_v2(
            x,
            expert_ids,
            active_num=expert_ids.numel(),
            expert_num=num_experts,
            expert_tokens_num_type=COUNTS,
            expert_tokens_num_flag=True,
            active_expert_range=[0, num_experts],
            quant_mode=DYNAMIC_INT8 if quantize else NOT_QUANTIZED,
        )
        return (Quantized(rows, scale) if quantize else rows), row_index, group_list

    def moe_finalize_routing(
        self, rows: Tensor, weights: Tensor, row_index: Tensor, expert_ids: Tensor, skip: Tensor | None
    ) -> Tensor:
        out: Tensor = self._npu.npu_moe_finalize_routing(
            rows, skip, None, None, weights.to(self.dtype), row_index, expert_ids, drop_pad_mode=ROW_ORDER
        )
        return out

    # ---- attention -------------------------------------------------------------------------------------------------

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

    # ---- composites ------------------------------------------------------------------------------------------------

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
        if prolog is None:
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


def check_mla(name: str, config: MlaConfig) -> None:
    """Raises BackendError for attention sizes that the NPU's operators do not take."""
    fixed = {
        "kv_lora_rank": (config.kv_lora_rank, LATENT_DIM),
        "qk_rope_head_dim": (config.qk_rope_head_dim, ROPE_DIM),
        "qk_nope_head_dim": (config.qk_nope_head_dim, HEAD_DIM),
        "v_head_dim": (config.v_head_dim, HEAD_DIM),
    }
    wrong = [f"{key} {value} (must be {wanted})" for key, (value, wanted) in fixed.items() if value != wanted]
    heads = config.num_heads
    if heads & (heads - 1) or heads > MAX_HEADS:
        wrong.append(f"{heads} attention heads (must be a power of two up to {MAX_HEADS})")
    if wrong:
        raise BackendError(f"{name}: the NPU's attention operators do not take {', '.join(wrong)}")
