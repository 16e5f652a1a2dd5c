"""vLLM 0.23.0 with vLLM-Ascend 0.23.0 loads our artifacts; see engine_rig/conformance.py for what is compared."""

from __future__ import annotations

import pytest
from engine_rig import shims

from npuq.errors import ArtifactError

shims.install("vllm-ascend")

from engine_rig import parameter_lists, rotary  # noqa: E402
from engine_rig import vllm_ascend_engine as engine  # noqa: E402
from engine_rig.conformance import ConformanceError, compare, load  # noqa: E402
from engine_rig.corruption import corrupt, corruptions, mtp_corruptions, static_corruptions  # noqa: E402

SEEN = (ConformanceError, ArtifactError, ValueError, KeyError, AssertionError, RuntimeError, NotImplementedError)
# Quantized linears of each model: attention and MLP of each layer, a layer's experts counted once.
LINEARS = {"example": 23, "v2-lite": 11, "v3-mtp": 11, "v3-static": 11, "kimi": 11}


@pytest.mark.parametrize("name", LINEARS)
def test_detection(artifact, name):
    assert engine.detect(artifact(name)) == "ascend"


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["v2-lite", "v3-mtp", "v3-static", "kimi"])
def test_tensor_parallel(artifact, name, tp):
    assert compare(load(engine, artifact(name), tp)) == LINEARS[name]


@pytest.mark.parametrize("tp", [1, 2])
def test_shipped_example(artifact, tp):
    """Its experts are 128 wide: two ranks are the most that the NPU's W4A8 matmul can share them between."""
    assert compare(load(engine, artifact("example"), tp)) == LINEARS["example"]


@pytest.mark.parametrize("ranks", [2, 16])
@pytest.mark.parametrize("name", ["v2-lite", "v3-mtp", "kimi"])
def test_expert_parallel(artifact, name, ranks):
    assert compare(load(engine, artifact(name), ranks, ep=ranks)) == LINEARS[name]


@pytest.mark.parametrize(
    ("name", "tp", "ep"), [("example", 1, 1), ("example", 2, 2), ("v3-mtp", 4, 1), ("v3-mtp", 4, 4)]
)
def test_mtp_draft(artifact, name, tp, ep):
    assert compare(load(engine, artifact(name), tp, ep, mtp=True)) == 6


def test_more_than_16_ranks_are_refused(artifact):
    """The engine's own guard, for W4A8 experts without expert parallelism."""
    with pytest.raises(ValueError, match="tp>16"):
        engine.moe_scheme(artifact("v3-mtp"), 32)


@pytest.mark.parametrize(
    ("what", "how"), static_corruptions(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_corruption_of_static_linears_is_seen(artifact, tmp_path, what, how):
    broken = corrupt(artifact("v3-static"), tmp_path / "broken", how)
    with pytest.raises(SEEN):
        compare(load(engine, broken, 1))


@pytest.mark.parametrize(("what", "how"), mtp_corruptions(), ids=lambda value: value if isinstance(value, str) else "")
def test_corruption_of_the_mtp_draft_is_seen(artifact, tmp_path, what, how):
    broken = corrupt(artifact("v3-mtp"), tmp_path / "broken", how)
    with pytest.raises(SEEN):
        compare(load(engine, broken, 1, mtp=True))


@pytest.mark.parametrize(("what", "how"), corruptions(), ids=lambda value: value if isinstance(value, str) else "")
def test_corruption_is_seen(artifact, tmp_path, what, how):
    broken = corrupt(artifact("v3-mtp"), tmp_path / "broken", how)
    with pytest.raises(SEEN):
        compare(load(engine, broken, 1))


@pytest.mark.parametrize(
    ("name", "mtp"), [("v2-lite", False), ("v3-mtp", False), ("v3-mtp", True), ("v3-static", False)]
)
def test_the_list_of_needed_tensors(artifact, name, mtp):
    parameter_lists.check_needed("vllm-ascend", engine, artifact(name), mtp)


@pytest.mark.parametrize("tensor", parameter_lists.SURPLUS)
def test_tensors_without_a_parameter(artifact, tensor):
    parameter_lists.check_surplus("vllm-ascend", engine, artifact("v3-mtp"), tensor)


@pytest.mark.parametrize("key", parameter_lists.VARIATIONS)
def test_what_is_said_of_an_artifact_is_what_happens(artifact, tmp_path, key):
    parameter_lists.check_variation("vllm-ascend", engine, artifact, tmp_path / "varied", key)


@pytest.mark.parametrize("key", rotary.ROPES)
def test_rotary_tables(artifact, tmp_path, key):
    rotary.check_rope("vllm-ascend", engine, artifact("v3-mtp"), tmp_path / "rope", key)
