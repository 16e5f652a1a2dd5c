"""Artifacts that tests damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from npuq.verification import verify


class Artifact:
    """A copy of an artifact that can be damaged; `seal` makes the manifest's hashes right again, so that only the check
    under test can see the damage."""

    def __init__(self, directory: Path):
        self.directory = directory

    def seal(self) -> None:
        path = self.directory / "npuq" / "manifest.json"
        manifest = json.loads(path.read_text())
        for name, entry in manifest["files"].items():
            if (self.directory / name).exists():
                content = (self.directory / name).read_bytes()
                entry["size"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        path.write_text(json.dumps(manifest))

    def edit_json(self, name: str, edit: Callable[[dict[str, Any]], Any]) -> None:
        path = self.directory / name
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        self.seal()

    def edit_tensors(self, tensor: str, edit: Callable[[dict[str, Tensor]], Any]) -> None:
        """Rewrite the shard that holds a tensor; the index follows."""
        index = json.loads((self.directory / "model.safetensors.index.json").read_text())
        shard = index["weight_map"][tensor]
        tensors = load_file(self.directory / shard)
        before = set(tensors)
        edit(tensors)
        save_file(tensors, self.directory / shard, metadata={"format": "pt"})
        for name in before - set(tensors):
            del index["weight_map"][name]
        index["weight_map"] |= dict.fromkeys(set(tensors) - before, shard)
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index))
        self.seal()

    def problems(self, source: Path | None = None) -> str:
        verdict = verify(self.directory, source)
        assert verdict.ok == (not verdict.problems)
        return "\n".join(verdict.problems)
