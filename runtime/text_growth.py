"""How much longer a tokenizer can make a text, by normalizers and decoders that replace a piece by a longer one.

Twenty lines of a downloaded tokenizer.json, each replacing a letter by ten, would make a prompt of one letter larger
than any memory. Known tokenizers replace a space by one other character.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as FastTokenizer

from ..errors import GenerationError
from ..inputs.json_text import parse_json

MOST_GROWTH: Final = 4096


def check_growth(fast: FastTokenizer, path: Path) -> None:
    """GenerationError when the normalizer or the decoder of the file could make a text more than 4096 times longer."""
    for name in ("normalizer", "decoder"):
        part = getattr(fast, name)
        growth = 1
        for step in _steps(None if part is None else parse_json(part.__getstate__(), str(path), GenerationError)):
            growth *= _growth(step)
            if growth > MOST_GROWTH:
                raise GenerationError(f"{path}: its {name} can make a text more than {MOST_GROWTH} times longer")


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(part, Mapping):
        yield part
        for key in ("normalizers", "decoders"):
            for step in part.get(key) or ():
                yield from _steps(step)


def _growth(step: Mapping[str, Any]) -> int:
    """A bound of how many characters become of one."""
    if step.get("type") == "Prepend":
        return 1 + len(step["prepend"])
    if step.get("type") != "Replace":
        return 1
    pattern, content = step["pattern"], step["content"]
    replaced = len(pattern.get("String", ""))  # a regular expression may match nothing, between any two characters
    return max(1, -(-len(content) // replaced)) if replaced else 1 + len(content)
