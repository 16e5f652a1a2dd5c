"""The example as a model that thinks and calls tools: markers as tokens, a chat template, and replies by script."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from npuq.runtime import Grammar, LanguageModel, Request, SamplingParams, Tokenizer
from npuq.runtime.text.replies.formats import ReplyFormat
from npuq.serve.chat.conversations import Conversations
from npuq.serve.chat.request import ChatRequest

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-deepseek-v3-fp8"
THINK = ("<think>", "</think>")
DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))
KIMI = tuple(f"<|tool_{name}|>" for name in ("calls_section_begin", "calls_section_end", "call_begin", "call_end"))
KIMI += ("<|tool_call_argument_begin|>",)
MARKERS = (*THINK, *DEEPSEEK, *KIMI)

_TOKENS = json.loads((EXAMPLE / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
COMPACT = {"logit_bias": {str(id): -100 for token, id in _TOKENS.items() if not token.strip("ĠĊĉč")}}
"""Fields with which the example writes JSON without white space: its choice among all that JSON allows is long."""

# Of the structure of DeepSeek-V3.1's: thinking by a variable, arguments as text or object, each tool described.
V31 = """
{%- if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- set ns = namespace(user=false) %}
{%- for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}
{%- if tools %}{{ '\\nTools:' }}
    {%- for tool in tools %}{{ '\\n' + tool.function.name + ': ' + tool.function.description + ' ' + (tool.function.parameters | tojson) }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.user = true %}{{ '\\nUser: ' + message.content }}
    {%- elif message.role == 'tool' %}{% set ns.user = false %}{{ '\\nOutput: ' + message.content }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {%- if ns.user %}{{ '\\nAssistant: </think>' }}{% endif %}{% set ns.user = false %}
        {%- if message['content'] is not none %}{{ message['content'] }}{% endif %}{{ '<｜tool▁calls▁begin｜>' }}
        {%- for call in message.tool_calls %}
            {%- set arguments = call.function.arguments if call.function.arguments is string else call.function.arguments | tojson %}
            {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + arguments + '<｜tool▁call▁end｜>' }}
        {%- endfor %}{{ '<｜tool▁calls▁end｜>' }}
    {%- elif message.role == 'assistant' %}{{ '\\nAssistant: </think>' + message.content }}{% set ns.user = false %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\nAssistant: ' + ('<think>' if thinking else '</think>') }}{% endif %}"""  # noqa: E501

# Of the structure of Kimi-K2's: the ids of calls are printed back.
KIMI_K2 = """
{%- if tools %}{{ 'tools ' + (tools | tojson) + '\\n' }}{% endif %}
{%- for message in messages %}
    {{- message.role + ': ' }}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- if message.content %}{{ message.content }}{% endif %}{{ '<|tool_calls_section_begin|>' }}
        {%- for call in message.tool_calls %}
            {{- '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' }}
            {%- if call.function.arguments is string %}{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}
            {{- '<|tool_call_end|>' }}
        {%- endfor %}{{ '<|tool_calls_section_end|>' }}
    {%- elif message.role == 'tool' %}{{ 'Return of ' + message.tool_call_id + ': ' + message.content }}
    {%- elif message.content is string %}{{ message.content }}{% endif %}{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""  # noqa: E501


def write_tokenizer(directory: Path, template: str) -> Tokenizer:
    """The example's tokenizer with its last tokens replaced by markers, so that the model has logits for them."""
    directory.mkdir()
    shutil.copy(EXAMPLE / "tokenizer_config.json", directory)
    content = json.loads((EXAMPLE / "tokenizer.json").read_text(encoding="utf-8"))

    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    by_id = {id: token for token, id in vocabulary.items()}
    for n, marker in enumerate(MARKERS):
        id = len(by_id) - 1 - n
        assert "".join(merges.pop()) == by_id[id]
        del vocabulary[by_id[id]]
        vocabulary[marker] = id
        content["added_tokens"].append({**content["added_tokens"][0], "id": id, "content": marker, "special": False})
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer(directory)


class Script:
    """A grammar that forces tokens; after them another goes on, which takes them too, or the reply ends with `end`."""

    def __init__(self, tokens: Sequence[int], size: int, end: int, then: Grammar | None):
        self._left = list(tokens)
        self._size, self._end, self._then = size, end, then

    def mask(self) -> np.ndarray | None:
        if not self._left and self._then is not None:
            return self._then.mask()
        mask = np.zeros(self._size, np.bool_)
        mask[self._left[0] if self._left else self._end] = True
        return mask

    def accept(self, token: int) -> None:
        if self._left:
            del self._left[0]
        if self._then is not None:
            self._then.accept(token)


class ScriptedConversations(Conversations):
    """Conversations whose replies are written beforehand, for what the example cannot say. Everything else is real.

    texts: of the next request's choices. goes_on: behind them the request's own grammar goes on.
    """

    def __init__(self, model: LanguageModel, format: ReplyFormat | None = None):
        super().__init__(model, format)
        self.tokenizer = model.tokenizer
        self.texts: list[str] = []
        self.goes_on = False
        self.prompt = ""

    def say(self, *texts: str, goes_on: bool = False) -> None:
        self.texts, self.goes_on = list(texts), goes_on

    def request(self, asked: ChatRequest, params: SamplingParams, salt: bytes) -> Request:
        request = super().request(asked, params, salt)
        self.prompt = self.tokenizer.decode(request.prompts[0])
        if not self.texts:
            return request
        waiting, self.texts = iter(self.texts), []
        own = request.grammar if self.goes_on else None

        def make() -> Any:
            tokens = self.tokenizer.encode(next(waiting), special=False)
            return Script(tokens, self.tokenizer.vocab_size, self.tokenizer.eos_id or 0, own and own())

        return replace(request, grammar=make)
