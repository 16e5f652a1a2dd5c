"""Checks of a tokenizer against the other files of its checkpoint; by their names alone, before a command's work."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from ...errors import CheckpointError, GenerationError
from ...inputs.files import inside, is_inside
from ...inputs.json_text import read_object
from ...models.config import text_config

MOST_CONFIG_BYTES: Final = 16 << 20
TIKTOKEN_NAME: Final = "tiktoken.model"
VOCABULARY_FILES: Final = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Those of formats that transformers converts, where it is installed and a tokenizer_config.json says of which kind."""

SPECIAL_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""The names under which a template finds special tokens."""


def tokenizer_problem(names: Iterable[str]) -> str | None:
    """Reason why no tokenizer can be read from files of these `names`, with a remedy; None if the names show none."""
    names = sorted(names)
    if "tokenizer.json" in names:
        return None
    older = [name for name in names if name == TIKTOKEN_NAME or name in VOCABULARY_FILES]
    for name in [] if TIKTOKEN_NAME in names else names:
        if fnmatchcase(name, "*.tiktoken"):
            return (
                f"its tokenizer is {name}, which npuq does not read (vLLM-Ascend and SGLang do); put the same "
                "vocabulary there as tokenizer.json, in the format of Hugging Face's tokenizers"
            )
    if older and "tokenizer_config.json" in names:
        return None
    if older:
        return (
            f"it has {older[0]} without the tokenizer_config.json that says how it is read; put it there, or the "
            "model's tokenizer.json"
        )
    return "it has no tokenizer.json; put the model's tokenizer.json and tokenizer_config.json there"


def require_tokenizer(directory: Path) -> None:
    """Raise GenerationError where the names of a directory's files show no tokenizer that can be read."""
    problem = tokenizer_problem(path.name for path in directory.iterdir()) if directory.is_dir() else None
    if problem is not None:
        raise GenerationError(f"{directory}: {problem}")


def check_vocabulary_size(directory: Path, found: int) -> None:
    """Raise GenerationError where `found` tokens are far fewer than config.json's vocab_size."""
    expected = model_vocabulary_size(directory)
    if found < expected // 2:
        raise GenerationError(
            f"{directory}: its tokenizer has {found} tokens, and config.json's vocab_size is {expected}"
        )


def model_vocabulary_size(directory: Path) -> int:
    """Vocabulary size of config.json, of its text_config where there is one; 0 if it has none."""
    if not is_inside(directory, "config.json"):
        return 0
    config = read_object(inside(directory, "config.json", GenerationError), GenerationError, MOST_CONFIG_BYTES)
    try:
        size = text_config(config).get("vocab_size")
    except CheckpointError as error:
        raise GenerationError(f"{directory}: {error}") from error
    return size if type(size) is int and size > 0 else 0
