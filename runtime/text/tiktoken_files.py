"""Reading of `tiktoken.model`, with limits: byte strings in the order of their ranks. Special tokens follow them.

The file has no pattern that splits a text before its pieces are merged, and no special tokens. Kimi and Moonlight keep
the first in Python code of their own (`tokenization_kimi.py`, `tokenization_moonshot.py`), which npuq never runs: the
tokenizer class that tokenizer_config.json names selects the same rules here.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...errors import GenerationError
from ...inputs.files import inside, read_bytes, read_text
from ...inputs.printable import printable, shown
from .tokenizer_check import SPECIAL_TOKENS, TIKTOKEN_NAME, check_vocabulary_size, model_vocabulary_size

# Kimi's file has 2.8 MB and 163,584 ranks.
_MOST_BYTES: Final = 32 << 20
_MOST_RANKS: Final = 1 << 20
_MOST_SPECIAL: Final = 1 << 14
_MOST_SPECIAL_CHARACTERS: Final = 128
_MOST_CODE_BYTES: Final = 1 << 20
# `pat_str = "|".join([r"""…""", …])`, as the models' own code writes it.
_CODE_PATTERN: Final = re.compile(r'\bpat_str\s*=\s*"\|"\.join\(\s*\[((?:\s*r"""[^"]*""",?)+)\s*\]')
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True)
class Family:
    """The parts that the code of a tokenizer class adds to `tiktoken.model`.

    pattern: pieces of a text, in the regular expressions of tiktoken. reserved: ids after the ranks that are special
    tokens, those without a name too. most_run, most_characters: a longer run of white space or of other characters is
    cut, and so is a longer text. sorts_tools: chat templates get the tools with their keys in order.
    """

    pattern: str
    reserved: int
    most_run: int
    most_characters: int
    sorts_tools: bool


def _kimi_pattern() -> str:
    # A word is capitals, then small letters; letters without case count as both. Han is a piece of its own.
    capital = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    small = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    before, contraction = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    return "|".join(
        (
            r"[\p{Han}]+",
            f"{before}{capital}*{small}+{contraction}",
            f"{before}{capital}+{small}*{contraction}",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",  # all of a run but its last space, which belongs to the word after it
            r"\s+",
        )
    )


# Moonlight's code reserves 258 ids; the last two are beyond the model's vocabulary of 163,840.
_KIMI: Final = Family(_kimi_pattern(), reserved=256, most_run=25_000, most_characters=400_000, sorts_tools=True)
FAMILIES: Final[Mapping[str, Family]] = {"TikTokenTokenizer": _KIMI}
"""By the tokenizer class of tokenizer_config.json."""


@dataclass(frozen=True)
class SpecialToken:
    """A token after the ranks. `hidden`: decoded text leaves it out."""

    text: str
    id: int
    hidden: bool


@dataclass(frozen=True)
class TiktokenFiles:
    """A tiktoken vocabulary: `ranks` by byte string, from 0 without gaps."""

    family: Family
    ranks: Mapping[bytes, int]
    special: tuple[SpecialToken, ...]

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any]) -> TiktokenFiles:
        """Read a directory's tiktoken.model; `config` is the content of its tokenizer_config.json.

        Raises GenerationError for a tokenizer class or pattern that npuq does not know, for a file that is damaged or
        too large, for special tokens that share an id or a text, and for a vocabulary that does not fit config.json's
        vocab_size.
        """
        where = directory / "tokenizer_config.json"
        family = _family(config, where)
        _check_code(directory, family)
        path = inside(directory, TIKTOKEN_NAME, GenerationError)
        ranks = _ranks(read_bytes(path, GenerationError, _MOST_BYTES), path)
        size = model_vocabulary_size(directory)
        if size and len(ranks) > size:
            raise GenerationError(
                f"{path}: has {len(ranks)} ranks, and config.json's vocab_size is {size}: they are not of one model; "
                "fetch both again"
            )
        special = _special_tokens(config, where, len(ranks), family, size)
        check_vocabulary_size(directory, len(ranks) + len(special))
        _check_names(config, where, {token.text for token in special})
        return cls(family, ranks, special)


def _family(config: Mapping[str, Any], where: Path) -> Family:
    name = config.get("tokenizer_class")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise GenerationError(
            f"{where}: tokenizer_class {shown(name)} does not say how {TIKTOKEN_NAME} is read; npuq knows "
            f"{', '.join(FAMILIES)}; put the model's vocabulary there as tokenizer.json"
        )
    return family


def _check_code(directory: Path, family: Family) -> None:
    """Raise GenerationError where the checkpoint's own code, read as text, has another pattern than the family's."""
    for path in sorted(directory.glob("tokenization_*.py")):
        text = read_text(inside(directory, path.name, GenerationError), GenerationError, _MOST_CODE_BYTES)
        found = _CODE_PATTERN.search(text)
        if found and "|".join(re.findall(r'r"""([^"]*)"""', found[1])) != family.pattern:
            raise GenerationError(
                f"{path}: its pat_str is not the pattern by which npuq splits a text for {TIKTOKEN_NAME}; put the "
                "model's vocabulary there as tokenizer.json"
            )


def _ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """Ranks by byte string. Line n of the file is `BASE64 n-1`; empty lines may end it."""
    lines = content.rstrip().split(b"\n")
    if len(lines) > _MOST_RANKS:
        raise GenerationError(f"{path}: has {len(lines)} lines; npuq reads up to {_MOST_RANKS}; fetch it again")
    ranks: dict[bytes, int] = {}
    for rank, line in enumerate(lines):
        encoded, _, number = line.rstrip(b"\r").partition(b" ")
        if number != b"%d" % rank:
            said = shown(number.decode("ascii", "backslashreplace"))
            raise GenerationError(f"{path}, line {rank + 1}: its rank must be {rank}, not {said}; fetch it again")
        try:
            token = binascii.a2b_base64(encoded) if _BASE64.fullmatch(encoded) else b""
        except binascii.Error:
            token = b""
        if not token:
            said = shown(encoded.decode("ascii", "backslashreplace"))
            raise GenerationError(f"{path}, line {rank + 1}: {said} is no byte string in base64; fetch it again")
        if ranks.setdefault(token, rank) != rank:
            raise GenerationError(
                f"{path}, line {rank + 1}: has the byte string of line {ranks[token] + 1}; fetch it again"
            )
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise GenerationError(f"{path}: has no token of the single byte 0x{missing:02X}; fetch it again")
    return ranks


def _special_tokens(
    config: Mapping[str, Any], where: Path, first: int, family: Family, size: int
) -> tuple[SpecialToken, ...]:
    """Tokens of added_tokens_decoder, and `<|reserved_token_ID|>` for the reserved ids that it does not name.

    `size` is the model's vocabulary size, 0 if unknown.
    """
    given = config.get("added_tokens_decoder", {})
    if not isinstance(given, Mapping) or len(given) > _MOST_SPECIAL:
        raise GenerationError(
            f"{where}: added_tokens_decoder must be an object of at most {_MOST_SPECIAL} tokens by id"
        )
    found: dict[int, SpecialToken] = {}
    for key, entry in given.items():
        token = _special_token(key, entry, where)
        if token.id < first:
            raise GenerationError(
                f"{where}: added_tokens_decoder gives {shown(token.text)} the id {token.id}, which is a rank of "
                f"{TIKTOKEN_NAME} (line {token.id + 1}); fetch both again"
            )
        if token.id >= (size or first + _MOST_SPECIAL):
            raise GenerationError(
                f"{where}: added_tokens_decoder gives {shown(token.text)} the id {token.id}, beyond the model's "
                f"vocabulary of {size or first + _MOST_SPECIAL}; fetch it and config.json again"
            )
        if token.id in found:
            raise GenerationError(f"{where}: added_tokens_decoder has the id {token.id} twice; fetch it again")
        found[token.id] = token
    last = first + family.reserved
    for number in range(first, min(last, size) if size else last):
        found.setdefault(number, SpecialToken(f"<|reserved_token_{number}|>", number, hidden=True))
    ids: dict[str, int] = {}
    for token in found.values():
        if ids.setdefault(token.text, token.id) != token.id:
            raise GenerationError(
                f"{where}: added_tokens_decoder: {shown(token.text)} has the ids {ids[token.text]} and {token.id}; "
                "fetch it again"
            )
    return tuple(found[number] for number in sorted(found))


def _special_token(key: str, entry: Any, where: Path) -> SpecialToken:
    text = entry.get("content") if isinstance(entry, Mapping) else None
    special = entry.get("special", False) if isinstance(entry, Mapping) else None
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise GenerationError(f"{where}: added_tokens_decoder: {shown(key)} is no token id; fetch it again")
    if not isinstance(text, str) or not 0 < len(text) <= _MOST_SPECIAL_CHARACTERS or not isinstance(special, bool):
        raise GenerationError(
            f"{where}: added_tokens_decoder: {printable(key)} must have content, a text of 1 to "
            f"{_MOST_SPECIAL_CHARACTERS} characters, and special, true or false; fetch it again"
        )
    return SpecialToken(text, int(key), hidden=special)


def _check_names(config: Mapping[str, Any], where: Path, texts: set[str]) -> None:
    """Raise GenerationError for a named special token, such as bos_token, that the vocabulary does not have."""
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text not in texts:
            raise GenerationError(
                f"{where}: {name} {shown(text)} is none of the special tokens in added_tokens_decoder; fetch it again"
            )
