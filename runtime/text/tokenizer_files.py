"""Reading of a checkpoint's tokenizer files, with limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...errors import GenerationError
from ...inputs.files import inside, is_inside, read_bytes, read_given_text, read_text
from ...inputs.json_text import read_object
from ...inputs.printable import printable, shown
from .codec import Codec, FastCodec
from .tiktoken_files import TiktokenFiles
from .tokenizer_check import MOST_CONFIG_BYTES, SPECIAL_TOKENS, TIKTOKEN_NAME, require_tokenizer
from .tokenizer_conversion import converted

_MOST_TEMPLATE_BYTES: Final = 1 << 20


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

    codec: Codec
    special_tokens: Mapping[str, str]
    templates: Mapping[str, ChatTemplate]
    adds_bos: bool

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        """Read a directory's files. Raises GenerationError for a missing tokenizer and for a malformed file."""
        path = directory / "tokenizer_config.json"
        config: Mapping[str, Any] = {}
        if is_inside(directory, path.name):
            config = read_object(inside(directory, path.name, GenerationError), GenerationError, MOST_CONFIG_BYTES)
        return cls(
            codec=_codec(directory, config),
            special_tokens=_special_tokens(directory, config),
            templates=_templates(directory, config),
            adds_bos=config.get("add_bos_token") is True,
        )


def read_template(path: Path) -> ChatTemplate:
    """Read a chat template from a file that the user names. Raises GenerationError for one that cannot be read."""
    source = read_given_text(path, GenerationError)
    if len(source) > _MOST_TEMPLATE_BYTES:
        raise GenerationError(f"{path}: the template is longer than the {_MOST_TEMPLATE_BYTES} npuq reads")
    return ChatTemplate(source, str(path))


def _codec(directory: Path, config: Mapping[str, Any]) -> Codec:
    """The tokenizer of a directory's files, of the first kind that it has."""
    if is_inside(directory, "tokenizer.json"):
        path = inside(directory, "tokenizer.json", GenerationError)
        return FastCodec(read_bytes(path, GenerationError), path)
    require_tokenizer(directory)
    if is_inside(directory, TIKTOKEN_NAME):
        from .tiktoken_codec import TiktokenCodec  # only few models need the library

        return TiktokenCodec(TiktokenFiles.read(directory, config))
    return converted(directory)


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, of tokenizer_config.json; special_tokens_map.json of older checkpoints overrides them."""
    where, given = directory / "tokenizer_config.json", dict(config)
    name = "special_tokens_map.json"
    if "added_tokens_decoder" not in config and is_inside(directory, name):
        where = directory / name
        given |= read_object(inside(directory, name, GenerationError), GenerationError, MOST_CONFIG_BYTES)
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
