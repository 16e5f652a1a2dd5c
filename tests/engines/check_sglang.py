"""SGLang 0.5.23 loads our artifacts; see engine_rig/conformance.py for what is compared."""

from __future__ import annotations

import pytest
from engine_rig import shims

from npuq.errors import ArtifactError

shims.install("sglang")

from engine_rig import parameter_lists, rotary  # noqa: E402
from engine_rig import sglang_engine as engine  # noqa: E402
from engine_rig.conformance import ConformanceError, compare, load  # noqa: E402
from engine_rig.corruption import corrupt, corruptions, mtp_corruptions, static_corruptions  # noqa: E402

SEEN = (ConformanceError, ArtifactError, ValueError, KeyError, AssertionError, RuntimeError, NotImplementedError)
# Quantized linears of each model: attention and MLP of each layer, a layer's experts counted once.
LINEARS = {"example": 23, "v2-lite": 11, "v3-mtp": 11, "v3-static": 11, "kimi": 11}


@pytest.mark.parametrize("name", LINEARS)
def test_detection(artifact, name):
    assert engine.detect(artifact(name)) == "modelslim"


@pytest.mark.parametrize("name", LINEARS)
def test_one_rank(artifact, name):
    assert compare(load(engine, artifact(name), 1)) == LINEARS[name]


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("name", ["v2-lite", "v3-mtp", "v3-static", "kimi"])
def test_expert_parallel(artifact, name, ranks):
    """Tensor-parallel attention and shared experts, whole routed experts spread over the ranks."""
    assert compare(load(engine, artifact(name), ranks, ep=ranks)) == LINEARS[name]


@pytest.mark.parametrize("tp", [2, 16])
def test_tensor_parallel_experts_add_the_bias_of_all_ranks_on_each(artifact, tp):
    """A fault of SGLang 0.5.23: each rank adds all 16 partial sums of down_proj's scale_bias, not its own."""
    with pytest.raises(ConformanceError, match=r"experts\.w2: differs"):
        compare(load(engine, artifact("v3-mtp"), tp))


@pytest.mark.parametrize(("name", "ranks"), [("example", 1), ("example", 2), ("v3-mtp", 4)])
def test_mtp_draft(artifact, name, ranks):
    assert compare(load(engine, artifact(name), ranks, ep=ranks, mtp=True)) == 6


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


def test_float_experts_are_refused(artifact, tmp_path):
    def tag(tensors, tags):
        tags |= {name: "FLOAT" for name in tags if ".mlp.experts." in name}

    with pytest.raises(ValueError, match="Unsupported ModelSlim MoE"):
        load(engine, corrupt(artifact("v3-mtp"), tmp_path / "float", tag), 1)


@pytest.mark.parametrize(
    ("name", "mtp"), [("v2-lite", False), ("v3-mtp", False), ("v3-mtp", True), ("v3-static", False)]
)
def test_the_list_of_needed_tensors(artifact, name, mtp):
    parameter_lists.check_needed("sglang", engine, artifact(name), mtp)


@pytest.mark.parametrize("tensor", parameter_lists.SURPLUS)
def test_tensors_without_a_parameter(artifact, tensor):
    parameter_lists.check_surplus("sglang", engine, artifact("v3-mtp"), tensor)


@pytest.mark.parametrize("key", parameter_lists.VARIATIONS)
def test_what_is_said_of_an_artifact_is_what_happens(artifact, tmp_path, key):
    parameter_lists.check_variation("sglang", engine, artifact, tmp_path / "varied", key)


@pytest.mark.parametrize("key", rotary.ROPES)
def test_rotary_tables(artifact, tmp_path, key):
    rotary.check_rope("sglang", engine, artifact("v3-mtp"), tmp_path / "rope", key)
