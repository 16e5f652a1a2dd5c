"""What is no checkpoint, or not a whole one, is refused before anything is converted."""

from __future__ import annotations

from pathlib import Path

import pytest
from loopback import LoopbackHub
from streaming import SOURCE, remote
from support import npuq_run

from npuq.errors import CheckpointError, HubError


class TestRefused:
    def test_a_shard_that_is_not_there(self, hub: LoopbackHub, source: str, tmp_path: Path) -> None:
        del hub.state.repos[SOURCE].commit("main").files["model-00002-of-000003.safetensors"]
        with (
            pytest.raises(CheckpointError, match=r"model-00002-of-000003\.safetensors is missing there"),
            remote(tmp_path),
        ):
            pass

    def test_a_truncated_shard(self, hub: LoopbackHub, source: str, example_fp8: Path, tmp_path: Path) -> None:
        name = "model-00002-of-000003.safetensors"
        hub.state.put(SOURCE, {name: (example_fp8 / name).read_bytes()[:-5]})
        with pytest.raises(CheckpointError, match=f"{name}: truncated"), remote(tmp_path):
            pass

    def test_no_checkpoint(self, hub: LoopbackHub, tmp_path: Path) -> None:
        hub.state.put(SOURCE, {"a.txt": b""})
        with pytest.raises(HubError, match=r"has no config\.json; it is not a checkpoint"), remote(tmp_path):
            pass

    def test_pickles(self, hub: LoopbackHub, tmp_path: Path) -> None:
        hub.state.put(SOURCE, {"config.json": b"{}", "pytorch_model.bin": b""})
        with pytest.raises(CheckpointError, match="pickle weights are not read"), remote(tmp_path):
            pass

    def test_neither_here_nor_there(self, hub: LoopbackHub, tmp_path: Path) -> None:
        done = npuq_run("convert", "alice/none", tmp_path / "out")
        assert done.returncode == 1
        assert "no such directory here; on the hub" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
