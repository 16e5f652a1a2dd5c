"""The files beside the weights that loaders need: tokenizer, generation settings, code, licence."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import CheckpointError
from ..inputs.files import inside, is_inside, open_file, read_text
from ..inputs.names import FileName
from ..inputs.yaml_text import parse_yaml
from .output import partial_path, publish

# What vLLM-Ascend, SGLang and transformers look for beside the weights. The source's README.md is not among them: the
# artifact has a card of its own.
PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "*.model",  # sentencepiece, and Kimi's tiktoken.model
    "*.jinja",
    "chat_template.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)


# A source's model card is read for a few lines at its head.
_MOST_CARD_BYTES = 1 << 20
# Any of these is the whole of some model's tokenizer.
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "*.tiktoken", "*.model")


def has_tokenizer(name: str) -> bool:
    """Whether a file of that name makes a tokenizer, rather than settles its details."""
    return any(fnmatchcase(name, pattern) for pattern in _TOKENIZERS)


def side_files(source: Path) -> list[str]:
    """Names of the side files of a checkpoint directory, sorted.

    Raises CheckpointError for a link that leaves the checkpoint, as it does for shards.
    """
    found = sorted(path.name for path in source.iterdir() if not path.is_dir() and _wanted(path.name))
    return [FileName.parse(name, str(source), CheckpointError) for name in found if inside(source, name)]


def copy_side_files(source: Path, output: Path, names: list[str]) -> None:
    """Copy side files into the artifact, each whole or not at all, links as what they point to."""
    for name in names:
        partial = partial_path(output)
        # The content alone: modes and times of the source are no part of the artifact.
        found = os.fdopen(open_file(inside(source, name), CheckpointError), "rb")
        with found as whole, partial.open("wb") as copy:
            shutil.copyfileobj(whole, copy)
        publish(partial, output / name)


def card_front_matter(source: Path) -> dict[str, object]:
    """The YAML front matter of the source's README.md, for its licence; empty when there is none to read."""
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


def _wanted(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS)
