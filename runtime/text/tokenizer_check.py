"""Check of a model's tokenizer by file names alone, before a command's work."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from ...errors import GenerationError

_TIKTOKEN = ("tiktoken.model", "*.tiktoken")
VOCABULARY_FILES: Final = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Those of formats that transformers converts, where it is installed and a tokenizer_config.json says of which kind."""


def tokenizer_problem(names: Iterable[str]) -> str | None:
    """Reason why no tokenizer can be read from files of these `names`, with a remedy; None if the names show none."""
    names = sorted(names)
    if "tokenizer.json" in names:
        return None
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in _TIKTOKEN):
            return (
                f"its tokenizer is {name}, which npuq does not read (vLLM-Ascend and SGLang do); put the same "
                "vocabulary there as tokenizer.json, in the format of Hugging Face's tokenizers"
            )
    older = [name for name in names if name in VOCABULARY_FILES]
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
