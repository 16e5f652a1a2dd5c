"""Grammars of replies: a walk at random within one gives a reply that satisfies it, in every format."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npuq.errors import GenerationError
from npuq.runtime.sampling.grammar import Grammar
from npuq.runtime.sampling.structured import checking
from npuq.runtime.sampling.structured.compiler import GrammarCompiler
from npuq.runtime.sampling.structured.constraint import Constraint, constrain
from npuq.runtime.text.replies.formats import PLAIN, find_format
from npuq.runtime.text.replies.reply import Reply
from npuq.runtime.text.replies.tools import Tool
from npuq.runtime.text.tokenizer import Tokenizer

from ..text.reply_formats import MARKERS, tokenizer_with

END = 1
TOOLS = (
    Tool(
        "weather",
        {
            "type": "object",
            "properties": {
                "place": {"type": "string", "maxLength": 6},
                "n": {"type": "integer"},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["place"],
            "additionalProperties": False,
        },
    ),
    Tool("find.all", {"properties": {"q": {"enum": ["a", "b"]}}, "required": ["q"], "additionalProperties": False}),
)


@pytest.fixture(scope="module", params=["text", "tokens"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_with(tmp_path_factory.mktemp("structured"), MARKERS if request.param == "tokens" else ())


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    ids = (tokenizer.token_id(marker) for marker in MARKERS)
    return GrammarCompiler(tokenizer, {END}, [id for id in ids if id is not None])


def walk(grammar: Grammar, rng: np.random.Generator, first: Sequence[int] = (), most: int = 600) -> list[int]:
    """Tokens that a grammar allows, at random, after some given ones; the end as soon as it is allowed."""
    tokens: list[int] = []
    for step in range(most):
        mask = grammar.mask()
        assert mask is not None and mask.any()
        if mask[END]:
            return tokens
        token = first[step] if step < len(first) else int(rng.choice(np.flatnonzero(mask)))
        assert mask[token]
        grammar.accept(token)
        tokens.append(token)
    pytest.fail("the walk has no end")


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v31", "kimi-k2", "qwen3", "glm-4.5"])
@pytest.mark.parametrize("thinks", [False, True])
def test_required_calls_in_every_format(
    name: str, thinks: bool, tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    format = replace(find_format(tokenizer, "deepseek", name), tools=TOOLS)
    prompt = tokenizer.encode("Q<think>" if thinks else "Q</think>", special=False)
    first = tokenizer.encode("hm</think>", special=False) if thinks else ()
    rng = np.random.default_rng(3)
    wanted = Constraint(None, "required", parallel=False, first_call=3)
    make = constrain(compiler, tokenizer, format, prompt, wanted)
    for _ in range(3):
        reply = Reply(tokenizer, prompt, format=format)
        for token in walk(make(), rng, first):
            reply.add(token)
        reply.flush()
        (call,) = reply.calls
        arguments = json.loads(call.arguments)
        assert (reply.reasoning, reply.text) == ("hm" if thinks else "", "")
        assert arguments["q"] in "ab" if call.name == "find.all" else len(arguments["place"]) <= 6
        assert set(arguments) <= {"place", "n", "unit", "q"} and arguments.get("unit", "C") in "CF"
        assert name != "kimi-k2" or call.id == f"functions.{call.name}:3"


def test_kimis_numbers_count_on(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    format = replace(find_format(tokenizer, "none", "kimi-k2"), tools=TOOLS[1:])
    make = constrain(compiler, tokenizer, format, [0], Constraint(None, "required", first_call=7))
    call = '<|tool_call_begin|>functions.find.all:{}<|tool_call_argument_begin|>{{"q":"a"}}<|tool_call_end|>'
    text = "<|tool_calls_section_begin|>" + "".join(call.format(n) for n in (7, 8, 9)) + "<|tool_calls_section_end|>"
    assert walk(make(), np.random.default_rng(0), tokenizer.encode(text, special=False))
    with pytest.raises((GenerationError, AssertionError)):
        walk(make(), np.random.default_rng(0), tokenizer.encode(text.replace(":8", ":7"), special=False))


def test_a_schema_with_text_beside_it(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["é🐋", 3]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    make = constrain(compiler, tokenizer, PLAIN, [0], Constraint(schema))
    for seed in range(5):
        text = tokenizer.decode(walk(make(), np.random.default_rng(seed)))
        assert json.loads(text)["a"] in ("é🐋", 3)


def test_a_marker_is_no_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """Within a string of JSON, a marker's token would begin a call."""
    make = constrain(compiler, tokenizer, PLAIN, [0], Constraint({"type": "string"}))
    grammar = make()
    grammar.accept(tokenizer.encode('"', special=False)[0])
    mask = grammar.mask()
    assert mask is not None
    assert not any(mask[id] for marker in MARKERS if (id := tokenizer.token_id(marker)) is not None)


@pytest.mark.parametrize(("begin", "more", "most"), [("1", "1", 40), ("1.", "5", 40), ("1", " ", 40)])
def test_numbers_and_white_space_end(
    begin: str, more: str, most: int, tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """JSON allows any number of digits and spaces, and a model may never find out of them."""
    schema = {"type": "array", "items": {"type": "number"}}
    grammar = constrain(compiler, tokenizer, PLAIN, [0], Constraint(schema))()
    (token,) = tokenizer.encode(more, special=False)
    for each in tokenizer.encode(f"[{begin}", special=False):
        grammar.accept(each)
    for count in range(most):
        mask = grammar.mask()
        assert mask is not None
        if not mask[token]:
            assert count > 8 and mask.any()
            return
        grammar.accept(token)
    pytest.fail("without end")


def test_digits_in_a_string_are_any_number(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = constrain(compiler, tokenizer, PLAIN, [0], Constraint({"type": "string"}))()
    for each in tokenizer.encode('"' + "1" * 100, special=False):
        mask = grammar.mask()
        assert mask is not None and mask[each]
        grammar.accept(each)


def test_strict_tools_are_free_before_the_marker(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    format = replace(find_format(tokenizer, "none", "deepseek-v31"), tools=(replace(TOOLS[0], strict=True),))
    wanted = Constraint(None, "allowed")
    assert wanted.needs_grammar(format) and not wanted.needs_grammar(replace(format, tools=TOOLS))
    marker = tokenizer.token_id("<｜tool▁calls▁begin｜>")
    if marker is None:
        with pytest.raises(GenerationError, match="strict tools need tool_choice"):
            constrain(compiler, tokenizer, format, [0], wanted)
        return
    grammar = constrain(compiler, tokenizer, format, [0], wanted)()
    for token in tokenizer.encode("Anything", special=False):
        assert grammar.mask() is None
        grammar.accept(token)
    grammar.accept(marker)
    mask = grammar.mask()
    assert mask is not None and mask.sum() == 1 and mask[tokenizer.token_id("<｜tool▁call▁begin｜>")]


def test_a_token_outside_of_the_grammar(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    grammar = constrain(compiler, tokenizer, PLAIN, [0], Constraint({"type": "object"}))()
    with pytest.raises(GenerationError, match="the grammar of this request cannot go on"):
        grammar.accept(tokenizer.encode("x", special=False)[0])


def test_two_completions_do_not_share_their_state(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    make = constrain(compiler, tokenizer, PLAIN, [0], Constraint({"enum": ["a"]}))
    one, other = make(), make()
    (quote,) = tokenizer.encode('"', special=False)
    one.accept(quote)
    first = other.mask()
    assert first is not None and first[quote]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "object", "minItems": 10**8, "uniqueItems": True}, "cannot be used: Unimplemented keys"),
        ({"type": "array", "minItems": 10**8}, None),
        ({"type": "string", "pattern": "(a+)+$"}, None),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, None),
        ({"x" * 70_000: 1}, "longer than 65536 characters"),
    ],
)
def test_schemas_that_ask_for_much(
    schema: dict[str, Any], message: str | None, tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    if message is None:
        assert constrain(compiler, tokenizer, PLAIN, [0], Constraint(schema))().mask() is not None
        return
    with pytest.raises(GenerationError, match=message) as caught:
        constrain(compiler, tokenizer, PLAIN, [0], Constraint(schema))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_schema_that_never_compiles(
    tokenizer: Tokenizer, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llguidance has no limit on the intersection of patterns: forty take longer than anyone has."""
    monkeypatch.setattr(checking, "SECONDS", 1)
    schema = {"allOf": [{"type": "string", "pattern": f".*{n}.*"} for n in range(40)]}
    with pytest.raises(GenerationError, match="it takes more than 1 seconds of CPU time or 512 MiB to compile"):
        constrain(compiler, tokenizer, PLAIN, [0], Constraint(schema))


def test_a_part_that_its_own_schema_leaves_out(
    tokenizer: Tokenizer, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text has no properties, so this schema compiles at once; GLM's calls have a rule for each argument."""
    monkeypatch.setattr(checking, "SECONDS", 1)
    endless = {"allOf": [{"type": "string", "pattern": f".*{n}.*"} for n in range(40)]}
    tools = (Tool("f", {"type": "string", "properties": {"a": endless}}),)
    format = replace(find_format(tokenizer, "none", "glm-4.5"), tools=tools)
    with pytest.raises(GenerationError, match="the grammar of the reply cannot be used: it takes more than 1 seconds"):
        constrain(compiler, tokenizer, format, [0], Constraint(calls="required"))


def test_the_schemas_of_a_request_share_a_process(
    tokenizer: Tokenizer, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred tools of two seconds each would keep a thread for minutes. The one at fault is named."""
    started = []
    run = checking.subprocess.run
    monkeypatch.setattr(
        checking.subprocess, "run", lambda *given, **options: (started.append(1), run(*given, **options))[1]
    )
    tools = [Tool(f"f{n}", {"properties": {f"own{n}": {"type": "integer"}}}) for n in range(100)]
    format = replace(find_format(tokenizer, "none", "qwen3"), tools=tools)
    for _ in range(2):
        assert constrain(compiler, tokenizer, format, [0], Constraint(calls="required"))().mask() is not None
    assert len(started) == 1
    tools[70] = Tool("f70", {"uniqueItems": True})
    with pytest.raises(GenerationError, match="the schema of tool f70 cannot be used: Unimplemented keys"):
        constrain(compiler, tokenizer, format, [0], Constraint(calls="required"))


def test_what_structured_output_needs(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GenerationError, match="needs an end-of-sequence token"):
        GrammarCompiler(tokenizer, ())
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GenerationError, match=r"needs llguidance: pip install 'npuq\[serve\]'"):
        GrammarCompiler(tokenizer, {END})


def test_nothing_else_imports_llguidance() -> None:
    """Commands that write no structured output work without it."""
    root = Path(__file__).parents[3]
    found = [
        path for path in (root / "runtime").rglob("*.py") if "llguidance import" in path.read_text(encoding="utf-8")
    ]
    assert sorted(path.name for path in found) == ["checking_worker.py", "compiler.py"]
