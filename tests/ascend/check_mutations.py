"""Deliberately wrong calls: each must be refused, or show in the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ascend_rig import emulate, formats, harness
from ascend_rig.mutants import (
    LENGTHS,
    NEW_TOKENS,
    Arguments,
    Change,
    Mutant,
    differences,
    mapped,
    outcome,
    renamed,
    right,
    running,
    setting,
    swapped,
    without,
)

from npuq.errors import BackendError, GenerationError
from npuq.runtime.ops import LayerCache, Quantized
from npuq.runtime.ops.ascend import norms as norms_module
from npuq.runtime.ops.ascend import weights as weights_module
from npuq.runtime.ops.ascend.attention import latent as attention_module
from npuq.runtime.ops.ascend.attention import mla as mla_module
from npuq.runtime.ops.ascend.attention.limits import PrefillForm
from npuq.runtime.step import Chunk


def next_expert(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.roll(1, 0) for tensor in tensors]


def paged_only(name: str, function: Callable[[Any], Any]) -> Change:
    """One argument of decode attention changed; prefill attention left alone."""

    def change(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
        return (args, {**kwargs, name: function(kwargs[name])} if "block_table" in kwargs else kwargs)

    return change


def joined_only(where: int | str, function: Callable[[Any], Any]) -> Change:
    """One argument of attention over joined heads changed; other attention left alone."""
    change = mapped(where, function)
    return lambda args, kwargs: change(args, kwargs) if kwargs["input_layout"] == "BSND" else (args, kwargs)


FIA, CACHE, GMM = "npu_fused_infer_attention_score", "npu_kv_rmsnorm_rope_cache", "npu_grouped_matmul"
INIT, FINALIZE, GATE = "npu_moe_init_routing_v2", "npu_moe_finalize_routing", "npu_moe_gating_top_k"

MUTATIONS: dict[str, tuple[str, Change]] = {
    "argument renamed": (FINALIZE, renamed("drop_pad_mode", "drop_mode")),
    "argument of the other version": (FIA, renamed("actual_seq_lengths_kv", "actual_seq_kvlen")),
    "group_list cumulative": (GMM, mapped("group_list", lambda counts: counts.cumsum(0))),
    "group_list cumulative and said so": (
        GMM,
        lambda a, k: (a, {**k, "group_list": k["group_list"].cumsum(0), "group_list_type": 0}),
    ),
    "group_list_type left out": (GMM, without("group_list_type")),
    "group_list int32": (GMM, mapped("group_list", lambda counts: counts.int())),
    "group_list on the host": (GMM, mapped("group_list", lambda counts: counts.tolist())),
    "init_routing gives running sums": (INIT, without("expert_tokens_num_type")),
    "init_routing gives no counts": (INIT, without("expert_tokens_num_flag")),
    "init_routing does not quantize": (INIT, without("quant_mode")),
    "latent and rope cache swapped": (CACHE, swapped(5, 6)),
    "cache_mode is a tuple": (CACHE, setting(cache_mode=("PA_NZ",))),
    "cache_mode left out": (CACHE, without("cache_mode")),
    "cache written in the other layout": (CACHE, setting(cache_mode="PA")),
    "slot off by one": (CACHE, mapped(4, lambda slots: (slots + 1) % (harness.BLOCK * harness.CACHE_BLOCKS))),
    "kv strided": (CACHE, mapped(0, lambda kv: torch.cat([kv, kv], -1)[..., : kv.shape[-1]])),
    "slots int32": (CACHE, mapped(4, lambda slots: slots.int())),
    "cos and sin swapped": (CACHE, swapped(2, 3)),
    "cos of pairs instead of halves": (CACHE, mapped(2, lambda cos: cos[..., :32].repeat_interleave(2, -1))),
    "epsilon of the cache far off": (CACHE, setting(epsilon=1e-1)),
    "key and value not asked for": (CACHE, without("is_output_kv")),
    "rope of queries with cos and sin swapped": ("npu_interleave_rope", swapped(1, 2)),
    "queries already de-interleaved": (
        "npu_interleave_rope",
        mapped(0, lambda x: torch.cat([x[..., 0::2], x[..., 1::2]], -1)),
    ),
    "scale_bias of another expert": (GMM, mapped("bias", next_expert)),
    "scale of another expert": (GMM, mapped("scale", next_expert)),
    "scale_bias left out": (GMM, without("bias")),
    "scale as float32": (GMM, mapped("scale", lambda t: [t[0].int().view(torch.float32)])),
    "scale with sign-extended high words": (GMM, mapped("scale", lambda t: [t[0] | (-1 << 32)])),
    "scale_bias without the token scale": (GMM, mapped("bias", lambda t: [t[0] * 2])),
    "split_item left out": (GMM, without("split_item")),
    "output_dtype left out": (GMM, without("output_dtype")),
    "kv lengths cumulative": (FIA, paged_only("actual_seq_lengths_kv", running)),
    "query lengths with a leading 0": (FIA, mapped("actual_seq_lengths", lambda lengths: [0, *lengths])),
    "query lengths not cumulative": (FIA, mapped("actual_seq_lengths", differences)),
    "kv length short by one": (FIA, paged_only("actual_seq_lengths_kv", lambda n: [*n[:-1], n[-1] - 1])),
    "kv length long by one": (FIA, paged_only("actual_seq_lengths_kv", lambda n: [*n[:-1], n[-1] + 1])),
    "lengths as tensors": (FIA, mapped("actual_seq_lengths", torch.tensor)),
    "mask the wrong way round": (FIA, mapped("atten_mask", lambda mask: None if mask is None else ~mask)),
    "no causal mask": (FIA, setting(sparse_mode=0, atten_mask=None)),
    "softmax scale left out": (FIA, without("scale")),
    "rope not passed": (FIA, without("query_rope", "key_rope")),
    "layout of the output forgotten": (FIA, paged_only("input_layout", lambda layout: "TND")),
    "block table off by one": (FIA, paged_only("block_table", lambda table: (table + 1) % harness.CACHE_BLOCKS)),
    "block table int64": (FIA, paged_only("block_table", lambda table: table.long())),
    "key heads left out": (FIA, paged_only("num_key_value_heads", lambda heads: 0)),
    "block size left out": (FIA, paged_only("block_size", lambda size: 0)),
    "the right half activated": ("npu_dequant_swiglu_quant", without("activate_left")),
    "static quantization": ("npu_dequant_swiglu_quant", without("quant_mode")),
    "row index in column order": (FINALIZE, without("drop_pad_mode")),
    "weights in another dtype": (FINALIZE, mapped(4, lambda weights: weights.double())),
    "shared experts left out": (FINALIZE, mapped(1, lambda skip: None)),
    "correction bias left out": (GATE, without("bias")),
    "groups left out": (GATE, without("group_count", "k_group")),
    "group score by the best one": (GATE, without("group_select_mode")),
    "softmax instead of sigmoid": (GATE, without("norm_type")),
    "routed scaling left out": (GATE, without("routed_scaling_factor")),
    "renorm that CANN refuses": (GATE, setting(renorm=1)),
    "token scale left out": ("npu_quant_matmul", without("pertoken_scale")),
    "weight not transposed": ("npu_quant_matmul", mapped(1, lambda weight: weight.t())),
    "absorbed heads in the wrong order": ("npu_transpose_batchmatmul", mapped(1, lambda weight: weight.roll(1, 0))),
    "perm_x1 left out": ("npu_transpose_batchmatmul", without("perm_x1")),
    "update with swapped parts": ("npu_attention_update", mapped(0, lambda lse: lse[::-1])),
    "update with 3-D parts": ("npu_attention_update", mapped(1, lambda outs: [out.unsqueeze(0) for out in outs])),
    "gamma left in float64": ("npu_add_rms_norm", mapped(2, lambda gamma: gamma.double())),
    "residual dropped": ("npu_add_rms_norm_dynamic_quant", mapped(1, torch.zeros_like)),
}


@pytest.fixture(autouse=True)
def _wide():
    with emulate.use_rules(wide=True):
        yield


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_call_does_not_pass(artifact, name):
    mutants = []

    def change_ops(ops: Any) -> None:
        mutants.append(Mutant(*MUTATIONS[name]))
        ops.npu.operators = mutants[0]

    result = outcome(artifact("example"), change_ops)
    print(f"{name}: {result}")
    assert mutants[0].changed, f"{MUTATIONS[name][0]} is never called"
    assert result != "unnoticed"


@pytest.mark.parametrize("operator", [FIA, CACHE, GMM, INIT, FINALIZE, GATE])
def test_a_right_call_does_pass(artifact, operator):
    """The method above finds nothing where nothing is wrong."""
    result = outcome(
        artifact("example"),
        lambda ops: setattr(ops.npu, "operators", Mutant(operator, lambda args, kwargs: (args, kwargs))),
    )
    assert result == "unnoticed"


def test_rows_given_to_the_w4a8_matmul_cannot_be_used_again(artifact):
    def change_ops(ops: Any) -> None:
        once = ops.products.grouped_matmul

        def twice(x: Quantized, experts: Any, group_list: torch.Tensor) -> torch.Tensor:
            once(x, experts, group_list)
            return once(x, experts, group_list)

        ops.products.grouped_matmul = twice

    assert outcome(artifact("example"), change_ops).startswith("shows")


def test_a_cache_in_the_tensor_format_is_refused(artifact):
    def change_ops(ops: Any) -> None:
        make = ops.caches.new

        def cast(*args: Any) -> LayerCache:
            cache = make(*args)
            pages = {
                name: replace(each, tensor=weights_module.cast_nz(each.tensor)) for name, each in cache.pages.items()
            }
            return replace(cache, pages=pages)

        ops.caches.new = cast

    assert "plain contiguous" in outcome(artifact("example"), change_ops)


FIA8 = "npu_fused_infer_attention_score_v2"
INT8_MUTATIONS: dict[str, tuple[str, Change]] = {
    "queries' quant mode left out": (FIA8, without("query_quant_mode")),
    "no scale of the value": (FIA8, without("dequant_scale_value")),
    "scale of the query in bf16": (FIA8, mapped("dequant_scale_query", lambda scale: scale.bfloat16())),
    "scale of the query of another head": (FIA8, mapped("dequant_scale_query", lambda scale: scale.roll(1, -1))),
    "scale of the query left out of rope": (FIA8, mapped("query_rope", lambda rope: rope * 0.01)),
    "rope of queries in int8": (FIA8, mapped("query_rope", lambda rope: rope.to(torch.int8))),
    "pages in tiles of 16": (FIA8, mapped(1, lambda pages: pages.reshape(pages.shape[0], 1, 32, -1, 16))),
    "block table of another sequence": (FIA8, mapped("block_table", lambda table: table.flip(0))),
    "running lengths of keys": (FIA8, mapped("actual_seq_kvlen", running)),
    "lengths of the first version": (FIA8, renamed("actual_seq_kvlen", "actual_seq_lengths_kv")),
    "output not head-major": (FIA8, setting(input_layout="BSND")),
    "pages of 64": (FIA8, setting(block_size=64)),
    "no scale of the codes": (CACHE, without("c_kv_scale")),
    "scale of the codes in float64": (CACHE, mapped("c_kv_scale", lambda scale: scale.double())),
    "scale of the codes a number": (CACHE, mapped("c_kv_scale", lambda scale: scale[:1])),
    "codes of a quarter of the step": (CACHE, mapped("c_kv_scale", lambda scale: scale / 4)),
    "gain of the norm without the scale": (CACHE, mapped(1, lambda gain: gain * 0.03)),
}


@pytest.mark.parametrize("name", INT8_MUTATIONS)
def test_a_wrong_call_on_an_int8_cache_does_not_pass(artifact, name):
    mutants = []

    def change_ops(ops: Any) -> None:
        mutants.append(Mutant(*INT8_MUTATIONS[name]))
        ops.npu.operators = mutants[0]
        caches.append(ops.mla.int8)

    caches: list[Any] = []
    result = outcome(artifact("example-int8-cache"), change_ops)
    if caches[0].by_operator is False:  # tried at load, and found to write otherwise
        result = "written in steps"
    print(f"{name}: {result}")
    assert mutants[0].changed, f"{INT8_MUTATIONS[name][0]} is never called"
    assert result != "unnoticed"


@pytest.mark.parametrize("field", ["kv_a_norm", "w_uk", "w_uv", "k_b", "v_b"])
def test_weights_without_the_scale_of_the_cache_show(artifact, field, monkeypatch):
    fold = attention_module.fold_scale
    right(artifact("example-int8-cache"), (4, 170))

    def partly(mla: Any, scale: torch.Tensor) -> Any:
        return replace(fold(mla, scale), **{field: getattr(mla, field)})

    monkeypatch.setattr(attention_module, "fold_scale", partly)
    assert outcome(artifact("example-int8-cache"), lambda ops: None, (4, 170)).startswith("shows")


def test_weights_and_cache_of_different_units_are_refused(artifact, monkeypatch):
    monkeypatch.setattr(attention_module, "fold_scale", lambda mla, scale: mla)
    with pytest.raises(BackendError, match="do not belong together"):
        outcome(artifact("example-int8-cache"), lambda ops: None)


@pytest.mark.parametrize("name", ["example-int8-cache", "example"])
def test_more_queries_of_a_sequence_than_documented_are_refused(artifact, name, monkeypatch):
    monkeypatch.setattr(attention_module.AscendLatentAttention, "most_queries", None)
    engine = harness.load(artifact(name), harness.make("ascend")).engine
    step = [Chunk(range(3, 20), 0, [1, 2], absorbed=True)]
    with pytest.raises(emulate.RefusedError, match="17 queries of a sequence"):
        engine._run(step)


def test_wider_rows_than_the_activation_takes_are_refused(monkeypatch):
    monkeypatch.setattr(norms_module, "MAX_SWIGLU_WIDTH", 9216)
    ops = harness.make("ascend")
    with pytest.raises(emulate.RefusedError, match="npu_dequant_swiglu_quant: H 9216, more than 8192"):
        ops.norms.dequant_swiglu_quant(torch.randn(2, 2 * 9216))


def test_more_parts_than_one_update_merges_are_refused(artifact, monkeypatch):
    monkeypatch.setattr(attention_module, "MOST_UPDATES", 17)
    ops = harness.make("ascend")
    parts = [torch.randn(3, 4, 128) for _ in range(17)], [torch.randn(3, 4, 1) for _ in range(17)]
    with pytest.raises(emulate.RefusedError, match="npu_attention_update: 17 parts"):
        ops.mla.attention_update(*parts)


@pytest.mark.parametrize("operator", [FIA8, CACHE, "npu_dynamic_quant"])
def test_a_right_call_on_an_int8_cache_does_pass(artifact, operator):
    right = Mutant(operator, lambda args, kwargs: (args, kwargs))
    assert outcome(artifact("example-int8-cache"), lambda ops: setattr(ops.npu, "operators", right)) == "unnoticed"


PROLOG = "npu_mla_prolog_v3"
INT8_PROLOG_MUTATIONS: dict[str, Change] = {
    "cache not said to be int8": without("kv_cache_quant_mode"),
    "scales a channel": setting(kv_cache_quant_mode=2),
    "queries not quantized": without("query_quant_mode"),
    "no scale of the codes": without("quant_scale_ckv"),
    "a scale for each channel": mapped("quant_scale_ckv", lambda scale: scale.expand(512).contiguous()),
    "codes of half the step": mapped("quant_scale_ckv", lambda scale: scale / 2),
}
PROLOG_MUTATIONS: dict[str, Change] = {
    "q_a in ND where NZ is due": mapped(1, lambda weight: formats.to_nd(weight).clone()),
    "q_b in ND where NZ is due": mapped(2, lambda weight: formats.to_nd(weight).clone()),
    "kv_a in ND where NZ is due": mapped(4, lambda weight: formats.to_nd(weight).clone()),
    "w_uk in NZ where ND is due": mapped(3, lambda weight: formats.to_nz(weight)),
    "cos before sin": swapped(7, 8),
    "gammas swapped": swapped(5, 6),
    "rope cache before latent cache": swapped(9, 10),
    "cache_mode left out": without("cache_mode"),
    "cache_mode of the other operator": setting(cache_mode="PA"),
    "slots int32": mapped("cache_index", lambda slots: slots.int()),
    "slot off by one": mapped("cache_index", lambda slots: slots + 1),
    "scale of x without its last dimension": mapped("dequant_scale_x", lambda scale: scale.flatten()),
    "scale of q_a left out": without("dequant_scale_w_dq"),
    "weight_quant_mode left out": without("weight_quant_mode"),
}


@pytest.mark.parametrize("name", [*PROLOG_MUTATIONS, *INT8_PROLOG_MUTATIONS])
def test_a_wrong_call_of_the_prolog_does_not_pass(artifact, name):
    path = artifact("prolog-int8-cache" if name in INT8_PROLOG_MUTATIONS else "prolog")

    def run(change: Change) -> harness.Run:
        ops = harness.make("ascend", torch.bfloat16)
        ops.npu.operators = Mutant(PROLOG, change)
        done = harness.generate(path, ops, lengths=LENGTHS, new_tokens=NEW_TOKENS)
        assert ops.npu.operators.changed
        return done

    with emulate.use_rules(wide=False):
        expected = run(lambda args, kwargs: (args, kwargs))
        try:
            wrong = run({**PROLOG_MUTATIONS, **INT8_PROLOG_MUTATIONS}[name])
        except (emulate.RefusedError, RuntimeError, TypeError, GenerationError) as error:
            print(f"{name}: {str(error).splitlines()[0]}")
            return
    assert harness.relative_error(wrong.logits, expected.logits) > 1e-2


# In a model of 20 heads of 192 + 64 and 256 channels.
HEADS_MUTATIONS: dict[str, tuple[str, Change]] = {
    "joined heads in the other order": (FIA, joined_only(0, lambda query: query.roll(64, -1))),
    "values cut to V3's width": (FIA, joined_only(2, lambda value: value[..., :128].contiguous())),
    "joined heads as ragged sequences": (FIA, joined_only("input_layout", lambda layout: "TND")),
    "all keys of the step": (FIA, joined_only("actual_seq_lengths_kv", lambda lengths: [lengths[0] + 1])),
    "padding counted as the model's heads": (FIA, paged_only("num_heads", lambda heads: 20)),
    "padding in front": (FIA, lambda args, kwargs: ([args[0].roll(12, 1), *args[1:]], kwargs)),
}


@pytest.mark.parametrize("name", HEADS_MUTATIONS)
def test_a_wrong_call_with_other_heads_does_not_pass(artifact, name):
    mutants = []

    def change_ops(ops: Any) -> None:
        mutants.append(Mutant(*HEADS_MUTATIONS[name]))
        ops.npu.operators = mutants[0]

    result = outcome(artifact("glm-flash"), change_ops)
    print(f"{name}: {result}")
    assert mutants[0].changed and result != "unnoticed"


@pytest.mark.parametrize("name", ["glm-flash", "twenty-heads", "glm-flash-int8-cache"])
def test_heads_that_are_not_padded_are_refused(artifact, name, monkeypatch):
    monkeypatch.setattr(attention_module, "absorbed_heads", lambda heads: heads)
    assert "20 query" in outcome(artifact(name), lambda ops: None)


def test_rotary_channels_beside_other_widths_are_refused(artifact, monkeypatch):
    monkeypatch.setattr(attention_module, "prefill_form", lambda *widths: PrefillForm.ROPE_BESIDE)
    assert "query D 192" in outcome(artifact("glm-flash"), lambda ops: None)


def test_a_prolog_of_other_heads_is_refused(artifact, monkeypatch):
    monkeypatch.setattr(mla_module, "takes_prolog", lambda hidden, config: True)
    with emulate.use_rules(wide=False), pytest.raises(emulate.RefusedError, match="npu_mla_prolog_v3: weight_uk"):
        harness.generate(
            artifact("prolog-but-heads"), harness.make("ascend", torch.bfloat16), lengths=LENGTHS, new_tokens=NEW_TOKENS
        )
