"""The model card says what the artifact is: how it is served, its MTP layers, its base, and the one error measure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from npuq.convert import convert_checkpoint
from npuq.engines import check_placement
from npuq.engines.serving import serving_ranks, serving_section
from npuq.errors import ConversionError
from npuq.formats.schemes import Scheme
from npuq.models.config import ModelConfig
from npuq.verification import inspect, verify

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-deepseek-v3-fp8"
V3 = {
    "num_attention_heads": 128,
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "n_group": 8,
    "topk_group": 4,
}
W4A8 = {f"model.layers.{layer}.mlp.experts.0.down_proj.weight": Scheme.W4A8 for layer in range(1, 4)}


def config(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((EXAMPLE / "config.json").read_text()) | changes)


@pytest.mark.parametrize(
    ("changes", "gigabytes", "ranks"),
    [
        (V3, 371, 8),  # DeepSeek-V3 as w4a8
        (V3, 700, 16),  # … as w8a8
        (V3, 1400, 32),
        ({}, 0.02, 1),
        ({}, 60, 2),  # four heads, sixteen experts
        ({}, 500, None),
        ({"num_attention_heads": 3}, 60, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 0.02, None),
    ],
)
def test_serving_ranks(changes, gigabytes, ranks):
    assert serving_ranks(config(**changes), W4A8, int(gigabytes * 1e9)) == ranks


def test_commands_for_ranks():
    text = serving_section(8, 371_000_000_000, mtp=True)
    assert "--tensor-parallel-size 8 --enable-expert-parallel" in text
    assert "--tp-size 8 --ep-size 8" in text
    assert "8 NPUs of 64 GB hold the weights, 46.4 GB each" in text
    assert '"method": "mtp"' in text
    one = serving_section(1, 10**9, mtp=False)
    assert not re.search(r"serve .*--tensor-parallel|launch_server .*--tp-size", one) and "mtp" not in one
    assert "--engine vllm-ascend --tp N --ep" in serving_section(None, 10**9, mtp=False)


def front_matter(artifact: Path) -> dict[str, object]:
    return yaml.safe_load((artifact / "README.md").read_text().split("---\n")[1])


def test_the_commands_in_it_are_ones_that_verify_accepts(v3_artifact):
    card = (v3_artifact / "README.md").read_text()
    assert "One NPU of 64 GB holds the weights" in card
    for engine in ("vllm-ascend", "sglang"):
        assert check_placement(v3_artifact, engine, 1, False) == ()


def test_mtp_layers_are_named_as_such(v3_artifact, make_checkpoint, tmp_path):
    assert "It keeps its multi-token-prediction layer (layer 3, from 0)." in (v3_artifact / "README.md").read_text()
    source = make_checkpoint(config={"num_nextn_predict_layers": 2})
    convert_checkpoint(source, tmp_path / "two", method="minmax")
    card = (tmp_path / "two" / "README.md").read_text()
    assert "It keeps its 2 multi-token-prediction layers (layers 3 to 4, from 0)." in card


def test_base_model_of_an_artifact_that_is_finished(make_checkpoint, tmp_path):
    """Its card may have been edited since: what is not written into it is said."""
    source, output = make_checkpoint(), tmp_path / "out"
    convert_checkpoint(source, output, method="minmax")
    for dry_run in (False, True):
        given = {"method": "minmax", "base_model": "someone/a-model", "dry_run": dry_run}
        (note,) = set(convert_checkpoint(source, output, **given).notes) - set(
            convert_checkpoint(source, output, method="minmax").notes
        )
        assert "README.md" in note and "no base_model" in note and "'base_model: someone/a-model'" in note
    card = output / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: someone/a-model\n", 1))
    assert not any("base_model" in note for note in convert_checkpoint(source, output, **given).notes)


def test_base_model_of_a_local_source(make_checkpoint, tmp_path, npuq):
    source = make_checkpoint()
    convert_checkpoint(source, tmp_path / "plain", method="minmax")
    assert "base_model" not in front_matter(tmp_path / "plain")
    done = npuq("convert", source, tmp_path / "named", "--method", "minmax", "--base-model", "someone/a-model_1.5")
    assert done.status == 0
    front = front_matter(tmp_path / "named")
    assert (front["base_model"], front["base_model_relation"]) == ("someone/a-model_1.5", "quantized")
    for wrong in ("model", "a/b/c", "../model", "a b/c", "a/\nb", ""):
        with pytest.raises(ConversionError, match="must be OWNER/NAME"):
            convert_checkpoint(source, tmp_path / "wrong", base_model=wrong)
    assert not (tmp_path / "wrong").exists()


def test_one_measure_everywhere(v3_source, v3_artifact, npuq):
    """convert, the card, inspect, the report and verify print the same number for a role, and call it weight error."""
    card = (v3_artifact / "README.md").read_text()
    shown = npuq("inspect", v3_artifact).stdout
    measured = npuq("verify", v3_artifact, "--source", v3_source).stdout
    assert "weight error |" in card and "weight error\n" in shown and "weight error  largest" in measured
    roles = [line for line in inspect(v3_artifact).lines if line.relative_error is not None]
    verdict = verify(v3_artifact, v3_source)
    assert len(roles) == len(verdict.roles) > 3
    for line in roles:
        assert line.relative_error is not None
        printed = f"{line.relative_error:.2%}"
        (row,) = [row for row in card.splitlines() if row.startswith(f"| {line.role} | {line.scheme}")]
        assert row.split(" | ")[5] == printed
        for text in (shown, measured):
            (row,) = [row for row in text.splitlines() if row.split()[:2] == [line.role, line.scheme]]
            assert printed in row.split()
        (role,) = [role for role in verdict.roles if (role.role, role.scheme) == (line.role, line.scheme)]
        assert role.relative_error == pytest.approx(line.relative_error, rel=1e-4)
        members = [error for error in verdict.errors if (error.role, error.scheme) == (line.role, line.scheme)]
        assert role.linears == len(members)
        assert role.largest_error == max(error.relative_error for error in members)
    named = verdict.as_dict()["roles"][0]
    assert set(named) == {
        "role",
        "scheme",
        "linears",
        "relative_error",
        "largest_error",
        "largest_error_tensor",
    }
