"""Bad input at the command line: exit status 1 (2 for usage), one line on stderr that names file or tensor, and no
output that looks finished."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.0.gate_proj.weight"


@pytest.fixture
def refused(npuq, tmp_path) -> Callable[..., str]:
    """Convert, expect a refusal with the given exit status, and return its line."""

    def run(source: object, *options: object, status: int = 1) -> str:
        output = tmp_path / "out"
        outcome = npuq("convert", source, output, "--method", "minmax", "--quiet", *options)
        assert outcome.status == status, outcome.stderr
        lines = outcome.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("npuq: error: "), outcome.stderr
        assert outcome.stdout == ""
        assert not (output / "npuq" / "manifest.json").exists() and not (output / "config.json").exists()
        return lines[0]

    return run


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a shard's header, data unchanged."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_missing_directory_config_and_shard(refused, make_checkpoint, tmp_path):
    assert "no such directory" in refused(tmp_path / "nowhere")
    source = make_checkpoint()
    (source / SHARD).unlink()
    line = refused(source)
    assert SHARD in line and "missing" in line
    (source / "config.json").unlink()
    assert "config.json: missing" in refused(source)


@pytest.mark.parametrize("cut", [1, 5000])
def test_truncated_shard(cut, refused, make_checkpoint):
    source = make_checkpoint()
    content = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(content[:-cut])
    line = refused(source)
    assert SHARD in line and "truncated" in line and "fetch it again" in line


def test_index_naming_an_absent_tensor(refused, make_checkpoint):
    source = make_checkpoint()
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    edit_json(source / INDEX, weight_map=weight_map | {"model.ghost.weight": SHARD})
    line = refused(source)
    assert INDEX in line and "model.ghost.weight" in line and SHARD in line


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_shard_outside_the_directory(kind, refused, make_checkpoint, tmp_path):
    source = make_checkpoint()
    outside = tmp_path / "x.safetensors"
    (source / SHARD).rename(outside)
    name = {"parent": "../x.safetensors", "absolute": str(outside), "link": SHARD}[kind]
    if kind == "link":
        (source / SHARD).symlink_to(outside)
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    edit_json(source / INDEX, weight_map={k: name if v == SHARD else v for k, v in weight_map.items()})
    line = refused(source)
    said = "outside the directory" if kind == "link" else "is not a file name that may be used"
    assert said in line and name[:40] in line  # a long name is told by its beginning


def test_side_file_linked_from_outside(refused, make_checkpoint, tmp_path):
    source = make_checkpoint()
    (tmp_path / "secret").write_text("key")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    line = refused(source)
    assert "tokenizer.json" in line and "outside the directory" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated"),
        (struct.pack("<Q", 10**15) + b"{}", "header length"),
        (struct.pack("<Q", 20) + b"{not json at all....", "malformed"),
        (struct.pack("<Q", 2) + b"[]", "malformed"),
        (struct.pack("<Q", 8) + b"\xff" * 8, "malformed"),
    ],
)
def test_malformed_and_huge_headers(content, said, refused, make_checkpoint):
    source = make_checkpoint()
    (source / SHARD).write_bytes(content)
    line = refused(source)
    assert SHARD in line and said in line


def test_header_whose_ranges_lie(refused, make_checkpoint):
    source = make_checkpoint()

    def shift(header: dict[str, Any]) -> None:
        entry = next(entry for name, entry in header.items() if name != "__metadata__")
        entry["shape"] = [*entry["shape"], 2]

    with_header(source / SHARD, shift)
    assert SHARD in refused(source)


def test_pickle_weights(refused, make_checkpoint):
    source = make_checkpoint(shards=1)
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04")
    line = refused(source)
    assert "pytorch_model.bin" in line and "safetensors" in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "'su'"),
        ({"torch_dtype": "float7"}, "float7"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 3}, "shape"),
        ({"num_hidden_layers": 900}, "missing"),
        ({"num_hidden_layers": 4_000_000}, "num_hidden_layers"),
        ({"n_routed_experts": 8}, "missing"),
    ],
)
def test_configs_that_do_not_fit(changes, said, refused, make_checkpoint):
    source = make_checkpoint()
    edit_json(source / "config.json", **changes)
    line = refused(source)
    assert said in line


def test_shape_that_disagrees_with_the_config(refused, make_checkpoint):
    source = make_checkpoint(edit=lambda tensors: tensors.update({EXPERT: torch.zeros(34, 64).bfloat16()}))
    line = refused(source)
    assert EXPERT in line and "[34, 64]" in line and "[32, 64]" in line


def test_missing_tensor(refused, make_checkpoint):
    source = make_checkpoint(edit=lambda tensors: tensors.pop(EXPERT))
    line = refused(source)
    assert EXPERT in line and "missing" in line


def test_unknown_dtype(refused, make_checkpoint):
    source = make_checkpoint(edit=lambda tensors: tensors.update({EXPERT: torch.zeros(32, 64, dtype=torch.int32)}))
    line = refused(source)
    assert EXPERT in line and "I32" in line


def test_fp8_without_scale(refused, make_checkpoint):
    source = make_checkpoint(fp8_block=16, edit=lambda tensors: tensors.pop(EXPERT + "_scale_inv"))
    line = refused(source)
    assert EXPERT in line and "no scale" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [EXPERT, "model.embed_tokens.weight", "model.layers.2.mlp.gate.weight"])
def test_non_finite_weights(value, name, refused, make_checkpoint):
    source = make_checkpoint(edit=lambda tensors: tensors[name].view(-1)[77:78].fill_(value))
    line = refused(source)
    assert name in line and "NaN" in line and ".safetensors" in line


def test_odd_rows_and_indivisible_columns_for_int4(refused, make_checkpoint, tmp_path):
    line = refused(make_checkpoint(config={"hidden_size": 63}))
    assert ".experts.0." in line and "odd" in line
    line = refused(make_checkpoint(tmp_path / "second", config={"moe_intermediate_size": 40}))
    assert "down_proj" in line and "16" in line


def test_output_inside_source(npuq, make_checkpoint):
    source = make_checkpoint()
    outcome = npuq("convert", source, source / "out")
    assert outcome.status == 1 and "lies inside the source checkpoint" in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1 and not (source / "out").exists()


def test_unknown_recipe_key_and_name(refused, make_checkpoint, tmp_path):
    source = make_checkpoint()
    (tmp_path / "mine.yaml").write_text("rules: []\ntargett: npuq\n")
    line = refused(source, "--recipe", tmp_path / "mine.yaml")
    assert "mine.yaml" in line and "'targett'" in line and "did you mean 'target'" in line
    assert "did you mean 'w4a8'" in refused(source, "--recipe", "w4a")
    (tmp_path / "mine.yaml").write_text("rules: [{roles: [dense_mlp], scheme: w4a8}]\n")
    line = refused(source, "--recipe", tmp_path / "mine.yaml")
    assert "rule 1" in line and "model.layers.0.mlp" in line


def test_too_little_memory(refused, make_checkpoint):
    line = refused(make_checkpoint(), "--max-memory", "1KB")
    assert "--max-memory 1000 is too small" in line and "give at least" in line


def test_an_unwritable_output(refused, make_checkpoint, monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere/out")

    source = make_checkpoint()
    monkeypatch.setattr(Path, "mkdir", refuse)
    line = refused(source)
    assert "/somewhere/out" in line and "Permission denied" in line


@pytest.mark.parametrize(
    "options",
    [
        ["--workers", "0"],
        ["--max-shard-size", "big"],
        ["--method", "magic"],
        ["--download-window", "1GB"],
        ["--no-such-flag"],
        ["third"],
    ],
)
def test_wrong_usage_exits_with_2(options, npuq, make_checkpoint, tmp_path):
    outcome = npuq("convert", make_checkpoint(), tmp_path / "out", *options)
    assert outcome.status == 2 and "Usage" in outcome.stderr and not (tmp_path / "out").exists()


def test_a_shard_that_shrinks_while_it_is_read(v3_source, make_checkpoint, tmp_path, monkeypatch, npuq):
    """Truncated after the checks: still one line, still resumable."""
    from npuq.convert import conversion

    source = make_checkpoint()
    original = conversion.plan_budget

    def shrink(*arguments: Any) -> Any:
        (source / SHARD).write_bytes((source / SHARD).read_bytes()[:3000])
        return original(*arguments)

    monkeypatch.setattr(conversion, "plan_budget", shrink)
    outcome = npuq("convert", source, tmp_path / "out", "--method", "minmax", "--quiet")
    assert outcome.status == 1 and SHARD in outcome.stderr and "truncated" in outcome.stderr
    assert not (tmp_path / "out" / "npuq" / "manifest.json").exists()


def test_verify_and_inspect_of_nothing(npuq, tmp_path, make_checkpoint):
    for command in ("verify", "inspect"):
        outcome = npuq(command, tmp_path / "nowhere")
        assert outcome.status == 1 and "no such directory" in outcome.stderr
    outcome = npuq("verify", make_checkpoint())
    assert outcome.status == 1 and "manifest.json: missing" in outcome.stdout
