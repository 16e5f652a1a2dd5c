"""A ModelScope that lies, and repositories there that are made to harm."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hostile import MARK, QUICK, SIZES, Entry, command, hashes, paths, run_all
from loopback_modelscope import LoopbackModelScope
from support import MANIFEST, REPO, entry_of, files_of

import npuq

pull, push = partial(npuq.pull, hub="modelscope"), partial(npuq.push, hub="modelscope")


class TestModelScope:
    @pytest.fixture
    def runs(
        self,
        scope: LoopbackModelScope,
        small: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> dict[str, Entry]:
        scope.repos[REPO] = files_of(small)
        return {
            "pull": lambda target: pull(REPO, backoff=QUICK),
            "pull to a folder": lambda target: pull(REPO, target, backoff=QUICK),
            "push": lambda target: push(small, REPO, backoff=QUICK),
            "npuq pull": lambda target: command(capsys, monkeypatch, "pull", REPO, target, "--hub", "modelscope"),
        }

    def test_an_honest_hub(self, runs: dict[str, Entry], tmp_path: Path, victim: Path) -> None:
        runs["pull to a folder"](tmp_path / "there")
        assert (tmp_path / "there" / MANIFEST).is_file()
        run_all(runs, tmp_path, victim)

    @pytest.mark.parametrize("key", ["Path", "Size", "Sha256", "Type"])
    def test_listing(
        self, scope: LoopbackModelScope, runs: dict[str, Entry], tmp_path: Path, victim: Path, key: str
    ) -> None:
        for value in SIZES if key == "Size" else hashes(victim):

            def lie(request: str, answer: Any, value: Any = value) -> Any:
                if not request.endswith("/repo/files"):
                    return answer
                files = answer["Data"]["Files"]
                added = [{**files[0], key: value}]
                data = {"Files": [*files, *added] if key == "Path" else [{**file, key: value} for file in files]}
                return {**answer, "Data": data, "data": data}

            scope.say = lie
            run_all(runs, tmp_path, victim)

    @pytest.mark.parametrize("key", ["name", "sha256", "size"])
    def test_manifest(
        self, scope: LoopbackModelScope, runs: dict[str, Entry], tmp_path: Path, victim: Path, key: str
    ) -> None:
        sealed = scope.repos[REPO][MANIFEST]
        for value in {"name": paths, "sha256": hashes, "size": lambda victim: SIZES}[key](victim):
            manifest = json.loads(sealed)
            if key == "name":
                manifest["files"][value if isinstance(value, str) else MARK] = entry_of(b"x")
            else:
                manifest["files"]["config.json"][key] = value
            scope.repos[REPO][MANIFEST] = json.dumps(manifest).encode()
            run_all(runs, tmp_path, victim)
