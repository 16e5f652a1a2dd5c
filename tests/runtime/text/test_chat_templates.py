"""Chat templates are given what transformers' own renderer gives them: the same text, or an error where it has one."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from npuq.errors import GenerationError
from npuq.runtime.text.conversation import ChatOptions
from npuq.runtime.text.tokenizer import Tokenizer

from .chat_styles import PLAIN_STYLES
from .conversations import CONVERSATIONS, DOCUMENTS, SETTINGS, WEATHER
from .tool_styles import TOOL_STYLES

STYLES = {**PLAIN_STYLES, **TOOL_STYLES}

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-deepseek-v3-fp8"


def write(directory: Path, template: Any, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    shutil.copy(EXAMPLE / "tokenizer.json", directory)
    values = {**json.loads((EXAMPLE / "tokenizer_config.json").read_text()), "chat_template": template, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return directory


def both(directory: Path) -> tuple[Any, Tokenizer]:
    """transformers' tokenizer of a directory, and ours."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(directory)), Tokenizer(directory)


def split(options: dict[str, Any]) -> dict[str, Any]:
    """The options that transformers' tokenizer is given, as ours takes them: the template's variables apart."""
    ours = {name: value for name, value in options.items() if name in ChatOptions.__annotations__}
    return {**ours, "chat_template_kwargs": {name: options[name] for name in options if name not in ours}}


@pytest.mark.parametrize("style", STYLES)
def test_published_styles(style: str, tmp_path: Path) -> None:
    theirs, ours = both(write(tmp_path / "model", STYLES[style]))
    rendered = 0
    for name, conversation in CONVERSATIONS.items():
        for setting, values in SETTINGS.items():
            options = {"add_generation_prompt": True, **values}
            before = copy.deepcopy((conversation, options))
            try:
                expected = theirs.apply_chat_template(conversation, tokenize=False, **options)
            except Exception:
                # Where a field that is None is missing to the template, it is tried once more with the field.
                if name != "calls without content":
                    with pytest.raises(GenerationError):
                        ours.render_chat(conversation, **split(options))
                continue
            rendered += 1
            assert ours.render_chat(conversation, **split(options)) == expected, (name, setting)
            ids = theirs.apply_chat_template(conversation, **options)["input_ids"]
            assert ours.chat(conversation, **split(options)) == ids, (name, setting)
            assert (conversation, options) == before
    assert rendered >= len(SETTINGS)


@pytest.mark.parametrize("style", ["chatml", "deepseek-v3.1", "glm-4.5", "gpt-oss", "gemma-3"])
@pytest.mark.parametrize("field", [True, "content", "reasoning_content"])
def test_a_final_message_that_goes_on(style: str, field: bool | str, tmp_path: Path) -> None:
    theirs, ours = both(write(tmp_path / "model", STYLES[style]))
    conversations = [
        CONVERSATIONS["an answer at the end"],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "text", "text": " Well, "}]}],
        CONVERSATIONS["calls without content"][:2],
    ]
    for conversation in conversations:
        options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": field}
        try:
            expected = theirs.apply_chat_template(conversation, tokenize=False, **options)
        except Exception:
            with pytest.raises(GenerationError):
                ours.render_chat(conversation, **split(options))
            continue
        assert ours.render_chat(conversation, **split(options)) == expected


def test_deepseek_asks_whether_content_is_none(tmp_path: Path) -> None:
    """transformers leaves fields out that are None, and this template fails without; then it is given them."""
    ours = Tokenizer(write(tmp_path / "model", STYLES["deepseek-v3"]))
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"place": "Köln"}'}}
    text = ours.render_chat(
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "grey"},
        ]
    )
    assert text == (
        "<|bos|><|User|>Weather?<|Assistant|><|calls|><|call|>function<|sep|>weather\n"
        '```json\n{"place": "Köln"}\n```<|call_end|><|outputs|><|output|>grey<|output_end|><|outputs_end|>'
    )


def test_which_of_several_templates(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", STYLES["command-r, named"])
    theirs, ours = both(directory)
    question = CONVERSATIONS["a question"]
    for options in (
        {},
        {"tools": [WEATHER]},
        {"tools": []},
        {"chat_template": "rag", "documents": DOCUMENTS},
        {"chat_template": "default", "tools": [WEATHER]},
        {"chat_template": "{{ messages | length }}"},
    ):
        expected = theirs.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **options)
        assert ours.render_chat(question, **options) == expected
    # Files of their own come before those of the configuration, all of them.
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("rag file")
    theirs, ours = both(directory)
    assert ours.render_chat("x", chat_template="rag") == "rag file"
    with pytest.raises(ValueError, match="rag"):
        theirs.apply_chat_template(question, tokenize=False)
    with pytest.raises(GenerationError, match="no default chat template; name one of rag"):
        ours.render_chat("x")
    (directory / "chat_template.jinja").write_text("default file\r\n")
    theirs, ours = both(directory)
    assert ours.render_chat("x") == theirs.apply_chat_template(question, tokenize=False) == "default file"


def test_special_tokens_by_name(tmp_path: Path) -> None:
    template = "{% for t in [bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token] %}[{{ t }}]"
    template += "{{ t is defined }}{% endfor %}"
    token = {"__type": "AddedToken", "content": "<|doc|>", "lstrip": False, "rstrip": False, "normalized": False}
    for config in ({}, {"bos_token": token}, {"sep_token": "<|sep|>", "pad_token": None}):
        theirs, ours = both(write(tmp_path / "model", template, **config))
        assert ours.render_chat("x") == theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    (tmp_path / "model" / "special_tokens_map.json").write_text(json.dumps({"cls_token": {"content": "<|cls|>"}}))
    theirs, ours = both(tmp_path / "model")
    assert ours.render_chat("x") == theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert "[<|cls|>]True" in ours.render_chat("x")
