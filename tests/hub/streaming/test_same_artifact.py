"""Conversion straight from the hub: the artifact must be that of a conversion from the disk, to the byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from kimi_k25 import as_k25
from loopback import LoopbackHub
from packed_v4 import write_random_release
from safetensors.torch import load_file, save_file
from streaming import OPTIONS, SOURCE, WINDOW, remote, without_manifest
from support import MANIFEST, as_modelslim, contents, files_of, npuq_run

import npuq
from npuq.convert import convert_checkpoint
from npuq.convert.conversion import Part
from npuq.convert.ranks.share import Share
from npuq.errors import RecipeError
from npuq.hub import resolve


def test_the_same_artifact_in_a_small_window(
    hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with remote(tmp_path / "out") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
        assert checkpoint.window.most_resident <= WINDOW
    assert without_manifest(tmp_path / "out") == expected
    assert not (tmp_path / "out" / "npuq" / "download").exists()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["source"]["repo"] == SOURCE
    assert manifest["source"]["revision"] == source
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert f"base_model: {SOURCE}\nbase_model_relation: quantized" in card
    # Every weight was fetched once; headers, and small gaps between tensors, come on top.
    total = sum(blob.size for name, blob in hub.state.repos[SOURCE].commit("main").files.items() if "safe" in name)
    fetched = sum(seen.sent for seen in hub.requests(r"^GET .*\.safetensors$"))
    assert total <= fetched + 100_000 <= total + 3 * (1 << 20) + 1_000_000
    assert npuq.verify(tmp_path / "out").ok


def test_a_rank_fetches_its_own_part_only(
    hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    total = sum(blob.size for name, blob in hub.state.repos[SOURCE].commit("main").files.items() if "safe" in name)
    fetched = []
    for part in (Share(0, 2), Share(1, 2), Part.FINISH):
        before = sum(seen.sent for seen in hub.requests(r"^GET .*\.safetensors$"))
        with remote(tmp_path / "out") as checkpoint:
            convert_checkpoint(checkpoint, tmp_path / "out", part=part, **OPTIONS)  # type: ignore[arg-type]
        fetched.append(sum(seen.sent for seen in hub.requests(r"^GET .*\.safetensors$")) - before)
    assert without_manifest(tmp_path / "out") == expected
    headers = fetched[2]
    assert headers <= 3 << 20
    assert max(fetched[:2]) - headers < 0.65 * total
    assert sum(fetched[:2]) - 2 * headers <= total + 1_000_000


@pytest.mark.parametrize("method", ["rotate+mse", "gptq", "smooth+mse"])
def test_methods_that_read_weights_twice_are_refused(
    hub: LoopbackHub, source: str, tmp_path: Path, method: str
) -> None:
    with remote(tmp_path / "out") as checkpoint, pytest.raises(RecipeError, match="fetch it first"):
        convert_checkpoint(checkpoint, tmp_path / "out", method=method)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_dry_run_reads_headers_alone_and_writes_nothing(hub: LoopbackHub, source: str, tmp_path: Path) -> None:
    done = npuq_run("convert", SOURCE, tmp_path / "out", "--download-window", "3MB", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["status"] == "planned"
    # The window, and some MB beside the shards: index, tables, tokenizer.
    assert 3_000_000 < plan["needed_disk_bytes"] - plan["output_bytes"] < 5_000_000
    assert len(hub.requests(r"^GET .*\.safetensors$")) == 3
    assert not (tmp_path / "out").exists()


def test_revision_pins_and_a_moved_branch_is_refused(hub: LoopbackHub, source: str, tmp_path: Path) -> None:
    arguments = ("convert", SOURCE, tmp_path / "out", "--method", "minmax", "--quiet", "--json")
    assert npuq_run(*arguments).returncode == 0
    moved = hub.state.put(SOURCE, {"generation_config.json": b"{}"}).sha
    again = npuq_run(*arguments)
    assert again.returncode == 1
    assert source in again.stderr and moved in again.stderr
    pinned = npuq_run(*arguments, "--revision", source)
    assert json.loads(pinned.stdout)["status"] == "finished"


def test_a_window_smaller_than_a_tensor(
    hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with remote(tmp_path / "out", window_bytes=1) as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", workers=3, **OPTIONS)  # type: ignore[arg-type]
    assert without_manifest(tmp_path / "out") == expected


def test_a_repository_that_modelslim_quantized(hub: LoopbackHub, example_fp8: Path, tmp_path: Path) -> None:
    """Its files have other names, and neither manifest nor tables."""
    convert_checkpoint(example_fp8, tmp_path / "ours", **OPTIONS)  # type: ignore[arg-type]
    theirs = as_modelslim(tmp_path / "ours", tmp_path / "theirs")
    hub.state.put(SOURCE, files_of(theirs))
    convert_checkpoint(theirs, tmp_path / "local", max_shard_size=2_000_000)
    with remote(tmp_path / "out") as checkpoint:
        summary = convert_checkpoint(checkpoint, tmp_path / "out", max_shard_size=2_000_000)
        assert checkpoint.window.most_resident <= WINDOW
    assert (summary.status, summary.recipe) == ("converted", "stored")
    local, streamed = without_manifest(tmp_path / "local"), without_manifest(tmp_path / "out")
    assert local.keys() == streamed.keys()
    assert all(content == streamed[name] for name, content in local.items() if name != "README.md")
    assert npuq.verify(tmp_path / "out").ok


@pytest.mark.parametrize("form", ["int4 experts of three tensors", "FP4 experts and tables"])
def test_a_packed_release(hub: LoopbackHub, example_fp8: Path, tmp_path: Path, form: str) -> None:
    directory = tmp_path / "source"
    if form.startswith("int4"):
        as_k25(example_fp8, directory)
    else:
        write_random_release(directory)
    hub.state.put(SOURCE, files_of(directory))
    convert_checkpoint(directory, tmp_path / "local", **OPTIONS)  # type: ignore[arg-type]
    with remote(tmp_path / "out") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
        assert checkpoint.window.most_resident <= WINDOW
    local, streamed = without_manifest(tmp_path / "local"), without_manifest(tmp_path / "out")
    assert local.keys() == streamed.keys()
    assert all(content == streamed[name] for name, content in local.items() if name != "README.md")


def test_both_ways_leave_the_same_files(hub: LoopbackHub, example_fp8: Path, tmp_path: Path) -> None:
    """From a directory, streamed, and fetched first: whatever lies beside the weights."""
    beside = (
        "NOTICE.txt",
        "LICENSE",
        "LICENSE-MODEL",
        "modeling_deepseek.py",
        "tokenizer.model",
        "chat_template.jinja",
    )
    others = ("picture.png", "README.md", "notes.json", "adapter.bin", "NOTICE/x", "a/tokenizer.json", "tiktoken.model")
    directory = tmp_path / "source"
    for path in example_fp8.iterdir():
        (directory / path.name).parent.mkdir(exist_ok=True)
        (directory / path.name).write_bytes(path.read_bytes())
    for name in (*beside, *others):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    files = files_of(directory)
    hub.state.put(SOURCE, files)
    convert_checkpoint(directory, tmp_path / "local", **OPTIONS)  # type: ignore[arg-type]
    with remote(tmp_path / "streamed") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "streamed", **OPTIONS)  # type: ignore[arg-type]
    convert_checkpoint(resolve(SOURCE), tmp_path / "fetched", **OPTIONS)  # type: ignore[arg-type]
    local = without_manifest(tmp_path / "local")
    assert {*beside, "tiktoken.model"} <= local.keys()
    assert not {"picture.png", "notes.json", "adapter.bin"} & local.keys()
    for name in ("streamed", "fetched"):
        assert without_manifest(tmp_path / name) == local


def test_shards_of_one_name_in_two_folders(hub: LoopbackHub, example_fp8: Path, tmp_path: Path) -> None:
    """And one that could be taken for another where `/` is written as `_`."""
    names = ["model-1.safetensors", "a/model-1.safetensors", "a_model-1.safetensors"]
    renamed = dict(zip(sorted(path.name for path in example_fp8.glob("*.safetensors")), names, strict=True))
    directory = tmp_path / "source"
    (directory / "a").mkdir(parents=True)
    for path in example_fp8.iterdir():
        content = path.read_bytes()
        if path.name == "model.safetensors.index.json":
            index = json.loads(content)
            index["weight_map"] = {name: renamed[shard] for name, shard in index["weight_map"].items()}
            content = json.dumps(index).encode()
        (directory / renamed.get(path.name, path.name)).write_bytes(content)
    files = files_of(directory)
    hub.state.put(SOURCE, files)
    convert_checkpoint(directory, tmp_path / "local", **OPTIONS)  # type: ignore[arg-type]
    with remote(tmp_path / "streamed") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "streamed", **OPTIONS)  # type: ignore[arg-type]
    assert without_manifest(tmp_path / "streamed") == without_manifest(tmp_path / "local")
    # What is fetched first, for a model to run, has them all.
    fetched = resolve(SOURCE)
    assert {name for name in names if (fetched / name).is_file()} == {*names}


def test_a_tied_head_passes_by_with_the_embedding(hub: LoopbackHub, example_fp8: Path, tmp_path: Path) -> None:
    """One stored tensor, two of the artifact: whether it is fetched once or twice, they are those from the disk."""
    directory = Path(shutil.copytree(example_fp8, tmp_path / "tied"))
    index_path, config_path = directory / "model.safetensors.index.json", directory / "config.json"
    index = json.loads(index_path.read_text())
    shard = directory / index["weight_map"].pop("lm_head.weight")
    tensors = load_file(shard)
    del tensors["lm_head.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    index_path.write_text(json.dumps(index))
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"tie_word_embeddings": True}))
    hub.state.put(SOURCE, files_of(directory))
    convert_checkpoint(directory, tmp_path / "disk", **OPTIONS)  # type: ignore[arg-type]
    with remote(tmp_path / "out") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    expected = {name: content for name, content in contents(tmp_path / "disk").items() if name.endswith("safetensors")}
    assert {name: content for name, content in contents(tmp_path / "out").items() if name in expected} == expected
    assert npuq.verify(tmp_path / "out", directory).ok


def test_fp8_in_other_forms(hub: LoopbackHub, example_fp8: Path, tmp_path: Path) -> None:
    """Powers of two as scales, some in other shards; by channel, with a scale of inputs that is not read."""
    directory = Path(shutil.copytree(example_fp8, tmp_path / "forms"))
    names = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            weight = name.removesuffix("_scale_inv")
            if "o_proj" in name and weight in tensors:
                prefix = weight.removesuffix("weight")
                tensors[f"{prefix}weight_scale"] = torch.full((tensors[weight].shape[0], 1), 1e-3).bfloat16()
                tensors[f"{prefix}input_scale"] = torch.ones(1)
                del tensors[name]
            else:
                tensors[name] = tensors[name].to(torch.float8_e8m0fnu)
        save_file(tensors, shard, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, shard.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    hub.state.put(SOURCE, files_of(directory))
    convert_checkpoint(directory, tmp_path / "local", **OPTIONS)  # type: ignore[arg-type]
    with remote(tmp_path / "out") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
        assert checkpoint.window.most_resident <= WINDOW
    assert without_manifest(tmp_path / "out") == without_manifest(tmp_path / "local")
    forms = json.loads((tmp_path / "out" / MANIFEST).read_text())["source"]["forms"]
    assert {"F8_E4M3 128x128 E8M0", "F8_E4M3 by channel"} <= forms.keys()


def test_an_unknown_model_is_recognized_by_its_headers(hub: LoopbackHub, example_fp8: Path, tmp_path: Path) -> None:
    """And converted with --as to the bytes of the known one."""
    files = files_of(example_fp8)
    raw = json.loads((example_fp8 / "config.json").read_text())
    files["config.json"] = json.dumps(raw | {"model_type": "new_moe"}).encode()
    hub.state.put(SOURCE, files)
    done = npuq_run("convert", SOURCE, tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["looks_like"][0] == "deepseek_v3"
    assert not hub.requests(r"^GET .*\.safetensors$")[3:], "more than the headers was fetched"
    convert_checkpoint(example_fp8, tmp_path / "local", **OPTIONS)  # type: ignore[arg-type]
    with remote(tmp_path / "out") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", family="deepseek_v3", **OPTIONS)  # type: ignore[arg-type]
    local, streamed = without_manifest(tmp_path / "local"), without_manifest(tmp_path / "out")
    differing = {name for name in local | streamed if local.get(name) != streamed.get(name)}
    assert differing <= {"README.md", "config.json"}
    assert json.loads(streamed["config.json"]) == json.loads(local["config.json"])
