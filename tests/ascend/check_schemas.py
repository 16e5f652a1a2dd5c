"""The listing of schemas against the torch_npu that is installed, and against the calls that the runtime makes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch_npu
from ascend_rig import emulate, harness
from ascend_rig.install import TORCH_NPU
from ascend_rig.recorder import Recorder
from ascend_rig.schemas import Call, fit_table, installed_schema, misfits

from npuq.runtime.diagnostics.selftest.cases import CASES
from npuq.runtime.ops import Gating
from npuq.runtime.ops.ascend.support import OPERATORS
from npuq.runtime.ops.ascend.tuning.grouped_matmul import Expectation, MatmulShape, Tuning

LISTING = json.loads((Path(__file__).parent / "schemas.json").read_text())
CALLS = LISTING["calls"]


# Called by ranks only: ranks/check_calls.py has them.
OF_RANKS = {"npu_moe_distribute_combine_v2", "npu_moe_distribute_dispatch_v2"}


def recorded(artifact) -> dict[str, Call]:
    """The calls of generations that between them take every path of the Ascend set."""
    recorder = Recorder()
    runs = [
        ("example", {}),
        ("example-float", {"kv_layout": "nd"}),
        ("v2-lite", {}),
        ("prolog", {}),
        ("prolog-int8-cache", {}),
        ("v32", {}),
        ("glm-dsa-prolog", {}),
        ("qwen3", {}),
        ("glm4", {}),
    ]
    for name, options in runs:
        ops = harness.make("ascend", torch.bfloat16, **options)
        ops.npu.operators = recorder
        harness.generate(artifact(name), ops, lengths=(4, 45), new_tokens=2)
    ops.routing.moe_gating_top_k(torch.randn(2, 8), None, Gating(k=2, scoring="softmax", renormalize=True))
    CASES["linear W8A8, static"](ops)
    ops.products.tuning = Tuning({MatmulShape(4, 8, 256, 256, 16): Expectation.MEAN})
    CASES["grouped_matmul W4A8"](ops)
    CASES["decode attention, int8 cache"](ops)
    recorder.npu_format_cast(torch.zeros(16, 32, dtype=torch.int8), 29)  # made in ascend/weights.py, not through ops
    return dict(sorted(recorder.calls.items()))


def test_the_listing_names_every_call_the_runtime_makes(artifact):
    calls = recorded(artifact)
    print(f"\n{json.dumps(calls, indent=1)}")
    assert calls == {name: call for name, call in CALLS.items() if name not in OF_RANKS}


def test_every_operator_that_is_called_is_emulated():
    assert sorted(CALLS) == emulate.covered() == list(OPERATORS)


def test_the_listing_is_what_the_installed_torch_npu_has():
    assert {operator: installed_schema(operator) for operator in CALLS} == LISTING["versions"][torch_npu.__version__]


def test_the_table_of_versions_follows_from_the_schemas():
    assert fit_table(CALLS, LISTING["versions"], TORCH_NPU) == LISTING["misfits"]
    assert LISTING["misfits"][TORCH_NPU] == []


def test_a_schema_that_does_not_fit_is_told():
    ours = "op(Tensor x, int k, *, Tensor? bias=None, str mode='a') -> (Tensor, Tensor)"
    call = {"positional": 2, "arguments": ["x", "k", "bias", "mode"], "none": []}
    assert misfits(call, ours, ours) == []
    assert misfits(call, ours, None) == ["is missing"]
    without_bias = "op(Tensor x, int k, *, str mode='a') -> (Tensor, Tensor)"
    assert misfits(call, ours, without_bias) == ["has no argument bias"]
    tensor_only = "op(Tensor x, int k, *, Tensor bias, str mode='a') -> (Tensor, Tensor)"
    assert misfits(call, ours, tensor_only) == []
    assert misfits({**call, "none": ["bias"]}, ours, tensor_only) == ["bias is Tensor, not Optional[Tensor]"]
    other_type = "op(Tensor x, int k, *, Tensor? bias=None, int mode=0) -> (Tensor, Tensor)"
    assert misfits(call, ours, other_type) == ["mode is int, not str"]
    other_order = "op(int k, Tensor x, *, Tensor? bias=None, str mode='a') -> (Tensor, Tensor)"
    assert misfits(call, ours, other_order) == ["positional arguments are k, x"]
    needs_more = "op(Tensor x, int k, *, int size, Tensor? bias=None, str mode='a') -> (Tensor, Tensor)"
    assert misfits(call, ours, needs_more) == ["needs size"]
    returns_one = "op(Tensor x, int k, *, Tensor? bias=None, str mode='a') -> Tensor"
    assert misfits(call, ours, returns_one) == ["returns 1 values, not 2"]
