"""vLLM 0.23.0 with vLLM-Ascend 0.23.0 loads our artifacts; see engine_rig/conformance.py for what is compared."""

from __future__ import annotations

from itertools import product

import pytest
from engine_rig import shims

shims.install("vllm-ascend")

from engine_rig import vllm_ascend_engine as engine  # noqa: E402
from engine_rig.common_checks import LINEARS, CommonChecks  # noqa: E402
from engine_rig.conformance import compare, load  # noqa: E402


class TestAsTheOtherEngine(CommonChecks):
    name, detected, engine = "vllm-ascend", "ascend", engine


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        *product(("v2-lite", "v3-mtp", "v3-static", "kimi"), (1, 2, 4, 8, 16)),
        *product(("glm-flash",), (1, 2, 4)),
    ],
)
def test_tensor_parallel(artifact, name, tp):
    assert compare(load(engine, artifact(name), tp)) == LINEARS[name]


@pytest.mark.parametrize("tp", [1, 2])
def test_shipped_example(artifact, tp):
    """Its experts are 128 wide: two ranks are the most that the NPU's W4A8 matmul can share them between."""
    assert compare(load(engine, artifact("example"), tp)) == LINEARS["example"]


@pytest.mark.parametrize(
    ("name", "ranks"), [*product(("v2-lite", "v3-mtp", "kimi"), (2, 16)), ("glm-flash", 2), ("glm-flash", 5)]
)
def test_expert_parallel(artifact, name, ranks):
    assert compare(load(engine, artifact(name), ranks, ep=ranks)) == LINEARS[name]


@pytest.mark.parametrize(
    ("name", "tp", "ep"),
    [
        ("example", 1, 1),
        ("example", 2, 2),
        ("v3-mtp", 4, 1),
        ("v3-mtp", 4, 4),
        ("glm-flash", 1, 1),
        ("glm-flash", 5, 5),
    ],
)
def test_mtp_draft(artifact, name, tp, ep):
    assert compare(load(engine, artifact(name), tp, ep, mtp=True)) == 6


def test_more_than_16_ranks_are_refused(artifact):
    """The engine's own guard, for W4A8 experts without expert parallelism."""
    with pytest.raises(ValueError, match="tp>16"):
        engine.moe_scheme(artifact("v3-mtp"), 32)
