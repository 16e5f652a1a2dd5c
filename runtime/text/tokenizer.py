"""Tokenizer of a checkpoint, without model code or remote code: its files' codec, chat templates and stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import GenerationError
from ...inputs.printable import printable
from ...inputs.template import TemplateRenderer
from . import conversation
from .conversation import ChatOptions, Message, TemplateLimitError
from .tokenizer_files import ChatTemplate, TokenizerFiles, read_template

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Tokenizer:
    """A checkpoint's tokenizer. Raises GenerationError for a checkpoint without one, or with one that cannot be read.

    chat_template: a file with a template that replaces the checkpoint's own. bos_id, eos_id: ids of the tokenizer's own
    special tokens, or None. May be used by several threads.
    """

    def __init__(self, directory: Path, chat_template: Path | None = None):
        files = TokenizerFiles.read(directory)
        self._codec = files.codec
        self._special = files.special_tokens
        self._templates = files.templates if chat_template is None else {"default": read_template(chat_template)}
        self._renderer = TemplateRenderer(GenerationError, TemplateLimitError)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self._adds_bos = files.adds_bos

    @property
    def vocab_size(self) -> int:
        return self._codec.vocab_size

    @property
    def has_chat_template(self) -> bool:
        """True if `chat` needs no template from its caller."""
        return "default" in self._templates

    @property
    def templates(self) -> Mapping[str, ChatTemplate]:
        """Chat templates by name."""
        return self._templates

    def token_id(self, token: str) -> int | None:
        """Id of the token with that text; None if there is none."""
        return self._codec.token_id(token)

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Token ids of special tokens by their text. Decoded text leaves them out."""
        return self._codec.special_ids

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds the special tokens around a prompt (by post-processor or config)."""
        ids = self._codec.encode(text, special)
        if special and self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._codec.decode(ids)

    def token_bytes(self, id: int) -> bytes:
        """Bytes that a token stands for, also part of a character; of a special token its name."""
        return self._codec.token_bytes(id)

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[int]:
        """Token ids of a conversation, rendered by the model's chat template for the model to continue.

        messages: `[{"role": "user", "content": "…"}, …]`; a text is one user message. system: text of a system message
        before them. tools: JSON schemas of functions. documents: objects with title and text. chat_template: the name
        of one of the model's templates, or Jinja source; None is "tool_use" with tools, if the model has it, else
        "default". add_generation_prompt (True): append the beginning of an answer. continue_final_message: leave the
        last message open, for the model to continue (a text names another field than content). chat_template_kwargs:
        other variables of the template, such as `{"thinking": True}`.

        Templates run in Jinja's sandbox in a process of their own, with the variables that transformers gives them.
        Raises GenerationError for a model without a template, a template that fails or reaches a limit, and values
        that are not JSON.
        """
        text = self.render_chat(messages, chat_template_kwargs=chat_template_kwargs, **options)
        return self._codec.encode(text, special=False)

    def render_chat(
        self,
        messages: str | Sequence[Message],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> str:
        """Text of a conversation, before `chat` encodes it."""
        chosen, variables = conversation.checked_options(options, chat_template_kwargs)
        tools, continued = chosen.get("tools"), chosen.get("continue_final_message", False)
        template = self._template(chosen.get("chat_template"), with_tools=tools is not None)
        if tools and self._codec.sorts_tools:
            try:
                tools = conversation.in_key_order(tools)
            except RecursionError:
                raise GenerationError("tools are nested too deeply") from None
            conversation.check_computed(template.source, variables, template.where)
        values = {
            **self._special,
            **variables,
            "tools": tools,
            "documents": chosen.get("documents"),
            "add_generation_prompt": chosen.get("add_generation_prompt", True) and not continued,
        }
        return conversation.render(
            conversation.as_messages(messages, chosen.get("system")),
            continued,
            template.source,
            lambda given: self._renderer.render(template.source, {**values, "messages": given}, template.where),
        )

    def split_stops(self, stops: Iterable[str]) -> tuple[tuple[str, ...], frozenset[int]]:
        """Split stops into strings to search in the text, and ids of special tokens.

        Decoded text leaves special tokens out, so a stop string with a special token and other text could never match:
        it raises GenerationError.
        """
        texts, ids = [], set()
        for stop in stops:
            if stop in self.special_ids:
                ids.add(self.special_ids[stop])
                continue
            inner = next((token for token in self.special_ids if token in stop), None)
            if inner is not None:
                raise GenerationError(
                    f"the stop string {printable(repr(stop))} holds the special token {printable(inner)}, which is no "
                    "part of the text; give the token alone"
                )
            texts.append(stop)
        return tuple(texts), frozenset(ids)

    def _template(self, name: str | None, *, with_tools: bool) -> ChatTemplate:
        """The template of that name or source; without either, the one that transformers chooses."""
        templates = self._templates
        if name is not None:
            return templates.get(name) or ChatTemplate(name, "chat_template")
        if with_tools and "tool_use" in templates:
            return templates["tool_use"]
        if "default" in templates:
            return templates["default"]
        if templates:
            known = printable(", ".join(sorted(templates)))[:200]
            raise GenerationError(f"the tokenizer has no default chat template; name one of {known}")
        raise GenerationError("the tokenizer has no chat template; give a plain prompt instead")

    def _id_of(self, name: str) -> int | None:
        token = self._special.get(name)
        return None if token is None else self._codec.token_id(token)
