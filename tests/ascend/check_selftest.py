"""`npuq doctor --selftest` as it would run on an NPU: it passes in the emulation, and a wrong operator fails it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ascend_rig import emulate, harness

from npuq.runtime.diagnostics.selftest.cases import CASES, INT8_CACHE_CASES
from npuq.runtime.diagnostics.selftest.comparison import selftest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["nz", "nd"])
def test_the_ascend_set_passes(dtype, layout):
    with emulate.use_rules(wide=dtype == torch.float32):
        results = list(selftest(harness.make("ascend", dtype, kv_layout=layout)))
    for result in results:
        print(f"{result.operator:40} {result.error} {result.message}")
    assert [result for result in results if not result.passed] == []
    # The NPU's int8 attention takes NZ pages and bfloat16.
    int8_cache = layout == "nz" and dtype != torch.float16
    left_out = set(CASES) - {result.operator for result in results}
    assert left_out == (set() if int8_cache else set(INT8_CACHE_CASES))


@pytest.mark.parametrize("paired", [False, True])
def test_what_the_trials_showed_is_told(paired):
    with emulate.use_rules(paired_scales=paired, refuses_fused_experts=paired):
        results = list(selftest(harness.make("ascend", torch.bfloat16)))
    assert all(result.passed for result in results)
    told = [(result.operator, result.findings) for result in results if result.findings]
    way = "in steps, not by the fused operator" if paired else "by npu_kv_rmsnorm_rope_cache"
    operators = "two operators" if paired else "one operator"
    assert told == [
        (
            "gate and up of experts, activated",
            (f"gate and up of the experts and their activation take {operators}",),
        ),
        ("int8 cache write and read", (f"int8 latents are written {way}",)),
    ]


@pytest.mark.parametrize(
    "part,method,case",
    [
        ("norms", "swiglu", "swiglu"),
        ("norms", "dynamic_quant", "linear W8A8"),
        ("norms", "dequant_swiglu_quant", "dequant_swiglu_quant"),
        ("norms", "dynamic_quant_by", "linear W8A8, divided"),
        ("norms", "swiglu_float32", "dequant_swiglu_quant, divided"),
        ("rotary", "interleave_rope", "rope, cache write and read"),
        ("rotary", "rotary_mul", "index keys"),
        ("sparse", "lightning_indexer", "lightning indexer"),
        ("sparse", "sparse_flash_attention", "attention to selected tokens"),
    ],
)
def test_a_wrong_operator_fails(part, method, case):
    ops = harness.make("ascend", torch.bfloat16)
    right = getattr(getattr(ops, part), method)

    def wrong(x: torch.Tensor, *args: Any) -> Any:
        return right(x.flip(-1), *args)

    setattr(getattr(ops, part), method, wrong)
    passed = {}
    for result in selftest(ops):
        passed[result.operator] = result.passed
        if result.operator == case:  # those behind it would tell nothing more
            break
    assert passed["rms_norm, add_rms_norm"] and not passed[case]


def test_an_operator_that_raises_is_reported_with_its_message():
    ops = harness.make("ascend", torch.bfloat16)

    def broken(*args: Any) -> Any:
        raise RuntimeError("aclnnSwiGlu failed\nerror code 507011")

    ops.norms.swiglu = broken
    result = next(result for result in selftest(ops) if result.operator == "swiglu")
    assert not result.passed and result.message == "aclnnSwiGlu failed error code 507011"
