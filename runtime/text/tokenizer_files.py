"""Reading of a checkpoint's tokenizer files, with limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from tokenizers import Tokenizer as FastTokenizer

from ...errors import GenerationError
from ...inputs.files import inside, is_inside, read_bytes, read_text
from ...inputs.json_text import read_object
from ...inputs.printable import printable, shown
from .tokenizer_conversion import SPECIAL_TOKENS, converted
from .tokenizer_parts import check_growth, check_parts

_MOST_TEMPLATE_BYTES: Final = 1 << 20
_MOST_CONFIG_BYTES: Final = 16 << 20

_T = TypeVar("_T")


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja source of a chat template, and the file that holds it."""

    source: str
    where: str


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents of a checkpoint's tokenizer files.

    special_tokens: texts by name, of the names that it has. templates: by name; "default" is for plain conversations.
    """

    fast: FastTokenizer
    special_tokens: Mapping[str, str]
    templates: Mapping[str, ChatTemplate]
    adds_bos: bool

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        """Read a directory's files. Raises GenerationError for a missing tokenizer and for a malformed file."""
        path = directory / "tokenizer_config.json"
        config: Mapping[str, Any] = {}
        if is_inside(directory, path.name):
            config = read_object(inside(directory, path.name, GenerationError), GenerationError, _MOST_CONFIG_BYTES)
        return cls(
            fast=_fast_tokenizer(directory),
            special_tokens=_special_tokens(directory, config),
            templates=_templates(directory, config),
            adds_bos=config.get("add_bos_token") is True,
        )


def guarded(call: Callable[[], _T], doing: str) -> _T:
    """Call into the tokenizers library, with its failures as GenerationError.

    The library raises plain Exception for all its errors. For a panic of its code it raises a BaseException, which
    `except Exception` does not catch.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError, GenerationError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = printable(" ".join(str(error).split()))[:120] or type(error).__name__
        raise GenerationError(f"{doing}: {reason}") from error


def _fast_tokenizer(directory: Path) -> FastTokenizer:
    if is_inside(directory, "tokenizer.json"):
        path = inside(directory, "tokenizer.json", GenerationError)
        content = read_bytes(path, GenerationError)
    else:
        path = directory
        content = converted(directory, guarded)
    check_parts(content, path)
    fast = guarded(lambda: FastTokenizer.from_buffer(content), f"{path}: cannot be read as a tokenizer")
    check_growth(fast, path)
    # Settings of training that stay in the file: they would truncate or pad prompts silently.
    fast.no_truncation()
    fast.no_padding()
    return fast


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, of tokenizer_config.json; special_tokens_map.json of older checkpoints overrides them."""
    where, given = directory / "tokenizer_config.json", dict(config)
    name = "special_tokens_map.json"
    if "added_tokens_decoder" not in config and is_inside(directory, name):
        where = directory / name
        given |= read_object(inside(directory, name, GenerationError), GenerationError, _MOST_CONFIG_BYTES)
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = given.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if text is None:
            continue
        if not isinstance(text, str):
            raise GenerationError(f"{where}: {name} must be text, not {shown(text)}")
        tokens[name] = text
    return tokens


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """Templates by name. Template files replace those of tokenizer_config.json, as in transformers."""
    files = {"chat_template.jinja": "default"} if is_inside(directory, "chat_template.jinja") else {}
    folder = directory / "additional_chat_templates"
    if folder.is_dir():
        files |= {f"{folder.name}/{path.name}": path.stem for path in sorted(folder.glob("*.jinja"))}
    if files:
        paths = {name: inside(directory, file, GenerationError) for file, name in files.items()}
        return {
            name: ChatTemplate(read_text(path, GenerationError, _MOST_TEMPLATE_BYTES), str(path))
            for name, path in paths.items()
        }
    given, where = config.get("chat_template"), str(directory / "tokenizer_config.json")
    if isinstance(given, list):
        entries = [entry for entry in given if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)]
        if len(entries) != len(given):
            raise GenerationError(f"{where}: chat_template must list objects with name and template")
        given = {entry["name"]: entry.get("template") for entry in entries}
    named = given if isinstance(given, Mapping) else {"default": given} if given is not None else {}
    for name, source in named.items():
        if not isinstance(source, str):
            raise GenerationError(f"{where}: chat_template {printable(repr(name))} must be text")
        if len(source) > _MOST_TEMPLATE_BYTES:
            raise GenerationError(f"{where}: chat_template is longer than the {_MOST_TEMPLATE_BYTES} npuq reads")
    return {name: ChatTemplate(source, where) for name, source in named.items()}
