"""The artifact's bytes depend on the source and the arguments that name its content, on nothing else."""

from __future__ import annotations

import json
import shutil

import pytest

from npuq.convert import convert_checkpoint


@pytest.mark.parametrize(
    "options",
    [{"workers": 1}, {"workers": 5}, {"max_memory": 80_000}, {"workers": 3, "max_memory": 300_000}],
    ids=str,
)
def test_workers_and_memory_do_not_show(options, v3_source, v3_artifact, tmp_path, tree):
    convert_checkpoint(v3_source, tmp_path / "out", method="minmax", max_shard_size=60_000, **options)
    assert tree(tmp_path / "out") == tree(v3_artifact)


def test_mse_does_not_depend_on_chunks_either(v3_source, tmp_path, tree):
    recipe = tmp_path / "experts.yaml"
    recipe.write_text(
        "method: mse\nrules: [{layers: 1, scheme: w4a8, roles: routed_expert}, "
        "{roles: [routed_expert, mtp_routed_expert], scheme: w8a8, method: minmax}]"
    )
    convert_checkpoint(v3_source, tmp_path / "one", recipe=recipe, workers=1)
    summary = convert_checkpoint(v3_source, tmp_path / "two", recipe=recipe, workers=2, max_memory=400_000)
    assert summary.memory_bytes <= 400_000
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_neither_the_place_nor_the_time_shows(v3_source, v3_artifact, tmp_path, tree):
    elsewhere = tmp_path / "deep" / "er" / v3_source.name
    shutil.copytree(v3_source, elsewhere, copy_function=shutil.copyfile)
    convert_checkpoint(elsewhere, tmp_path / "out", method="minmax", max_shard_size=60_000)
    assert tree(tmp_path / "out") == tree(v3_artifact)
    for name, content in tree(v3_artifact).items():
        assert str(v3_source.parent).encode() not in content, name


def test_shard_size_is_a_limit(v3_source, tmp_path):
    summary = convert_checkpoint(v3_source, tmp_path / "out", method="minmax", max_shard_size=30_000)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) == summary.shards > 5
    assert max(sizes) <= 30_000


def test_manifest_names_the_repository_of_a_hub_cache(v3_source, tmp_path):
    """In a Hugging Face cache files are links to blobs, and folders are named for repository and revision."""
    repo = tmp_path / "models--someone--a-model"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in v3_source.iterdir():
        blob = repo / "blobs" / f"hash-{path.name}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    convert_checkpoint(snapshot, tmp_path / "out", method="minmax")
    manifest = json.loads((tmp_path / "out" / "npuq" / "manifest.json").read_text())
    assert manifest["source"]["repo"] == manifest["source"]["name"] == "someone/a-model"
    assert manifest["source"]["revision"] == "0123abcd"
    assert (tmp_path / "out" / "LICENSE").read_text() == "none\n"
    assert not (tmp_path / "out" / "LICENSE").is_symlink()
    assert "base_model: someone/a-model" in (tmp_path / "out" / "README.md").read_text()
