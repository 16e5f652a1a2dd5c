"""Conversations of one model: their prompts, the format of its replies, and grammars for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from threading import Lock
from typing import Any

from ...errors import GenerationError
from ...runtime import LanguageModel, Request, SamplingParams
from ...runtime.sampling.structured.compiler import GrammarCompiler, MakeGrammar
from ...runtime.sampling.structured.constraint import Constraint, constrain
from ...runtime.text.conversation import TemplateLimitError
from ...runtime.text.replies.formats import ReplyFormat
from ..http.errors import bad_request
from .messages import template_messages, template_variables
from .request import ChatRequest
from .tools import Offer, described, offer


class Conversations:
    """Makes requests of the runtime from chat requests. May be used by several threads.

    format: how the model writes its replies; None: as its chat template says.
    """

    def __init__(self, model: LanguageModel, format: ReplyFormat | None):
        self._model = model
        self._given_format = format
        self._making = Lock()

    @cached_property
    def format(self) -> ReplyFormat:
        """The format of replies, without tools."""
        return self._given_format or self._model.reply_format

    def request(self, asked: ChatRequest, params: SamplingParams, salt: bytes) -> Request:
        """The runtime's request. Raises ApiError or GenerationError for one that cannot be served."""
        _refuse(asked)
        tools = offer(asked)
        if tools.calls != "none" and self.format.calls is None:
            raise bad_request("this server does not know how its model calls tools; see npuq serve --tools", "tools")
        parallel = asked.parallel_tool_calls is not False
        format = replace(self.format, tools=tools.callable, parallel=parallel)
        prompt = self._prompt(asked, tools)
        constraint = Constraint(
            _schema(asked), tools.calls, parallel, sum(len(message.tool_calls or ()) for message in asked.messages)
        )
        grammar = self._grammar(format, prompt, constraint, params) if constraint.needs_grammar(format) else None
        return Request([prompt], params, grammar, salt, format)

    def _prompt(self, asked: ChatRequest, tools: Offer) -> list[int]:
        messages = template_messages(asked.messages)
        variables = template_variables(asked.reasoning_effort, asked.chat_template_kwargs)

        def render(given: Sequence[dict[str, Any]]) -> list[int]:
            return self._model.tokenizer.chat(messages, tools=list(given) or None, chat_template_kwargs=variables)

        try:
            return render(tools.shown)
        except TemplateLimitError:  # it would take as long again, and all chats wait for it
            raise
        except GenerationError:
            whole = described(tools.shown)
            if whole == list(tools.shown):
                raise
        return render(whole)  # DeepSeek-V3.1's template needs each tool's description

    def _grammar(
        self, format: ReplyFormat, prompt: Sequence[int], constraint: Constraint, params: SamplingParams
    ) -> MakeGrammar:
        if params.ignore_eos or params.min_tokens:
            raise bad_request("ignore_eos and min_tokens contradict a required form of the answer", "response_format")
        with self._making:
            compiler = self._compiler
        try:
            return constrain(compiler, self._model.tokenizer, format, prompt, constraint)
        except GenerationError as error:
            raise bad_request(str(error), "tools" if constraint.schema is None else "response_format") from None

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        tokenizer = self._model.tokenizer
        ids = (tokenizer.token_id(marker) for marker in self.format.markers)
        return GrammarCompiler(tokenizer, self._model.engine.eos_ids, [id for id in ids if id is not None])


def _schema(asked: ChatRequest) -> dict[str, Any] | None:
    """The schema of the content; None for any text."""
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise bad_request("response_format: json_schema has no schema", "response_format")
    return wanted.json_schema.schema


def _refuse(asked: ChatRequest) -> None:
    """Raise ApiError for fields that are not served, and would change what the answer means."""
    if asked.chat_template is not None:
        raise bad_request(
            "chat_template is the server's, and no request's: see npuq serve --chat-template", "chat_template"
        )
    for name in ("functions", "function_call"):
        if getattr(asked, name) is not None:
            raise bad_request(f"{name} is not served: give tools and tool_choice", name)
    for name in ("echo", "suffix"):
        if getattr(asked, name):
            raise bad_request(f"{name} is not a field of chat", name)
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise bad_request("best_of is not served beyond n", "best_of")
