"""`npuq verify --engine`: the rules agree with what the engines were seen to do, and the command tells of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine_rig.models import CONFIGS, write_artifact

from npuq.engines.placement import ENGINES, check_placement
from npuq.errors import ArtifactError, CheckpointError


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 heads, 16 experts of 1024 channels."""
    return write_artifact("v3-mtp", tmp_path_factory.mktemp("placement"))


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("engine", ENGINES)
def test_expert_parallel_is_fine(artifact, engine, tp):
    assert check_placement(artifact, engine, tp, True) == ()


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_vllm_ascend_slices_experts(artifact, tp):
    assert check_placement(artifact, "vllm-ascend", tp, False) == ()


@pytest.mark.parametrize("tp", [2, 16])
def test_sglang_sliced_experts_are_wrong(artifact, tp):
    (problem,) = check_placement(artifact, "sglang", tp, False)
    assert problem.startswith("sglang 0.5.23: ") and "scale_bias" in problem and "--ep" in problem
    assert check_placement(artifact, "sglang", 1, False) == ()


def edited(artifact: Path, folder: Path, **changes: int) -> Path:
    """Only what the check reads: config.json with changes, and the description."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["v3-mtp"] | changes))
    name = "quant_model_description.json"
    (folder / name).write_bytes((artifact / name).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("changes", "tp", "ep", "words"),
    [
        ({}, 3, True, "16 attention heads"),
        ({"n_routed_experts": 24}, 16, True, "24 routed experts"),
        ({"intermediate_size": 1000}, 16, True, "1000 channels of dense MLPs"),
        ({"moe_intermediate_size": 1032}, 16, True, "1032 of shared experts"),
        ({"moe_intermediate_size": 512}, 16, False, "512/16 inputs"),
        ({"num_attention_heads": 32, "moe_intermediate_size": 2048}, 32, False, "16 partial sums"),
    ],
)
def test_each_rule(artifact, tmp_path, changes, tp, ep, words):
    problems = check_placement(edited(artifact, tmp_path / "edited", **changes), "vllm-ascend", tp, ep)
    assert any(words in problem for problem in problems), problems
    assert all(problem.startswith("vllm-ascend 0.23.0 and 0.30.0rc2: ") for problem in problems)


@pytest.fixture(scope="module")
def glm_flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 heads, 20 experts of 1280 channels, an MTP layer."""
    return write_artifact("glm-flash", tmp_path_factory.mktemp("glm-flash"))


@pytest.mark.parametrize("tp", [1, 2, 4, 5])
@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_heads(glm_flash, engine, tp):
    assert check_placement(glm_flash, engine, tp, True) == ()


@pytest.mark.parametrize("tp", [3, 8, 16, 32])
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_that_cannot_share_twenty_heads(glm_flash, engine, tp):
    problems = check_placement(glm_flash, engine, tp, True)
    assert any("20 attention heads" in problem and "divides 20" in problem for problem in problems), problems


def test_five_ranks_cannot_share_the_shared_experts_of_glm_flash(glm_flash, tmp_path):
    """As published: 64 experts of 1536 channels. Five ranks divide the heads alone."""
    folder = tmp_path / "published"
    folder.mkdir()
    config = json.loads((glm_flash / "config.json").read_text())
    sizes = {"n_routed_experts": 64, "moe_intermediate_size": 1536, "intermediate_size": 10240}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    description = json.loads((glm_flash / "quant_model_description.json").read_text())
    experts = {name: kind for name, kind in description.items() if ".mlp.experts.0." in name}
    description |= {
        name.replace(".experts.0.", f".experts.{number}."): kind
        for name, kind in experts.items()
        for number in range(20, 64)
    }
    (folder / "quant_model_description.json").write_text(json.dumps(description))
    for engine in ENGINES:
        assert [check_placement(folder, engine, tp, True) for tp in (1, 2, 4)] == [(), (), ()]
        problems = check_placement(folder, engine, 5, True)
        assert any("1536 of shared experts" in problem for problem in problems)
        assert any("64 routed experts" in problem for problem in problems)


def test_an_engine_without_a_draft_is_a_note(glm_flash):
    """The model itself runs: verification succeeds."""
    done = command(glm_flash, "--engine", "sglang")
    assert done.returncode == 0, done.stdout + done.stderr
    (note,) = [line for line in done.stdout.splitlines() if "MTP draft" in line]
    assert note.startswith("note: sglang 0.5.23: ") and "without speculation" in note


def test_a_release_that_looks_for_indexers_everywhere_is_a_note(tmp_path):
    """Of GLM-5, whose layers all have one, nothing is said."""
    notes = {}
    for name in ("glm-5", "glm-5.2"):
        done = command(write_artifact(name, tmp_path), "--engine", "vllm-ascend")
        assert done.returncode == 0, done.stdout + done.stderr
        notes[name] = [line for line in done.stdout.splitlines() if "vllm-ascend 0.23.0: " in line]
    assert notes["glm-5"] == []
    (note,) = notes["glm-5.2"]
    assert "1 layer(s)" in note and "model.layers.2.self_attn.indexer.wq_b.weight" in note


def test_float_experts(artifact, tmp_path):
    folder = edited(artifact, tmp_path / "float")
    path = folder / "quant_model_description.json"
    entries = {
        name: "FLOAT" if ".mlp.experts." in name else kind
        for name, kind in json.loads(path.read_text()).items()
        if ".mlp.experts." not in name or name.endswith(".weight")
    }
    path.write_text(json.dumps(entries))
    assert check_placement(folder, "vllm-ascend", 1, False) == ()
    (problem,) = check_placement(folder, "sglang", 1, False)
    assert "FLOAT routed experts" in problem


def test_unreadable(artifact, tmp_path):
    folder = edited(artifact, tmp_path / "unreadable")
    (folder / "quant_model_description.json").unlink()
    with pytest.raises(ArtifactError, match=r"no quant_model_description\.json"):
        check_placement(folder, "sglang", 1, False)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError):
        check_placement(folder, "sglang", 1, False)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "npuq", "verify", "--quiet", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def test_command(artifact):
    fine = command(artifact, "--engine", "sglang", "--tp", "8", "--ep")
    assert fine.returncode == 0, fine.stdout + fine.stderr
    assert "note: --engine: the requirements are those of sglang 0.5.23" in fine.stdout
    wrong = command(artifact, "--engine", "sglang", "--tp", "8", "--json")
    assert wrong.returncode == 1
    assert "sglang 0.5.23" in json.loads(wrong.stdout)["problems"][0]


def test_ranks_without_an_engine_are_a_usage_error(artifact):
    done = command(artifact, "--tp", "8")
    assert done.returncode == 2 and "--engine" in done.stderr
