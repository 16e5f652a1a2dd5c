"""Text to tokens and back, by `tokenizer.json` and the `tokenizers` library alone: no model code, no remote code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from ..errors import GenerationError

_MAX_HELD = 16
"""Tokens that text may be held back for while it ends in an unfinished UTF-8 sequence."""


class Tokenizer:
    """A checkpoint's tokenizer. GenerationError when there is none, or when it cannot be read.

    bos_id: the beginning-of-sequence token, or None. `chat_template` is Jinja source, or None.
    """

    def __init__(self, directory: Path):
        self._fast = _load(directory)
        self._config = _read_config(directory / "tokenizer_config.json")
        self._special = {
            name: _content(self._config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self.chat_template = _chat_template(directory, self._config)
        self._adds_bos = self._config.get("add_bos_token") is True

    @property
    def vocab_size(self) -> int:
        return self._fast.get_vocab_size()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a prompt (by its post-processor or its config)."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=special).ids
        if special and self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a conversation that the model is to continue, `[{"role": "user", "content": …}, …]`.

        The template runs in Jinja's immutable sandbox. GenerationError when there is none, or when it fails.
        """
        if self.chat_template is None:
            raise GenerationError("the tokenizer has no chat template; give a plain prompt instead")
        text = _render(self.chat_template, messages, self._special)
        ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
        return ids

    def _id_of(self, name: str) -> int | None:
        token = self._special[name]
        return None if token is None else self._fast.token_to_id(token)


class Detokenizer:
    """Turns tokens into text one at a time. What it has given out never changes later.

    A token can end within a UTF-8 sequence: its text is held back until the sequence is complete. Text is decoded with
    a few tokens of context before it, because decoders treat the first token of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._context = list(prompt[-4:])
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that became certain with this token, often empty."""
        self._pending.append(token)
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < _MAX_HELD:
            return ""
        return self._give(text)

    def flush(self) -> str:
        """What is held back at the end, unfinished sequences as U+FFFD."""
        return self._give(self._text())

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode([*self._context, *self._pending])[len(before) :]

    def _give(self, text: str) -> str:
        # Tokens without text (special ones) must not push the context out.
        self._context = [*self._context, *self._pending][-4:] if text else self._context
        self._pending = []
        return text


def _load(directory: Path) -> FastTokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        return _convert(directory)
    try:
        return FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for everything
        raise GenerationError(f"{path}: cannot be read as a tokenizer: {str(error)[:120]}") from error


def _convert(directory: Path) -> FastTokenizer:
    """A tokenizer without tokenizer.json, as transformers converts it; code from the checkpoint is never run."""
    missing = f"{directory}: no tokenizer.json; copy the model's tokenizer files there"
    if not (directory / "tokenizer_config.json").is_file():
        raise GenerationError(missing)
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise GenerationError(f"{missing}, or install transformers to convert an older format") from None
    try:
        converted = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        backend: FastTokenizer = converted.backend_tokenizer
    except Exception as error:  # every tokenizer class fails in its own way
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise GenerationError(f"{missing}; transformers cannot convert what is there: {reason}") from error
    return backend


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GenerationError(f"{path}: cannot be read: {str(error)[:120]}") from error
    if not isinstance(config, dict):
        raise GenerationError(f"{path}: not a JSON object")
    return config


def _content(token: object) -> str | None:
    """A special token is its text, or an object that holds it."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _render(template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str | None]) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    tokens = {name: token or "" for name, token in special.items()}
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)
    except Exception as error:  # templates are programs: anything may go wrong in them
        raise GenerationError(f"the chat template failed: {str(error)[:160]}") from error
