"""Check of a tokenizer.json for parts that abort the tokenizers library or fill memory.

The library checks little. Two parts abort the whole process on reading: a crafted `Precompiled` normalizer, and a BPE
whose `continuing_subword_prefix` cuts its merges within a character. The byte-level BPE of npuq's models has neither.
Twenty lines that each replace a letter by ten would make a prompt of one letter larger than any memory. Known
tokenizers replace a space by one other character, and put a few tokens around the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as FastTokenizer

from ...errors import GenerationError
from ...inputs.json_text import parse_json

MOST_GROWTH: Final = 4096

# Escapes of plain letters, too: they could hide a name, so the JSON is parsed to find it.
_SUSPECT: Final = re.compile(rb'Precompiled|continuing_subword_prefix"\s*:\s*"[^"]|\\u00[2-7]')


def check_parts(content: bytes, path: Path) -> None:
    """Raise GenerationError for a tokenizer.json with a part that can abort the library."""
    if _SUSPECT.search(content) is None:
        return
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # All pairs: of pairs with the same name, the library reads every one.
        for name, value in pairs:
            if name == "type" and value == "Precompiled":
                found.append("a Precompiled normalizer")
            if name == "continuing_subword_prefix" and value:
                found.append("a continuing_subword_prefix")
        return dict(pairs)

    parse_json(content, str(path), GenerationError, look)
    if found:
        raise GenerationError(f"{path}: {found[0]} can abort the tokenizers library, and is not read")


def check_growth(fast: FastTokenizer, path: Path) -> None:
    """Raise GenerationError for a tokenizer that could make a text, or its tokens, many times longer.

    Limits: 4096 times for normalizer and decoder; for the post-processor one copy of the text, and 4096 tokens around
    it.
    """
    for name in ("normalizer", "decoder"):
        growth = 1
        for step in _steps(getattr(fast, name), path):
            growth *= _growth(step)
            if growth > MOST_GROWTH:
                raise GenerationError(f"{path}: its {name} can make a text more than {MOST_GROWTH} times longer")
    added = 0
    for step in _steps(fast.post_processor, path):
        copies, tokens = _around(step)
        added += tokens
        if copies > 1:
            raise GenerationError(f"{path}: its post_processor repeats the text; npuq reads none that does")
        if added > MOST_GROWTH:
            raise GenerationError(f"{path}: its post_processor puts more than {MOST_GROWTH} tokens around a text")


def _steps(part: Any, path: Path) -> Iterator[Mapping[str, Any]]:
    """Steps of a tokenizer's part, nested sequences flattened."""
    return iter(()) if part is None else _inner(parse_json(part.__getstate__(), str(path), GenerationError))


def _inner(step: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(step, Mapping):
        yield step
        for key in ("normalizers", "decoders", "processors"):
            for inner in step.get(key) or ():
                yield from _inner(inner)


def _around(step: Mapping[str, Any]) -> tuple[int, int]:
    """Copies of a prompt's text that a post-processor's step writes, and tokens that it adds."""
    if step.get("type") != "TemplateProcessing":
        return 1, 2  # BERT's and RoBERTa's put one on either side
    pieces = step["single"]
    specials = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    return len(pieces) - len(specials), sum(len(step["special_tokens"][name]["ids"]) for name in specials)


def _growth(step: Mapping[str, Any]) -> int:
    """Bound of the characters that a step makes of one."""
    if step.get("type") == "Prepend":
        return 1 + len(step["prepend"])
    if step.get("type") != "Replace":
        return 1
    pattern, content = step["pattern"], step["content"]
    replaced = len(pattern.get("String", ""))  # a regular expression may match nothing, between any two characters
    return max(1, -(-len(content) // replaced)) if replaced else 1 + len(content)
