"""vLLM with a release of vLLM-Ascend loads our artifacts; see engine_rig/conformance.py for what is compared."""

from __future__ import annotations

import pytest
from engine_rig import shims

shims.install("vllm-ascend")

from engine_rig import vllm_ascend_engine as engine  # noqa: E402
from engine_rig.common_checks import CommonChecks  # noqa: E402
from engine_rig.conformance import compare, load, quantized_linears  # noqa: E402
from engine_rig.models import CONFIGS, STATIC, WITH_MTP, placements  # noqa: E402

LOADABLE = [name for name in CONFIGS if name not in engine.release.UNLOADABLE]


class TestAsTheOtherEngine(CommonChecks):
    name, detected, engine = "vllm-ascend", "ascend", engine


@pytest.mark.parametrize(("name", "tp"), placements(*LOADABLE, STATIC))
def test_tensor_parallel(artifact, name, tp):
    assert compare(load(engine, artifact(name), tp)) == quantized_linears(artifact(name))


@pytest.mark.parametrize("tp", [1, 2])
def test_shipped_example(artifact, tp):
    """Its experts are 128 wide: two ranks are the most that the NPU's W4A8 matmul can share them between."""
    assert compare(load(engine, artifact("example"), tp)) == quantized_linears(artifact("example"))


@pytest.mark.parametrize(("name", "ranks"), placements(*LOADABLE, ranks=(2, 4, 5, 16)))
def test_expert_parallel(artifact, name, ranks):
    assert compare(load(engine, artifact(name), ranks, ep=ranks)) == quantized_linears(artifact(name))


@pytest.mark.parametrize(
    ("name", "tp", "ep"),
    [("example", 1, 1), ("example", 2, 2), *((name, 4, ep) for name in LOADABLE if name in WITH_MTP for ep in (1, 4))],
)
def test_mtp_draft(artifact, name, tp, ep):
    assert compare(load(engine, artifact(name), tp, ep, mtp=True)) == quantized_linears(artifact(name), mtp=True)


@pytest.mark.parametrize("name", engine.release.UNLOADABLE)
def test_layers_that_share_a_selection_end_loading(artifact, name):
    """vLLM 0.23.0 builds an indexer in every layer."""
    with pytest.raises(KeyError, match=r"layers\.2\.self_attn\.indexer\.wq_b"):
        load(engine, artifact(name), 1)


def test_more_than_16_ranks_are_refused(artifact):
    """The engine's own guard, for W4A8 experts without expert parallelism."""
    with pytest.raises(ValueError, match="tp>16"):
        engine.moe_scheme(artifact("v3-mtp"), 32)
