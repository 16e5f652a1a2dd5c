"""Tool calls in a conversation as clients of OpenAI's protocol send them: arguments are text of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npuq.errors import GenerationError
from npuq.runtime.text.tokenizer import Tokenizer

from .reply_formats import EXAMPLE, tokenizer_with
from .test_chat_templates import both, write
from .tool_styles import TOOL_STYLES

ARGUMENTS = {"place": "Köln <東京>", "days": [1, 2]}


def conversation(arguments: Any, content: Any = None) -> list[dict[str, Any]]:
    call = {"id": "functions.weather:0", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.weather:0", "content": "wet"},
    ]


@pytest.mark.parametrize("style", ["deepseek-v3.1", "kimi-k2", "qwen3", "glm-4.5", "qwen2.5", "hermes"])
def test_text_of_arguments_is_an_object_for_the_template(style: str, tmp_path: Path) -> None:
    """What transformers renders of an object: the template writes its JSON."""
    theirs, ours = both(write(tmp_path / "model", TOOL_STYLES[style]))
    text = ours.render_chat(conversation(json.dumps(ARGUMENTS, ensure_ascii=True), "I look."))
    expected = theirs.apply_chat_template(
        conversation(ARGUMENTS, "I look."), tokenize=False, add_generation_prompt=True
    )
    assert text == expected and "Köln <東京>" in text


def test_a_template_that_joins_arguments_with_text_gets_text(tmp_path: Path) -> None:
    """As DeepSeek-V3's own."""
    ours = Tokenizer(write(tmp_path / "model", TOOL_STYLES["deepseek-v3"]))
    text = ours.render_chat(conversation('{"place":  "Köln"}'))
    assert '<|sep|>weather\n```json\n{"place":  "Köln"}\n```<|call_end|>' in text


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "3", "[" * 5000, None])
def test_arguments_that_are_no_object_stay_as_they_are(arguments: Any, tmp_path: Path) -> None:
    tokenizer_with(tmp_path, ())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[1].tool_calls[0].function.arguments }}")
    assert Tokenizer(tmp_path).render_chat(conversation(arguments)) == str(arguments)


def test_a_failing_template_says_what_it_says_of_the_messages_as_given(tmp_path: Path) -> None:
    tokenizer_with(tmp_path, ())
    (tmp_path / "chat_template.jinja").write_text(
        "{{ raise_exception('no ' + messages[1].tool_calls[0].function.arguments) }}"
    )
    with pytest.raises(GenerationError, match=r"the chat template failed: no \{\}"):
        Tokenizer(tmp_path).render_chat(conversation("{}"))


# ---- a template of the user's own ------------------------------------------------------------------------------------


def test_a_file_replaces_the_models_templates(tmp_path: Path) -> None:
    tokenizer_with(tmp_path, ())
    (tmp_path / "chat_template.jinja").write_text("the model's")
    own = tmp_path / "own.jinja"
    own.write_text("mine: {{ messages[0].content }} <think>", encoding="utf-8")
    tokenizer = Tokenizer(tmp_path, own)
    assert tokenizer.render_chat("é") == "mine: é <think>"
    assert tokenizer.has_chat_template and list(tokenizer.templates) == ["default"]


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"x" * (1 << 21)])
def test_a_file_that_is_no_template(content: bytes | None, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    if content is not None:
        own.write_bytes(content)
    with pytest.raises(GenerationError, match=r"own\.jinja: ") as caught:
        Tokenizer(EXAMPLE, own)
    assert "\n" not in str(caught.value)
