"""Artifacts of sparse models: schemes, descriptions, dtypes and configs that engines load; drafts without a head."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import add_tokenizer, convert
from safetensors.torch import load_file
from sparse_models import Sparse
from torch import Tensor

import npuq
from npuq.convert import convert_checkpoint
from npuq.engines.placement import check_placement
from npuq.errors import RecipeError
from npuq.quant.rotation import rotation

FAMILIES = ["v32", "glm5"]


def read(output: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in output.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def described(output: Path) -> dict[str, str]:
    return dict(json.loads((output / "quant_model_description.json").read_text()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fp8_block", [None, 16], ids=["bf16", "fp8"])
def test_the_indexer_of_an_artifact(family: str, fp8_block: int | None, write: Any, tmp_path: Path) -> None:
    """W8A8 where the queries' other projections are, FLOAT elsewhere, and nothing where a layer shares."""
    source = write(tmp_path / "source", family=family, fp8_block=fp8_block)
    convert_checkpoint(source, tmp_path / "out", method="minmax")
    tensors, types = read(tmp_path / "out"), described(tmp_path / "out")
    for layer in (0, 3) if family == "glm5" else (0, 2, 3):
        indexer = f"model.layers.{layer}.self_attn.indexer."
        assert {key: types[f"{indexer}wq_b.{key}"] for key in ("weight", "weight_scale", "weight_offset")} == (
            dict.fromkeys(("weight", "weight_scale", "weight_offset"), "W8A8_DYNAMIC")
        )
        assert tensors[f"{indexer}wq_b.weight"].dtype is torch.int8
        assert tensors[f"{indexer}wq_b.weight_scale"].shape == (64, 1)
        for part in ("wk.weight", "weights_proj.weight", "k_norm.weight"):
            assert types[indexer + part] == "FLOAT"
        assert tensors[f"{indexer}wk.weight"].dtype is tensors[f"{indexer}weights_proj.weight"].dtype is torch.bfloat16
        kept = torch.float32 if family == "v32" else torch.bfloat16
        assert tensors[f"{indexer}k_norm.weight"].dtype is tensors[f"{indexer}k_norm.bias"].dtype is kept
        assert f"{indexer}wk.weight_scale" not in tensors
    assert any("norm.bias" in name for name in tensors) and not any("norm.bias" in name for name in types)
    if family == "glm5":
        assert not any(".2.self_attn.indexer" in name for name in (*tensors, *types))
    verdict = npuq.verify(tmp_path / "out", source)
    assert verdict.problems == ()
    # The older release builds an indexer in every layer.
    assert all(note.startswith("vllm-ascend 0.23.0: 1 layer(s) share another") for note in verdict.notes)
    assert len(verdict.notes) == (1 if family == "glm5" else 0)
    assert all(check_placement(tmp_path / "out", engine, 1, False) == () for engine in ("vllm-ascend", "sglang"))


def test_a_description_with_a_norm_s_bias_is_a_problem(write: Any, tmp_path: Path) -> None:
    convert_checkpoint(write(tmp_path / "source", family="glm5"), tmp_path / "out", method="minmax")
    path = tmp_path / "out" / "quant_model_description.json"
    path.write_text(json.dumps(described(tmp_path / "out") | {"model.layers.0.self_attn.indexer.k_norm.bias": "FLOAT"}))
    (problem,) = (line for line in npuq.verify(tmp_path / "out").problems if "norm" in line)
    assert "k_norm.bias" in problem and "every RMS norm" in problem


def test_keys_of_the_index_stay_as_they_are(write: Any, tmp_path: Path) -> None:
    keys = {
        "index_topk_freq": 4,
        "index_skip_topk_offset": 2,
        "index_topk_pattern": None,
        "index_share_for_mtp_iteration": True,
        "indexer_rope_interleave": True,
        "head_dim": 192,
    }
    source = write(tmp_path / "source", family="glm5", config=keys)
    convert_checkpoint(source, tmp_path / "out", method="minmax")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "out"))
    assert {key: value for key, value in after.items() if key not in ("quantize", "moe_quantize", "mtp_quantize")} == (
        before
    )


def test_an_indexer_s_rope_that_engines_would_take_for_halves_is_stated(write: Any, tmp_path: Path) -> None:
    """transformers goes by the family, engines by a key that is false where it is missing."""
    for family, key in (("glm5", {"indexer_rope_interleave": True}), ("v32", {})):
        source = write(tmp_path / family, family=family, config={"indexer_rope_interleave": None})
        convert_checkpoint(source, tmp_path / f"{family}-out", method="minmax")
        config = json.loads((tmp_path / f"{family}-out" / "config.json").read_text())
        assert (config.get("indexer_rope_interleave") or False) == key.get("indexer_rope_interleave", False)


@pytest.mark.parametrize(("family", "usual"), [("glm5", True), ("v32", False)])
def test_an_indexer_s_rope_that_transformers_ignores_is_told(
    family: str, usual: bool, write: Any, tmp_path: Path
) -> None:
    """npuq and the engines go by the key, transformers by the family; a missing key says nothing else."""

    def notes(value: bool | None) -> list[str]:
        source = write(tmp_path / str(value), family=family, config={"indexer_rope_interleave": value})
        said = convert_checkpoint(source, tmp_path / "out", method="minmax", dry_run=True).notes
        return [note for note in said if "indexer_rope_interleave" in note]

    assert notes(usual) == notes(None) == []
    (note,) = notes(not usual)
    assert f"indexer_rope_interleave {not usual}" in note and f"has {usual}" in note
    assert "npuq and the engines follow config.json; transformers (5.24) ignores the key" in note


def test_two_statements_of_the_shared_layers_are_told(write: Any, tmp_path: Path) -> None:
    """GLM-5.2 states its layers as a list and as a frequency, which agree."""
    keys = {"indexer_types": ["full", "full", "shared"], "index_topk_freq": 2, "index_skip_topk_offset": 2}
    source = write(tmp_path / "one", family="glm5", config=keys)
    notes = convert_checkpoint(source, tmp_path / "out1", method="minmax").notes
    assert not any("layers that share a selection" in note for note in notes)
    assert "index_topk_pattern" not in json.loads((tmp_path / "out1" / "config.json").read_text())
    source = write(tmp_path / "two", family="glm5", config=keys | {"index_topk_freq": 1})
    notes = convert_checkpoint(source, tmp_path / "out2", method="minmax").notes
    assert any("layers that share a selection" in note and "the list counts" in note for note in notes)
    assert json.loads((tmp_path / "out2" / "config.json").read_text())["index_topk_pattern"] == "FFS"


def test_a_shared_layer_may_keep_an_unused_indexer(write: Any, texts: Path, tmp_path: Path) -> None:
    """Without a list: a release whose layers all have one, and a frequency that a user set. It is scaled as all are."""
    made = write(tmp_path / "all", family="v32", config={"index_topk_freq": 2, "index_skip_topk_offset": 1})
    add_tokenizer(made)
    convert(made, tmp_path / "out", texts)
    assert npuq.verify(tmp_path / "out", made).problems == ()
    assert "model.layers.1.self_attn.indexer.wq_b.weight_scale" in read(tmp_path / "out")

    def without(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".1.self_attn.indexer" in name]:
            del tensors[name]

    config = {"index_topk_freq": 2, "index_skip_topk_offset": 1}
    few = write(tmp_path / "few", family="v32", config=config, edit=without)
    add_tokenizer(few)
    convert(few, tmp_path / "out2", texts)
    assert npuq.verify(tmp_path / "out2", few).problems == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_interrupted_and_with_any_workers_the_bytes_are_the_same(
    family: str, rig: Any, write: Any, texts: Path, tree: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", family=family, fp8_block=16)
    add_tokenizer(source)
    options = {"method": "rotate+smooth+gptq", "calibration": [str(texts), 8, 16]}
    whole = rig(source, tmp_path / "whole", options=options | {"workers": 1})
    draw = random.Random(family)
    for attempt in range(3):
        point = draw.randint(1, whole["calls"])
        killed = rig(source, tmp_path / f"{attempt}", options=options | {"workers": 2}, kill_at=point)
        assert killed["killed"]
        rig(source, tmp_path / f"{attempt}", options=options | {"workers": 3})
        assert tree(tmp_path / f"{attempt}") == tree(tmp_path / "whole")


def test_gptq_calibrates_the_indexer_s_queries_on_their_latent(write: Any, texts: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "source", family="glm5")
    add_tokenizer(source)
    errors = {}
    for method in ("gptq", "smooth+mse"):
        convert(source, tmp_path / method, texts, method=method, recipe="w8a8")
        manifest = json.loads((tmp_path / method / "npuq" / "manifest.json").read_text())
        errors[method] = manifest["linears"]["model.layers.1.self_attn.indexer.wq_b.weight"]
    assert errors["gptq"]["method"] == "gptq" and 0 < errors["gptq"]["output_error"] < 0.05
    assert "output_error" not in errors["smooth+mse"]


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ("{names: '*.indexer.wk.weight', scheme: w8a8}, ", "role indexer_float must stay FLOAT"),
        ("{names: '*.weights_proj.weight', scheme: w8a8}, ", "role indexer_float must stay FLOAT"),
        ("{names: '*.indexer.k_norm.*', scheme: w8a8}, ", "role indexer_norm must stay FLOAT"),
        ("{roles: indexer, scheme: w8a8_static}, ", "no loader has indexers with a static input scale"),
        ("{roles: indexer, scheme: w4a8}, ", "only for the main model's routed experts"),
        ("{names: '*.q_b_proj.weight', scheme: float}, ", "is W8A8_DYNAMIC; then q_b_proj must be W8A8_DYNAMIC"),
        ("{names: ['*.q_a_proj.weight', '*.kv_a_*'], scheme: float}, ", "then q_a_proj must be W8A8_DYNAMIC"),
        ("{names: '*.2.self_attn.q_b_proj.weight', scheme: float}, ", "engines read both by one scheme"),
    ],
)
def test_schemes_that_an_engine_would_misread_are_refused(rules: str, why: str, write: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"method: minmax\nrules: [{rules}{{roles: routed_expert, scheme: w4a8}}, {{scheme: w8a8}}]")
    with pytest.raises(RecipeError, match=why):
        convert_checkpoint(write(tmp_path / "source", family="glm5"), tmp_path / "out", recipe=recipe)


def test_a_float_indexer_is_allowed_and_slow(write: Any, tmp_path: Path) -> None:
    """Then each projection is read by itself, as in ModelSlim's artifacts of V3.2."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "method: minmax\nrules: [{roles: [indexer, mtp_indexer], scheme: float}, "
        "{roles: routed_expert, scheme: w4a8}, {scheme: w8a8}]"
    )
    source = write(tmp_path / "source", family="v32")
    notes = convert_checkpoint(source, tmp_path / "out", recipe=recipe).notes
    (note,) = (note for note in notes if "vllm-ascend" in note)
    assert "wq_b.weight' is FLOAT in 4 layer(s)" in note
    verdict = npuq.verify(tmp_path / "out")
    assert verdict.problems == () and verdict.notes == (note,)
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text(
        recipe.read_text().replace("[{", "[{names: ['*.q_a_proj.*', '*.kv_a_proj*'], scheme: float}, {", 1)
    )
    notes = convert_checkpoint(source, tmp_path / "mixed", recipe=mixed).notes
    assert not any("vllm-ascend" in note for note in notes)


def test_heads_of_sparse_attention_are_shared_in_powers_of_two(write: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "source", family="glm5", config={"num_attention_heads": 12, "n_routed_experts": 12})
    convert_checkpoint(source, tmp_path / "out", method="minmax")
    for engine in ("vllm-ascend", "sglang"):
        (problem,) = (line for line in check_placement(tmp_path / "out", engine, 2, True) if "heads" in line)
        assert "6 attention heads" in problem
        assert check_placement(tmp_path / "out", engine, 3, True) != check_placement(tmp_path / "out", engine, 2, True)
        assert not any("attention heads" in line for line in check_placement(tmp_path / "out", engine, 3, True))


def test_a_rotated_draft_without_a_head_gets_one(sparse: Callable[..., Sparse], tmp_path: Path) -> None:
    """Its logits: those of the main model's head behind the draft's own norm."""
    made = sparse("glm", mtp=True)
    note = next(iter(convert_checkpoint(made.directory, tmp_path / "out", recipe="float", method="rotate").notes[1:]))
    assert "ships no head" in note and "SGLang drafts with the main model's head in any case" in note
    before, after = made.tensors, read(tmp_path / "out")
    name = "model.layers.4.shared_head.head.weight"
    assert name not in before and torch.equal(after["model.layers.4.shared_head.norm.weight"], torch.ones(64))
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    normed = x / x.square().mean(1, keepdim=True).sqrt()
    expected = normed * before["model.layers.4.shared_head.norm.weight"].double() @ before["lm_head.weight"].double().T
    found = normed @ rotation(64).matrix() @ after[name].double().T
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert npuq.verify(tmp_path / "out", made.directory).problems == ()
    plain = convert_checkpoint(made.directory, tmp_path / "plain", recipe="float", method="mse")
    assert name not in read(tmp_path / "plain") and not any("ships no head" in line for line in plain.notes)
