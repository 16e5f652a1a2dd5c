"""SGLang 0.5.23 loads our artifacts; see engine_rig/conformance.py for what is compared."""

from __future__ import annotations

import pytest
from engine_rig import shims

shims.install("sglang")

from engine_rig import sglang_engine as engine  # noqa: E402
from engine_rig.common_checks import CommonChecks  # noqa: E402
from engine_rig.conformance import ConformanceError, compare, load, quantized_linears  # noqa: E402
from engine_rig.corruption import corrupt  # noqa: E402
from engine_rig.models import ARTIFACTS, CONFIGS, STATIC, V4, placements  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402

DRAFTS = ("v3-mtp", "v32", "glm-5", "glm-5.2", V4)


class TestAsTheOtherEngine(CommonChecks):
    name, detected, engine = "sglang", "modelslim", engine


@pytest.mark.parametrize("name", [name for name in ARTIFACTS if name != "qwen3-dense"])
def test_one_rank(artifact, name):
    assert compare(load(engine, artifact(name), 1)) == quantized_linears(artifact(name))


@pytest.mark.parametrize(("name", "ranks"), placements(*CONFIGS, STATIC, ranks=(2, 4, 5, 8, 16)))
def test_expert_parallel(artifact, name, ranks):
    """Tensor-parallel attention and shared experts, whole routed experts spread over the ranks."""
    assert compare(load(engine, artifact(name), ranks, ep=ranks)) == quantized_linears(artifact(name))


@pytest.mark.parametrize("tp", [2, 16])
def test_tensor_parallel_experts_add_the_bias_of_all_ranks_on_each(artifact, tp):
    """A fault of SGLang 0.5.23: each rank adds all 16 partial sums of down_proj's scale_bias, not its own."""
    with pytest.raises(ConformanceError, match=r"experts\.w2: differs"):
        compare(load(engine, artifact("v3-mtp"), tp))


@pytest.mark.parametrize(("name", "ranks"), [("example", 1), ("example", 2), *((name, 4) for name in DRAFTS)])
def test_mtp_draft(artifact, name, ranks):
    loaded = load(engine, artifact(name), ranks, ep=ranks, mtp=True)
    assert compare(loaded) == quantized_linears(artifact(name), mtp=True)


def test_the_draft_of_glm_flash_finds_no_description(artifact):
    """A fault of SGLang 0.5.23: its class looks for the layer as model.decoder, which no checkpoint calls it."""
    with pytest.raises(ValueError, match=r"Missing ModelSlim MoE quantization description for layer model\.decoder"):
        load(engine, artifact("glm-flash"), 1, mtp=True)


def test_float_experts_are_refused(artifact, tmp_path):
    def tag(tensors, tags):
        tags |= {name: "FLOAT" for name in tags if ".mlp.experts." in name}

    with pytest.raises(ValueError, match="Unsupported ModelSlim MoE"):
        load(engine, corrupt(artifact("v3-mtp"), tmp_path / "float", tag), 1)


def test_deepseek_v4_does_not_load_with_wq_a_and_wkv_fused(artifact):
    """The default, for GPUs: the fused linear has no name in a description, and no place for int8."""
    with envs.SGLANG_OPT_FUSE_WQA_WKV.override(True), pytest.raises(AssertionError, match="dtype"):
        load(engine, artifact(V4), 1)
