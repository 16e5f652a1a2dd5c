"""What the Python API takes as prompts, options and conversations, and how it refuses the rest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import npuq
from npuq.errors import BackendError, GenerationError
from npuq.runtime import Completion, EngineConfig, LanguageModel, SamplingParams, Tokenizer
from npuq.runtime.text.conversation import TemplateLimitError, as_messages, render

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if thinking %}think{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """The example with a chat template."""
    directory = Path(shutil.copytree(example_fp8, tmp_path_factory.mktemp("chatty") / "model"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return npuq.load(directory, "cpu")


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_a_list_of_ids_is_one_prompt(chatty: LanguageModel) -> None:
    ids = chatty.tokenizer.chat("Hi")
    done = chatty.generate(ids, max_new_tokens=4, temperature=0)
    assert isinstance(done, Completion)
    for same in (tuple(ids), np.array(ids), torch.tensor(ids), [np.int64(token) for token in ids]):
        assert chatty.generate(same, max_new_tokens=4, temperature=0).token_ids == done.token_ids  # type: ignore[call-overload]
    both = chatty.generate([ids, "Hi"], max_new_tokens=4, temperature=0)
    assert [type(both), len(both), both[0].token_ids] == [list, 2, done.token_ids]
    assert chatty.generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ({"role": "user"}, "dict"),
        ([{"role": "user", "content": "Hi"}], "dict"),
        ([[1.5, 2]], r"\[1\.5, 2\]"),
        ([1, "a"], r"\[1, 'a'\]"),
        ([True, False], "bool"),
        (b"bytes", "bytes"),
        (None, "NoneType"),
        (5, "int"),
        ([None], "NoneType"),
    ],
)
def test_what_is_no_prompt(chatty: LanguageModel, prompts: Any, named: str) -> None:
    with pytest.raises(
        GenerationError, match=f"a prompt is a text or a list of token ids, not (a )?{named}; .*model.chat"
    ):
        chatty.generate(prompts)


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ("text", "a prompt is"),
        (5, "a prompt is .* not a int"),
        ([1, 2], "a prompt is .* not a int"),
        (["text"], "a prompt is .* not a str"),
        ([[1.5]], r"a prompt is .* not \[1\.5\]"),
        ([[True]], r"a prompt is .* not \[True\]"),
        ([[]], "the prompt is empty"),
        ([[-1]], "token id -1 is outside"),
        ([[5, 10**5000]], "token id of more than 63 bits is outside"),
        ([[5] * 5000], "5000 tokens are more than the context"),
    ],
)
def test_what_has_no_logits(chatty: LanguageModel, sequences: Any, expected: str) -> None:
    with pytest.raises(GenerationError, match=expected):
        list(chatty.logits(sequences))


def test_logits_of_any_integers(chatty: LanguageModel) -> None:
    expected = next(chatty.logits([[3, 4, 5]]))
    for same in (np.array([[3, 4, 5]]), torch.tensor([[3, 4, 5]]), ((3, 4, 5),)):
        assert torch.equal(next(chatty.logits(same)), expected)  # type: ignore[arg-type]
    rows = torch.tensor([[3], [4]])  # prompts of one token each, and not one of two
    assert len(chatty.generate(rows, max_new_tokens=1)) == 2  # type: ignore[call-overload]


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temprature": 1.0}, "unknown option temprature; npuq knows max_new_tokens, temperature"),
        ({"temperature": "hot"}, "temperature 'hot' is not valid: it must be a number from 0"),
        ({"temperature": True}, "temperature True is not valid"),
        ({"temperature": float("nan")}, "temperature nan is not valid"),
        ({"temperature": 10**400}, "temperature 1000.* is not valid"),
        ({"top_k": 2.5}, r"top_k 2\.5 is not valid: it must be a whole number"),
        ({"max_new_tokens": "7"}, "max_new_tokens '7' is not valid"),
        ({"seed": 1.0}, r"seed 1\.0 is not valid"),
        ({"stop": 5}, "stop 5 is not valid: it must be a text or a list of texts"),
        ({"stop": ["a", None]}, "stop .* is not valid"),
        ({"temperature": 10**5000}, "temperature of type int is not valid"),
        ({"ignore_eos": "yes"}, "ignore_eos 'yes' is not valid: it must be True or False"),
        ({"presence_penalty": 2.1}, r"presence_penalty 2\.1 is not valid: it must be a number from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan is not valid"),
        ({"min_tokens": -1}, "min_tokens -1 is not valid"),
        ({"min_tokens": 9, "max_new_tokens": 8}, "min_tokens 9 is above max_new_tokens 8"),
        ({"n": 0}, "n 0 is not valid"),
        ({"logprobs": 1025}, "logprobs 1025 is not valid: it must be None or 0 to 1024"),
        ({"logprobs": True}, "logprobs True is not valid"),
        ({"stop_token_ids": [1, -1]}, r"stop_token_ids \[1, -1\] is not valid: it must be a list of token ids"),
        ({"stop_token_ids": 5}, "stop_token_ids 5 is not valid"),
        ({"stop_token_ids": "12"}, "stop_token_ids '12' is not valid"),
        ({"logit_bias": [1]}, r"logit_bias \[1\] is not valid: it must map token ids to numbers"),
        ({"logit_bias": {"1": 1}}, "logit_bias .* is not valid: it must map token ids to numbers from -100 to 100"),
        ({"logit_bias": {1: 101}}, "logit_bias .* is not valid"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias .* is not valid"),
        ({"logit_bias": {-1: 1}}, "logit_bias .* is not valid"),
    ],
)
def test_bad_options_are_named(chatty: LanguageModel, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(GenerationError, match=expected):
        chatty.generate("x", **options)


def test_parameters_of_another_type(chatty: LanguageModel) -> None:
    for wrong in ({"temperature": 0}, 5, "greedy"):
        with pytest.raises(GenerationError, match="params must be SamplingParams, not a"):
            chatty.generate("x", wrong)  # type: ignore[call-overload]
    with pytest.raises(GenerationError, match="engine must be an EngineConfig, not a int"):
        npuq.load(chatty.directory, "cpu", engine=5)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"dtype must be a torch\.dtype, not 'float32'"):
        npuq.load(chatty.directory, "cpu", "float32")  # type: ignore[arg-type]


def test_options_in_other_libraries_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint8(4), stop="end")  # type: ignore[arg-type]
    assert params == SamplingParams(temperature=0.5, top_k=3, seed=4, stop=("end",))
    assert type(params.top_k) is int
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]
    biased = SamplingParams(logit_bias={np.int64(3): np.float32(0.5)}, stop_token_ids={np.int32(4)})  # type: ignore[dict-item, arg-type]
    assert (biased.logit_bias, biased.stop_token_ids) == ({3: 0.5}, (4,))
    assert hash(biased) is not None
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_a_cache_without_a_size_is_sized_by_memory() -> None:
    assert EngineConfig(kv_cache_bytes=None) == EngineConfig()
    for value in ("64", 64.0, True):
        with pytest.raises(GenerationError, match="kv_cache_bytes must be a whole number"):
            EngineConfig(kv_cache_bytes=value)  # type: ignore[arg-type]


def test_blocks_without_a_size_have_the_backends(chatty: LanguageModel) -> None:
    config = chatty.engine.model.config
    for backend, other, size in (("cpu", None, 64), ("ascend", None, 128), ("cpu", config.rope, 128)):
        sizes = EngineConfig().on(backend, replace(config, compressed_rope=other))
        assert sizes == EngineConfig(block_size=size) and sizes.block_tokens == size
    assert EngineConfig(block_size=16).on("ascend", config).block_size == 16


@pytest.mark.parametrize("size", ["block_size", "max_num_seqs", "max_num_batched_tokens"])
def test_sizes_are_whole_numbers(size: str) -> None:
    for value in ("64", 64.0, *([None] if size != "block_size" else [])):
        with pytest.raises(GenerationError, match=f"{size} must be a whole number"):
            EngineConfig(**{size: value})  # type: ignore[arg-type]


def test_names_at_the_top_are_instant() -> None:
    code = (
        "import sys, npuq; npuq.NpuqError, npuq.errors.HubError; assert 'torch' not in sys.modules;"
        "print([getattr(npuq, name).__name__ for name in npuq.__all__ if name[0].isupper()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(["Completion", "EngineConfig", "LanguageModel", "NpuqError", "SamplingParams"])


# ---- stop strings that are special tokens ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def turning(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """The example with a special token among what it writes, as chat models have that end turns by another than EOS."""
    directory = Path(shutil.copytree(example_fp8, tmp_path_factory.mktemp("turning") / "model"))
    seventh = npuq.load(directory, "cpu").generate("Call me", max_new_tokens=8, temperature=0).token_ids[6]
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    (text,) = [text for text, token in vocabulary.items() if token == seventh]
    tokenizer["added_tokens"].append(
        {"id": seventh, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    )
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return npuq.load(directory, "cpu")


def test_a_special_token_stops(turning: LanguageModel) -> None:
    free = turning.generate("Call me", max_new_tokens=12, temperature=0)
    seventh = free.token_ids[6]
    (text,) = [text for text, token in turning.tokenizer.special_ids.items() if token == seventh]
    assert text not in free.text
    for options in ({}, {"ignore_eos": True}):
        done = turning.generate("Call me", max_new_tokens=12, temperature=0, stop=["no such text", text], **options)
        assert (done.finish_reason, done.token_ids) == ("stop", free.token_ids[:7])
        assert done.text == turning.tokenizer.decode(free.token_ids[:6])
    # Another's stop is none of ours: each request has its own.
    with turning.stream("Call me", max_new_tokens=12, temperature=0, stop=text) as other:
        next(other)
        assert turning.generate("Call me", max_new_tokens=12, temperature=0).token_ids == free.token_ids


def test_a_stop_that_could_never_be_met_is_refused(turning: LanguageModel) -> None:
    for stop in ("<|eos|>\n", "text <|eos|>"):
        with pytest.raises(GenerationError, match=r"holds the special token <\|eos\|>, which is no part of the text"):
            turning.generate("Call me", stop=stop)


# ---- conversations ---------------------------------------------------------------------------------------------------


def test_a_text_is_what_a_user_says(chatty: LanguageModel) -> None:
    tokenizer = chatty.tokenizer
    assert tokenizer.render_chat("Hi") == "<|bos|>user: Hi\n"
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "<|bos|>user: Hi\n"
    tool = {"type": "function", "function": {"name": "f"}}
    text = tokenizer.render_chat("Hi", system="Be brief", tools=[tool], chat_template_kwargs={"thinking": True})
    assert text == f"<|bos|>system: Be brief\nuser: Hi\n{json.dumps([tool])}think"
    assert tokenizer.chat("Hi")[0] == tokenizer.bos_id


def test_chat_answers(chatty: LanguageModel) -> None:
    prompt = chatty.tokenizer.chat("Hi", system="Be brief", chat_template_kwargs={"thinking": True})
    expected = chatty.generate(prompt, max_new_tokens=6, temperature=0)
    answer = chatty.chat(
        "Hi", system="Be brief", chat_template_kwargs={"thinking": True}, max_new_tokens=6, temperature=0
    )
    assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)
    for name in ("messages", "system", "tools", "documents", "chat_template"):
        with pytest.raises(GenerationError, match=f"{name} cannot be given there"):
            chatty.chat("Hi", chat_template_kwargs={name: None})


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([], {}, "the conversation is empty"),
        ({"role": "user"}, {}, "a list of messages, not a dict"),
        (5, {}, "a list of messages, not a int"),
        (["Hi"], {}, r"messages\[0\] is no message"),
        ([{"content": "Hi"}], {}, r"messages\[0\] is no message"),
        ([{"role": None, "content": "Hi"}], {}, r"messages\[0\] is no message"),
        ([{"role": "user", "content": b"Hi"}], {}, r"messages\[0\]\.content: a bytes is not JSON"),
        ([{"role": "system", "content": "a"}], {"system": "b"}, "begins with a system message already"),
        ("Hi", {"tools": [len]}, "tools must be a list of JSON objects, not .*len"),
        ("Hi", {"tools": {"type": "function"}}, "tools must be a list"),
        ("Hi", {"documents": "text"}, "documents must be a list"),
        ("Hi", {"chat_template_kwargs": {"thinking": object()}}, "thinking: a object is not JSON"),
        ("Hi", {"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object, not a list"),
        (
            "Hi",
            {"chat_template_kwargs": {"continue_final_message": 5}},
            "continue_final_message must be True, False or",
        ),
        ("Hi", {"thinking": True}, "unknown option thinking; give variables of the template in chat_template_kwargs"),
        ("Hi", {"system": 5}, "system must be a text, not 5"),
        ("Hi", {"chat_template": ["x"]}, "chat_template must be a text"),
        ("Hi", {"add_generation_prompt": "no"}, "add_generation_prompt must be True or False, not 'no'"),
        ("Hi", {"continue_final_message": 1}, "continue_final_message must be True, False or the name of a field"),
        ("Hi \ud800", {}, "surrogate"),
    ],
)
def test_bad_conversations_are_one_line(
    chatty: LanguageModel, messages: Any, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(GenerationError, match=expected) as caught:
        chatty.tokenizer.chat(messages, **options)
    assert "\n" not in str(caught.value)


def test_variables_may_have_any_other_name(chatty: LanguageModel) -> None:
    variables = {"self": 1, "name": 2, "thinking": True}
    assert chatty.tokenizer.render_chat("Hi", chat_template_kwargs=variables).endswith("think")


def test_a_template_at_its_limit_is_not_tried_again() -> None:
    """Where a template fails it is tried once more with the fields that are None; at a limit it would wait twice."""
    calls = []
    message = {"role": "assistant", "content": None}
    for error, expected in ((GenerationError("no content"), 2), (TemplateLimitError("more than 10 seconds"), 1)):

        def template(given: object, error: GenerationError = error) -> str:
            calls.append(given)
            raise error

        calls.clear()
        with pytest.raises(type(error)):
            render([message], False, "", template)
        assert len(calls) == expected


def test_an_endless_template_takes_its_time_once(chatty: LanguageModel) -> None:
    tokenizer = Tokenizer(chatty.directory)
    tokenizer._renderer._seconds = 1
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(TemplateLimitError, match="more than 1 seconds"):
        tokenizer.chat([{"role": "user", "content": None}], chat_template=endless)
    assert time.monotonic() - started < 1.9 + 0.5


def test_messages_are_copied() -> None:
    given = [{"role": "user", "content": "Hi"}]
    as_messages(given)[0]["content"] = "changed"
    assert given == [{"role": "user", "content": "Hi"}]
