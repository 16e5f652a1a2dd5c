"""The files beside the weights that loaders need: tokenizer, generation settings, code, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from ..errors import CheckpointError
from ..inputs.names import FileName
from ..quant.checkpoint import inside
from ..quant.side_files import is_side_file
from .output import partial_path, publish


def side_files(source: Path) -> list[str]:
    """Names of the side files of a checkpoint directory, sorted.

    Raises CheckpointError for a link that leaves the checkpoint, as it does for shards, and for a name that no manifest
    can hold.
    """
    names = sorted(path.name for path in source.iterdir() if not path.is_dir() and is_side_file(path.name))
    where = f"{source}: rename, or move out"
    return [name for name in names if FileName.parse(name, where, CheckpointError) and inside(source, name)]


def copy_side_files(source: Path, output: Path, names: list[str]) -> None:
    """Copy side files into the artifact, each whole or not at all, links as what they point to."""
    for name in names:
        partial = partial_path(output)
        # The content alone: modes and times of the source are no part of the artifact.
        shutil.copyfile(inside(source, name), partial)
        publish(partial, output / name)


def card_front_matter(source: Path) -> dict[str, object]:
    """The YAML front matter of the source's README.md, for its licence; empty when there is none to read."""
    try:
        text = inside(source, "README.md").read_text(encoding="utf-8") if (source / "README.md").exists() else ""
        parts = text.split("---\n", 2)
        content = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except (CheckpointError, OSError, UnicodeDecodeError, yaml.YAMLError):
        # Decoration only: a source card that cannot be read must not stop a conversion.
        return {}
    return content if isinstance(content, dict) else {}
