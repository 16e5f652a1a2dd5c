"""A checkpoint whose model_type npuq does not know: recognized by its tensors, converted with --as, never guessed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import npuq
import npuq.runtime
from npuq.convert import convert_checkpoint
from npuq.errors import CheckpointError, ConversionError, UnknownModelError
from npuq.models.recognition import unknown_model

Write = Callable[..., Path]
NEW = {"model_type": "new_moe", "architectures": ["NewMoeForCausalLM"], "auto_map": {"AutoConfig": "new.Config"}}


class Shape:
    def __init__(self, *shape: int):
        self.shape = shape


def refused(source: Path) -> UnknownModelError:
    with pytest.raises(UnknownModelError) as error:
        convert_checkpoint(source, source.parent / "out", dry_run=True)
    assert "\n" not in str(error.value)
    return error.value


def as_another_tools(artifact: Path) -> Path:
    """The artifact without npuq's own folder, and with a model_type that npuq does not know."""
    shutil.rmtree(artifact / "npuq")
    raw = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps(raw | NEW))
    return artifact


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("v3", {}, ["deepseek_v3", "glm4_moe_lite", "kimi_k2"]),
        ("v3", {"routed_scaling_factor": 1.8, "n_group": 1}, ["glm4_moe_lite", "deepseek_v3", "kimi_k2"]),
        ("v3", {"architectures": ["Glm4MoeLiteForCausalLM"]}, ["glm4_moe_lite", "deepseek_v3", "kimi_k2"]),
        ("v2lite", {}, ["deepseek_v2"]),
    ],
)  # fmt: skip
def test_every_family_with_these_tensors_is_named_the_likeliest_first(
    make_checkpoint: Write, family: str, changes: dict[str, Any], expected: list[str]
) -> None:
    error = refused(make_checkpoint(family=family, config={**NEW, **changes}))
    assert error.details["looks_like"] == expected
    assert f"'new_moe' is unknown; it looks like {expected[0]}" in str(error)
    assert str(error).endswith(f"name it with --as {expected[0]}")
    assert all(name in str(error) for name in expected)


def test_all_forms_of_weights_are_compared(make_checkpoint: Write, tmp_path: Path) -> None:
    fp8 = make_checkpoint(fp8_block=16, config=NEW)
    assert refused(fp8).details["looks_like"][0] == "deepseek_v3"
    convert_checkpoint(fp8, tmp_path / "artifact", family="deepseek_v3", method="minmax")
    theirs = as_another_tools(tmp_path / "artifact")
    assert refused(theirs).details["looks_like"][0] == "deepseek_v3"


def test_tied_embeddings_and_absent_mtp_layers_are_no_difference(make_checkpoint: Write) -> None:
    def tie(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    error = refused(make_checkpoint(config={**NEW, "tie_word_embeddings": True}, edit=tie))
    assert error.details["looks_like"][0] == "deepseek_v3"


def test_the_first_difference_from_the_nearest_family_is_named(make_checkpoint: Write, tmp_path: Path) -> None:
    def missing(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]

    def added(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.sinks"] = torch.zeros(2)

    def reshaped(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(64, 99)

    differences = {
        missing: "tensor 'model.layers.1.mlp.experts.2.up_proj.weight' is missing",
        added: "that family has no tensor 'model.layers.1.self_attn.sinks'",
        reshaped: "tensor 'model.layers.1.self_attn.o_proj.weight' has shape [64, 99], but config.json",
    }
    for edit, difference in differences.items():
        error = refused(make_checkpoint(tmp_path / edit.__name__, edit=edit, config=NEW))
        assert error.details["looks_like"] == []
        assert "npuq knows deepseek_v2, deepseek_v3" in str(error)
        assert f"it is no deepseek_v3, the nearest: {difference}" in str(error), error


def test_a_config_without_a_key_says_which(make_checkpoint: Write) -> None:
    source = make_checkpoint(config=NEW)
    raw = json.loads((source / "config.json").read_text())
    del raw["kv_lora_rank"]
    (source / "config.json").write_text(json.dumps(raw))
    assert "the nearest: config.json: kv_lora_rank is missing" in str(refused(source))
    with pytest.raises(CheckpointError, match="kv_lora_rank is missing"):
        convert_checkpoint(source, source.parent / "out", family="deepseek_v3")


def test_another_architecture_is_like_no_family() -> None:
    weights = {f"transformer.h.{layer}.attn.c_attn.weight": Shape(4, 4) for layer in range(9)}
    error = unknown_model({"model_type": "gpt2"}, weights)
    assert str(error).endswith("of their tensors this has 0 of 9")
    assert unknown_model({}, {}).details == {"looks_like": []}


@pytest.mark.parametrize(
    "value", ["\x1b[2Jx", "x" * 10**6, None, 7, ["deepseek_v3"], {"a": 1}, 10**5000, "\ud800"], ids=range(8)
)
def test_hostile_types_make_one_short_line(value: object) -> None:
    weights = {"\x1b[2J" + "y" * 10**6: Shape(2), "model.norm.weight": Shape(3)}
    raw = {"model_type": value, "architectures": value, "n_group": value, "rms_norm_eps": value, "hidden_size": 3}
    message = str(unknown_model(raw, weights))
    assert len(message) < 500 and message.isascii() and message.isprintable()


def test_names_are_compared_in_linear_time() -> None:
    """Twice as many tensors of no family take about twice as long; and no number of layers is enumerated for it."""
    raw = {**NEW, "num_hidden_layers": 1000, "n_routed_experts": 200}
    weights = {f"model.layers.{n}.mlp.experts.{n}.up_proj.weight": Shape(1, 1) for n in range(200_000)}
    assert "it is no " in str(unknown_model(raw, weights))


def test_the_artifact_is_that_of_the_family(make_checkpoint: Write, tmp_path: Path) -> None:
    """Every byte but the identity's: config.json has the family's model_type, so that no loader needs the option."""
    known, new = make_checkpoint(tmp_path / "known"), make_checkpoint(tmp_path / "new", config=NEW)
    options: dict[str, Any] = {"method": "rotate+mse", "max_shard_size": 60_000}
    convert_checkpoint(known, tmp_path / "a", **options)
    summary = convert_checkpoint(new, tmp_path / "b", family="deepseek_v3", **options)
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()} for name in "ab")
    assert {name for name in a | b if a.get(name) != b.get(name)} == {"manifest.json", "README.md"}
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("deepseek_v3", ["DeepseekV3ForCausalLM"])
    assert "auto_map" not in config
    (note,) = [note for note in summary.notes if "'new_moe'" in note]
    assert "['NewMoeForCausalLM'], and is read as deepseek_v3" in note and "no auto_map" in note
    manifest = json.loads((tmp_path / "b/npuq/manifest.json").read_text())
    assert (manifest["source"]["model_type"], manifest["architecture"]["model_type"]) == ("new_moe", "deepseek_v3")
    assert "model_type" not in json.loads((tmp_path / "a/npuq/manifest.json").read_text())["source"]


def test_no_later_command_needs_the_option(make_checkpoint: Write, tmp_path: Path) -> None:
    source = make_checkpoint(
        config={**NEW, "tie_word_embeddings": True, "qk_rope_head_dim": 16},
        edit=lambda each: each.pop("lm_head.weight"),
    )
    out = tmp_path / "out"
    convert_checkpoint(source, out, family="deepseek_v3", method="rotate+minmax")
    assert npuq.verify(out, source=source).ok
    assert npuq.inspect(out).model_type == "deepseek_v3"
    inspection = npuq.inspect(source, family="deepseek_v3")
    assert (inspection.model_type, inspection.stated_model_type) == ("deepseek_v3", "new_moe")
    tokens = [[1, 2, 3, 4]]
    ours = next(npuq.runtime.load(out, "reference").logits(tokens))
    theirs = next(npuq.runtime.load(source, "reference", family="deepseek_v3").logits(tokens))
    assert torch.nn.functional.cosine_similarity(ours.float(), theirs.float(), dim=-1).min() > 0.9
    with pytest.raises(UnknownModelError, match="looks like deepseek_v3"):
        npuq.runtime.load(source, "reference")
    with pytest.raises(UnknownModelError, match="looks like deepseek_v3"):
        npuq.inspect(source)


def test_verify_and_report_read_another_tools_artifact(
    make_checkpoint: Write, npuq: Callable[..., Any], tmp_path: Path
) -> None:
    """With its source, and with what an engine would read: config.json as that of the family."""
    source = make_checkpoint(config=NEW)
    convert_checkpoint(source, tmp_path / "artifact", family="deepseek_v3", method="minmax")
    theirs = as_another_tools(tmp_path / "artifact")
    checks: tuple[Any, ...] = ("verify", theirs, "--source", source, "--engine", "vllm-ascend", "--json")
    assert npuq(*checks).status == 1
    done = npuq(*checks, "--as", "deepseek_v3")
    verdict = json.loads(done.stdout)
    assert (done.status, verdict["problems"]) == (0, [])
    assert len(verdict["errors"]) == verdict["linears"] > 40
    done = npuq(*checks, "--as", "deepseek_v3", "--tp", 3)
    assert done.status == 1 and "attention heads cannot be shared by 3 ranks" in done.stdout
    assert npuq("report", theirs, "--json").status == 1
    done = npuq("report", theirs, "--json", "--as", "deepseek_v3")
    assert (done.status, json.loads(done.stdout)["model_type"]) == (0, "deepseek_v3")


def test_defaults_that_count_are_said(make_checkpoint: Write) -> None:
    source = make_checkpoint(config=NEW)
    raw = json.loads((source / "config.json").read_text())
    del raw["routed_scaling_factor"], raw["topk_group"]
    (source / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="topk_group 4"):
        convert_checkpoint(source, source.parent / "out", family="deepseek_v3", dry_run=True)
    summary = convert_checkpoint(source, source.parent / "out", family="glm4_moe_lite", dry_run=True)
    (note,) = [note for note in summary.notes if "leaves out" in note]
    assert note.endswith("defaults of glm4_moe_lite count: routed_scaling_factor 1.8, topk_group 1")


def test_the_option_is_for_unknown_types_alone(make_checkpoint: Write, tmp_path: Path) -> None:
    source = make_checkpoint()
    with pytest.raises(
        CheckpointError, match="model_type is deepseek_v3, which npuq reads as it is: leave --as kimi_k2"
    ):
        convert_checkpoint(source, tmp_path / "out", family="kimi_k2")
    with pytest.raises(CheckpointError, match="cannot read it as 'gpt2'; npuq knows"):
        convert_checkpoint(source, tmp_path / "out", family="gpt2")
    # Where it says what config.json says, it changes nothing.
    convert_checkpoint(source, tmp_path / "out", family="deepseek_v3", method="minmax")
    assert convert_checkpoint(source, tmp_path / "out", method="minmax").status == "finished"


def test_an_unfinished_conversion_continues_only_as_the_same_family(make_checkpoint: Write, tmp_path: Path) -> None:
    source = make_checkpoint(config=NEW)
    convert_checkpoint(source, tmp_path / "out", family="deepseek_v3", method="minmax")
    with pytest.raises(ConversionError, match="another family \\(deepseek_v3 there, kimi_k2 now\\)"):
        convert_checkpoint(source, tmp_path / "out", family="kimi_k2", method="minmax")


def test_a_dry_run_says_it_as_json(make_checkpoint: Write, npuq: Callable[..., Any], tmp_path: Path) -> None:
    source = make_checkpoint(config=NEW)
    done = npuq("convert", source, tmp_path / "out", "--dry-run", "--json")
    assert done.status == 1
    error = json.loads(done.stdout)["error"]
    assert (error["type"], error["looks_like"][0]) == ("UnknownModelError", "deepseek_v3")
    assert not (tmp_path / "out").exists()
    done = npuq("convert", source, tmp_path / "out", "--dry-run", "--json", "--as", "deepseek_v3")
    assert done.status == 0
    assert any("'new_moe'" in note for note in json.loads(done.stdout)["notes"])
    done = npuq("convert", source, tmp_path / "out", "--as", "gpt2")
    assert done.status == 2 and "'gpt2' is no family; npuq knows" in done.stderr
