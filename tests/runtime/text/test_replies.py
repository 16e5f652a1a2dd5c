"""Replies token by token: any split gives the same parts, and no marker is in any of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npuq.errors import GenerationError
from npuq.runtime.text.replies.formats import ReplyFormat, find_format
from npuq.runtime.text.replies.reply import Reply
from npuq.runtime.text.replies.tools import Tool, offered_tools
from npuq.runtime.text.tokenizer import Tokenizer

from .reply_formats import DEEPSEEK, KIMI, MARKERS, THINK, read, tokenizer_with, written

FORMATS = ("deepseek-v3", "deepseek-v31", "kimi-k2", "qwen3", "glm-4.5")
TOOLS = (Tool("weather", {"properties": {"place": {"type": "string"}}}), Tool("find.all", {}))
# Texts with what could be mistaken for a marker, and with characters of several bytes.
WORDS = st.lists(
    st.sampled_from(
        ["<", "<th", "ink>", "</", "<｜tool", "▁call", "<|tool_call", "_begin", " ", "\n", "東京", "🐋", "a", "}{", '"']
    )
    | st.text("ab é🐳\n", max_size=5),
    max_size=8,
)
WORDS = WORDS.map("".join).filter(lambda text: not any(marker in text for marker in MARKERS))
ARGUMENTS = st.dictionaries(
    st.sampled_from(["place", "n", "東"]), WORDS | st.integers() | st.lists(st.booleans(), max_size=2), max_size=3
)
CALLS = st.lists(st.tuples(st.sampled_from(["weather", "find.all"]), ARGUMENTS), max_size=3)


@pytest.fixture(scope="module", params=["text", "tokens", "special"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer without tokens for the markers, with them, and with them as special tokens."""
    markers = () if request.param == "text" else MARKERS
    return tokenizer_with(tmp_path_factory.mktemp("reply"), markers, special=request.param == "special")


@pytest.fixture(scope="module")
def with_markers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_with(tmp_path_factory.mktemp("reply"), MARKERS)


def format_of(tokenizer: Tokenizer, tools: str, reasoning: str = "deepseek") -> ReplyFormat:
    return replace(find_format(tokenizer, reasoning, tools), tools=TOOLS)


def tokens(tokenizer: Tokenizer, text: str, whole: Callable[[], bool]) -> list[int]:
    """Token ids of a text, markers as they are encoded; of other parts some byte by byte."""
    single = {marker for marker in MARKERS if tokenizer.token_id(marker) is not None}
    ids = []
    while text:
        marker = next((each for each in single if text.startswith(each)), None)
        size = len(marker) if marker else min([len(text), 4, *(text.find(m) for m in single if text.find(m) > 0)])
        piece, text = text[:size], text[size:]
        if marker or whole():
            ids += tokenizer.encode(piece, special=False)
        else:
            ids += [BYTES[byte] for byte in piece.encode()]
    return ids


BYTES: dict[int, int] = {}


@pytest.fixture(scope="module", autouse=True)
def _bytes(tokenizer: Tokenizer) -> None:
    BYTES.update({token[0]: id for id in range(4096) if len(token := tokenizer.token_bytes(id)) == 1})
    assert len(BYTES) == 256


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), reasoning=WORDS, content=WORDS, calls=CALLS, begun=st.booleans())
def test_any_split_gives_the_same_parts(
    name: str, tokenizer: Tokenizer, data: st.DataObject, reasoning: str, content: str, calls: list[Any], begun: bool
) -> None:
    """The parts are those of which the text was written, whether the prompt has begun the reasoning or the reply does.

    Content could be taken for the beginning of a call only in the text of the markers themselves.
    """
    prompt = tokenizer.encode("Why?" + ("<think>\n" if begun else ""), special=False)
    text = ("" if begun else "<think>") + f"{reasoning}</think>\n\n{content}" + (written(name, calls) if calls else "")
    ids = tokens(tokenizer, text, lambda: data.draw(st.booleans()))
    reply = Reply(tokenizer, prompt, format=format_of(tokenizer, name))
    thought, said, called, parts = read(reply, ids)
    assert thought == reasoning.strip() == reply.reasoning
    # The line end before a call that is not in a section is content.
    assert said == content.lstrip() + ("\n" if calls and content.strip() and name in ("qwen3", "glm-4.5") else "")
    assert said == reply.text and called == reply.calls
    assert [call.name for call in called] == [call for call, _ in calls]
    for call, (_, arguments) in zip(called, calls, strict=True):
        read_back = json.loads(call.arguments)
        assert list(read_back) == list(arguments)
        if name != "glm-4.5":  # which does not tell a text from JSON unless a schema says so
            assert read_back == arguments
    assert all((part.text != "") + (part.reasoning != "") + (part.call is not None) <= 1 for part in parts)
    assert reply.malformed_calls == 0 and len({call.id for call in called}) == len(called)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(FORMATS), pieces=st.lists(st.sampled_from(MARKERS) | WORDS, max_size=12))
def test_no_marker_comes_out_whatever_the_order(
    with_markers: Tokenizer, data: st.DataObject, name: str, pieces: list[str]
) -> None:
    """Markers of the format, in any order and between any texts; with or without tools to call."""
    format = format_of(with_markers, name)
    offered = replace(format, tools=data.draw(st.sampled_from([(), TOOLS])))
    reply = Reply(with_markers, [0], format=offered)
    own = [piece for piece in pieces if piece not in MARKERS or piece in format.markers]
    ids = [id for piece in own for id in _whole(with_markers, piece)]
    thought, said, called, parts = read(reply, ids)
    for text in (thought, said, *(call.arguments for call in called)):
        # Letters of a text may stand side by side as those of a marker; then they came so.
        plain = "".join(piece for piece in own if piece not in MARKERS)
        assert not any(marker in text for marker in format.markers if marker not in plain)
    assert (thought, said, called) == (reply.reasoning, reply.text, reply.calls)
    assert not (called and not offered.tools)
    numbers = [number for part in parts for number in part.tokens]
    assert numbers == sorted(set(numbers))


def _whole(tokenizer: Tokenizer, piece: str) -> list[int]:
    id = tokenizer.token_id(piece) if piece in MARKERS else None
    return [BYTES[byte] for byte in piece.encode()] if id is None else [id]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), reasoning=WORDS, content=WORDS, stop=st.text("ab é🐳\n<", min_size=1, max_size=3))
def test_stop_strings_are_of_the_content(
    tokenizer: Tokenizer, data: st.DataObject, reasoning: str, content: str, stop: str
) -> None:
    """Anywhere in it, inside and across tokens; neither reasoning nor arguments end at one."""
    text = f"<think>{reasoning}</think>{content}" + written("deepseek-v31", [("weather", {"place": stop})])
    ids = tokens(tokenizer, text, lambda: data.draw(st.booleans()))
    reply = Reply(tokenizer, [0], (stop,), format=format_of(tokenizer, "deepseek-v31"))
    thought, said, called, _ = read(reply, ids)
    content = content.lstrip()
    assert thought == reasoning.strip()
    assert said == content.split(stop)[0]
    assert reply.stopped == (stop in content)
    if not reply.stopped:
        assert json.loads(called[0].arguments) == {"place": stop}


# ---- calls that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deepseek-v3", f"{DEEPSEEK[2]}function{DEEPSEEK[4]}weather {{}}{DEEPSEEK[3]}"),
        ("deepseek-v3", f"{DEEPSEEK[2]}function weather{{}}{DEEPSEEK[3]}"),
        ("deepseek-v31", f"{DEEPSEEK[2]}the weather{DEEPSEEK[4]}{{}}{DEEPSEEK[3]}"),
        ("deepseek-v31", f"{DEEPSEEK[2]}weather{DEEPSEEK[4]}nothing{DEEPSEEK[3]}"),
        ("kimi-k2", f"{KIMI[2]}functions.weather{KIMI[4]}{{}}{KIMI[3]}"),
        ("kimi-k2", f"{KIMI[2]}0{KIMI[4]}{{}}{KIMI[3]}"),
        ("qwen3", '<tool_call>{"call": "weather"}</tool_call>'),
        ("glm-4.5", "<tool_call>the weather</tool_call>"),
    ],
)
def test_what_is_no_call_comes_back_as_content(with_markers: Tokenizer, name: str, text: str) -> None:
    reply = Reply(with_markers, [0], format=format_of(with_markers, name))
    _, said, called, _ = read(reply, with_markers.encode(f"I ask.{text}", special=False))
    plain = text
    for marker in MARKERS:
        plain = plain.replace(marker, "")
    assert said == f"I ask.{plain}" and called == () and reply.malformed_calls == 1


def test_a_call_that_is_cut_off_keeps_what_came(with_markers: Tokenizer) -> None:
    text = written("kimi-k2", [("weather", {"place": "Köln"})])
    reply = Reply(with_markers, [0], format=format_of(with_markers, "kimi-k2"))
    _, said, called, _ = read(reply, with_markers.encode(text[: text.index("ln")], special=False))
    assert said == "" and called[0].arguments == '{"place": "Kö'


def test_kimis_ids_stay_as_the_model_wrote_them(with_markers: Tokenizer) -> None:
    def call(id: str) -> str:
        return f"{KIMI[2]}{id}{KIMI[4]}{{}}{KIMI[3]}"

    reply = Reply(with_markers, [0], format=format_of(with_markers, "kimi-k2"))
    text = f"{KIMI[0]}{call('functions.weather:7')} {call('find.all:12')}{KIMI[1]}"
    _, _, called, _ = read(reply, with_markers.encode(text, special=False))
    assert [(each.id, each.name) for each in called] == [
        ("functions.weather:7", "weather"),
        ("find.all:12", "find.all"),
    ]
    # Of an id without a name, the call is to the only tool.
    for id in ("3", "call_9a"):
        reply = Reply(with_markers, [0], format=replace(format_of(with_markers, "kimi-k2"), tools=TOOLS[:1]))
        _, _, called, _ = read(reply, with_markers.encode(call(id), special=False))
        assert [(each.id, each.name) for each in called] == [(id, "weather")]


def test_deepseeks_calls_get_ids(with_markers: Tokenizer) -> None:
    text = written("deepseek-v3", [("weather", {}), ("weather", {})])
    _, _, called, _ = read(
        Reply(with_markers, [0], format=format_of(with_markers, "deepseek-v3")),
        with_markers.encode(text, special=False),
    )
    assert all(len(call.id) == 29 and int(call.id.removeprefix("call_"), 16) >= 0 for call in called)
    assert called[0].id != called[1].id


def test_texts_of_glm_stay_texts_where_the_schema_says_so(with_markers: Tokenizer) -> None:
    text = written("glm-4.5", [("weather", {"place": "12", "n": 3, "other": "[1, x"})])
    reply = Reply(with_markers, [0], format=format_of(with_markers, "glm-4.5"))
    _, _, called, _ = read(reply, with_markers.encode(text, special=False))
    assert json.loads(called[0].arguments) == {"place": "12", "n": 3, "other": "[1, x"}


def test_qwens_object_in_another_order(with_markers: Tokenizer) -> None:
    reply = Reply(with_markers, [0], format=format_of(with_markers, "qwen3"))
    text = '<tool_call>{"arguments": {"n": "é"}, "name": "weather"}</tool_call>'
    _, _, called, _ = read(reply, with_markers.encode(text, special=False))
    assert (called[0].name, called[0].arguments) == ("weather", '{"n": "é"}')


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", r'"\ud83d"', r'["\udc00"]'])
def test_arguments_are_json_that_can_be_sent(with_markers: Tokenizer, value: str) -> None:
    """Python reads numbers that JSON does not have, and halves of characters that UTF-8 does not have."""
    glm = f"<tool_call>find.all\n<arg_key>n</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    qwen = f'<tool_call>{{"arguments": {{"n": {value}}}, "name": "find.all"}}</tool_call>'
    for name, text in (("glm-4.5", glm), ("qwen3", qwen)):
        reply = Reply(with_markers, [0], format=format_of(with_markers, name))
        _, content, called, _ = read(reply, with_markers.encode(text, special=False))
        assert bool(called) != (value in content)
        for call in called:
            call.arguments.encode("utf-8")
            json.loads(call.arguments, parse_constant=pytest.fail)


# ---- where reasoning is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("Q<think>\n", "a</think>b", "a", "b"),
        ("Q</think>", "a", "", "a"),
        ("Q<think>\n\n</think>\n\n", "a", "", "a"),
        ("Q", "a", "", "a"),
        ("Q", "<think>\na\n</think>\n\nb", "a", "b"),
        ("Q</think>", "<think>a</think>b", "a", "b"),
        ("Q", "\n<think>a</think>\nb", "a", "b"),
        ("Q", "\n \n a", "", "\n \n a"),
        ("Q", "\n \n", "", "\n \n"),
        ("Q", " " * 40 + "<think>a", "a", " " * 40),
        ("Q", "a</think>b", "", "ab"),
        ("Q<think>", "a", "a", ""),
        ("Q<think>", f"a {DEEPSEEK[0]}", "a", ""),
    ],
)
def test_where_reasoning_begins_and_ends(
    tokenizer: Tokenizer, prompt: str, text: str, reasoning: str, content: str
) -> None:
    reply = Reply(tokenizer, tokenizer.encode(prompt, special=False), format=format_of(tokenizer, "deepseek-v3"))
    ids = tokenizer.encode(text, special=False)
    assert read(reply, ids)[:2] == (reasoning, content)


def test_reasoning_tokens_are_counted_with_their_markers(with_markers: Tokenizer) -> None:
    ids = with_markers.encode("<think>", special=False) + [BYTES[ord("a")]] * 5
    reply = Reply(with_markers, [0], format=format_of(with_markers, "none"))
    read(reply, [*ids, *with_markers.encode("</think>", special=False), BYTES[ord("b")]])
    assert reply.reasoning_tokens == 7


def test_other_letters_are_no_marker(with_markers: Tokenizer) -> None:
    """Where a marker is a token, its letters from other tokens are text: someone may ask about them."""
    ids = [BYTES[byte] for byte in b"Say <think> and </think>."]
    reply = Reply(with_markers, [0], format=format_of(with_markers, "none"))
    assert read(reply, ids)[:2] == ("", "Say <think> and </think>.")


# ---- the choice of a format ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reasoning", "tools"),
    [
        ("{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' }}```json{{ '</think>' }}", "deepseek", "deepseek-v3"),
        ("{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' }}", None, "deepseek-v31"),
        ("<|tool_calls_section_begin|>", None, "kimi-k2"),
        ("<think><tool_call><arg_key>", "deepseek", "glm-4.5"),
        ("<think><tool_call>", "deepseek", "qwen3"),
        ("<tool_call><function=", None, None),
        ("◁think▷", "kimi", None),
        ("{{ messages }}", None, None),
    ],
)
def test_the_template_says_which_format(
    tmp_path: Path, template: str, reasoning: str | None, tools: str | None
) -> None:
    tokenizer_with(tmp_path, ())
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    found = find_format(Tokenizer(tmp_path))
    assert found.reasoning is None if reasoning is None else found.reasoning.name == reasoning
    assert found.calls is None if tools is None else found.calls.name == tools
    off = find_format(Tokenizer(tmp_path), "none", "none")
    assert off.reasoning is None and off.calls is None


def test_tokens_alone_show_some_formats(tmp_path: Path) -> None:
    found = find_format(tokenizer_with(tmp_path / "think", THINK))
    assert found.reasoning is not None and found.reasoning.name == "deepseek" and found.calls is None
    found = find_format(tokenizer_with(tmp_path / "kimi", KIMI))
    assert found.calls is not None and found.calls.name == "kimi-k2" and found.reasoning is None


def test_an_unknown_format_is_refused(with_markers: Tokenizer) -> None:
    with pytest.raises(GenerationError, match="reply format 'pythonic' is unknown; npuq has auto, none, deepseek-v3"):
        find_format(with_markers, tools="pythonic")


def test_tools_of_a_request() -> None:
    given = [{"type": "function", "function": {"name": "a", "parameters": {"x": 1}, "strict": True}}, {"name": "b"}]
    assert offered_tools([*given, {"type": "web_search"}]) == (Tool("a", {"x": 1}, True), Tool("b", {}, False))


def test_a_prompt_may_end_in_any_number_of_spaces(with_markers: Tokenizer) -> None:
    """They are looked through in linear time: an event loop waits for it."""
    space = with_markers.encode("\n", special=False)
    prompt = [*with_markers.encode("<think>", special=False), *space * 300_000]
    began = time.process_time()
    assert format_of(with_markers, "qwen3").begins_inside_reasoning(with_markers, prompt)
    assert time.process_time() - began < 3
