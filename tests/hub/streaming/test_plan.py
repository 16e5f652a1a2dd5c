"""The memory plan of a repository: headers alone are fetched."""

from __future__ import annotations

import json
from pathlib import Path

from loopback import LoopbackHub
from streaming import SOURCE
from support import files_of, npuq_run

import npuq


def test_headers_of_a_checkpoint_are_enough(hub: LoopbackHub, source: str) -> None:
    done = npuq_run("doctor", "--plan", SOURCE, "--devices", 2, "--memory", "1GB", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["stored"], plan["recommended"]) == ("as converted by recipe w4a8", "ep=2,tp=2")
    asked = hub.requests(r"^GET .*\.safetensors$")
    assert len(asked) == 3 and all(seen.sent <= 1 << 20 for seen in asked)


def test_an_artifact_is_planned_as_it_is_stored(hub: LoopbackHub, example_fp8: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    npuq.convert_checkpoint(example_fp8, artifact, recipe="w8a8", method="minmax")
    hub.state.put("someone/w8a8", files_of(artifact))
    plans = []
    for model in ("someone/w8a8", artifact):
        done = npuq_run("doctor", "--plan", model, "--devices", 2, "--memory", "1GB", "--json")
        assert done.returncode == 0, done.stderr
        plans.append(json.loads(done.stdout))
    remote, local = plans
    assert remote["stored"] == "as it is stored"
    assert {**remote, "path": None} == {**local, "path": None}


def test_a_repository_that_is_not_there(hub: LoopbackHub) -> None:
    done = npuq_run("doctor", "--plan", "someone/nothing")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "someone/nothing" in done.stderr and "Traceback" not in done.stderr


def test_generate_refuses_an_unknown_model_before_it_fetches_weights(hub: LoopbackHub, example_fp8: Path) -> None:
    files = files_of(example_fp8)
    config = json.loads(files["config.json"])
    hub.state.put("someone/new", {**files, "config.json": json.dumps({**config, "model_type": "brand_new"}).encode()})
    done = npuq_run("generate", "someone/new", "--prompt", "Call me")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "model_type 'brand_new' is unknown" in done.stderr and "--as FAMILY" in done.stderr
    assert hub.requests(r"^GET .*\.safetensors$") == []
    named = npuq_run("generate", "someone/new", "--prompt", "Call me", "--as", "deepseek_v3", "--max-new-tokens", 1)
    assert named.returncode == 0, named.stderr
