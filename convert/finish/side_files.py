"""The files beside the weights that loaders need: tokenizer, generation settings, code, licence."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ...errors import CheckpointError
from ...formats.output_files import PARTIAL_NAME, new_file, publish
from ...formats.side_files import is_side_file
from ...inputs.files import MOST_BYTES, inside, is_inside, open_file, read_text
from ...inputs.names import FileName
from ...inputs.yaml_text import parse_yaml

# Only a few lines at the head of a source's model card are read.
_MOST_CARD_BYTES = 1 << 20


def side_files(source: Path) -> list[str]:
    """Names of the side files of a checkpoint directory, sorted.

    Raises CheckpointError for a link that leaves the checkpoint (as for shards), for a name that no manifest can hold,
    and for a file above the size limit of side files.
    """
    found = sorted(path.name for path in source.iterdir() if not path.is_dir() and is_side_file(path.name))
    for name in found:
        FileName.parse(name, f"{source}: rename, or move out", CheckpointError)
        if inside(source, name).stat().st_size > MOST_BYTES:
            raise CheckpointError(
                f"{source / name}: is larger than the {MOST_BYTES} bytes that npuq copies of such a file; remove it"
            )
    return found


def copy_side_files(source: Path, output: Path, names: list[str]) -> None:
    """Copy side files into the artifact, each whole or not at all; a link is replaced by its target."""
    for name in names:
        partial = output / PARTIAL_NAME
        # The content alone: modes and times of the source do not belong to the artifact.
        found = os.fdopen(open_file(inside(source, name), CheckpointError), "rb")
        with found as whole, new_file(partial) as copy:
            shutil.copyfileobj(whole, copy)
        publish(partial, output / name)


def card_front_matter(source: Path) -> dict[str, object]:
    """The YAML front matter of a directory's README.md; empty where it is missing or cannot be read."""
    try:
        if not is_inside(source, "README.md"):
            return {}
        text = read_text(inside(source, "README.md"), CheckpointError, _MOST_CARD_BYTES)
        parts = text.split("---\n", 2)
        if len(parts) < 3 or parts[0].strip():
            return {}
        content = parse_yaml(parts[1], str(source / "README.md"), CheckpointError)
    except CheckpointError:
        # Decoration only: a source card that cannot be read must not stop a conversion.
        return {}
    return content if isinstance(content, dict) else {}
