"""Side files of a checkpoint, by name: one list for directories and for hubs."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

from .artifact import CARD_NAME

# The files that vLLM-Ascend, SGLang and transformers load beside the weights. The source's README.md is not among them:
# the artifact has a card of its own.
PATTERNS: Final = (
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


def is_side_file(name: str) -> bool:
    """True for a file of the checkpoint's root that the artifact gets a copy of."""
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS)


def is_read_beside_weights(name: str) -> bool:
    """True for a file of the checkpoint's root, without weights, that a conversion reads or copies."""
    return is_side_file(name) or name.endswith(".json") or name == CARD_NAME
