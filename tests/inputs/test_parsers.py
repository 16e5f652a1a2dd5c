"""inputs/json_text.py, yaml_text.py, patterns.py, names.py, printable.py: what they refuse, and that it is one line."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npuq.errors import RecipeError
from npuq.inputs.forms import Each, Items, Keys, check_form, is_count, is_number, is_text, optional
from npuq.inputs.json_text import parse_json, parse_object
from npuq.inputs.names import FileName, Sha256
from npuq.inputs.patterns import Budget, Globs, Pattern
from npuq.inputs.printable import error_line, printable, printable_json, shown
from npuq.inputs.yaml_text import parse_yaml

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(_JSON)
def test_json_comes_back(value: Any) -> None:
    assert parse_json(json.dumps(value), "x", RecipeError) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "x", RecipeError) == value


def test_model_max_length_of_many_tokenizers_is_read() -> None:
    assert parse_json("1000000000000000019884624838656", "x", RecipeError) == 1000000000000000019884624838656


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, "[" * 66 + "]" * 66, '{"a":' * 100_000, "NaN", "[Infinity]", "-Infinity", "1e999", "1" * 41,
        "1" * 6000, '"\\ud800"', '{"\\udfff": 1}', "", "{", '"\ud800"', b"\xff", b"\xef\xbb\xbf{}", "\x1b[31m",
    ],
)  # fmt: skip
def test_bad_json_is_one_line(text: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_json(text, "file.json", RecipeError)
    assert str(caught.value).startswith("file.json: ") and str(caught.value).isprintable()


def test_pairs_of_surrogates_are_one_character() -> None:
    assert parse_json('["\\ud83d\\ude00"]', "x", RecipeError) == ["😀"]


def test_an_object_is_asked_for() -> None:
    with pytest.raises(RecipeError, match="not a JSON object"):
        parse_object("[]", "x", RecipeError)


def test_yaml_without_dates() -> None:
    assert parse_yaml("a: [1, 2.5, x, null, true]\nb: 2001-01-01\n", "x", RecipeError) == {
        "a": [1, 2.5, "x", None, True],
        "b": "2001-01-01",
    }


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000, "a: " * 3000, "x: " + "1" * 6000, "a: &b [1]\nc: *b\n", "a: .inf", "a: .nan", "{a: b",
        "!!python/name:os", "? [a]\n: 1", "a: " + "x" * (1 << 18), "\x1b", "a: \x00", "[" * 70 + "]" * 70, '"\\ud800"',
        "license: !!bool x", 'a: !!int ""', "a: !!timestamp x", "a: !!binary YQ==", "a: !!set {x}", "a: !!omap [x: 1]",
        "a: !!str 5", "!x a", "a: =", "a: 0x_",
    ],
)  # fmt: skip
def test_bad_yaml_is_one_line(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "file.yaml", RecipeError)
    assert str(caught.value).startswith("file.yaml: ") and str(caught.value).isprintable()


def test_patterns_match_at_the_beginning() -> None:
    pattern = Pattern(r".*mlp\.(?!gate)", "config.json", RecipeError)
    assert pattern.matches("model.mlp.up") and not pattern.matches("model.mlp.gate")


@pytest.mark.parametrize(
    "expression",
    [r"((a{1000}){1000}){1000}", "a{99999999999}", "(", "[z-a]", "(?P<", "(" * 3000 + "a" + ")" * 3000, "a" * 70_000],
)
def test_patterns_that_cannot_be_compiled_are_refused_at_once(expression: str) -> None:
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"config\.json: pattern"):
        Pattern(expression, "config.json", RecipeError)
    assert time.monotonic() - started < 10  # filling the memory takes longer


def test_patterns_that_backtrack_for_ever_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npuq.inputs.patterns._SECONDS", 0.2)
    budget = Budget()
    pattern, harmless = (Pattern(text, "config.json", RecipeError, budget) for text in (r"(a|aa)+$", "b"))
    assert harmless.matches("b")
    with pytest.raises(RecipeError, match="takes too long"):
        pattern.matches("a" * 60 + "?")
    for spent in (pattern, harmless):
        with pytest.raises(RecipeError, match="takes too long"):
            spent.matches("a")
    with pytest.raises(RecipeError, match="takes too long"):
        Pattern("c", "config.json", RecipeError, budget)
    assert Pattern("c", "config.json", RecipeError).matches("c")


def test_globs() -> None:
    globs = Globs(["model.*.weight", "lm_head"], "recipe", RecipeError)
    assert globs.matches("model.1.weight") and globs.matches("lm_head")
    assert not globs.matches("lm_head.weight") and not globs.matches("model.1.weight_scale")


def test_globs_that_look_like_work_take_no_time() -> None:
    started = time.thread_time()
    assert not Globs(["*a" * 5000 + "b", "*[a-z]*" * 20 + "?b"], "recipe", RecipeError).matches("a" * 1024)
    assert time.thread_time() - started < 2
    with pytest.raises(RecipeError, match="recipe: the names are too long"):
        Globs(["a" * 40_000, "b" * 40_000], "recipe", RecipeError)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ([], "its content"),
        ({}, "a"),
        ({"a": "1"}, "a"),
        ({"a": True}, "a"),
        ({"a": -1}, "a"),
        ({"a": 1 << 63}, "a"),
        ({"a": 1, "b": [{}, {"c": 1}]}, "b.1.c"),
        ({"a": 1, "b": {}}, "b"),
        ({"a": 1, "d": {"../x": None}}, "d.../x"),
        ({"a": 1, "d": {"x": "y"}}, "d.x"),
        ({"a": 1, "d": {"\x1b[2J": 1.5, "e": -1.5}}, "d.e"),
        ({"a": 1, "d": {"\x1b[2J": {}}}, "d.\\x1b[2J"),
    ],
)
def test_another_form_is_named(value: Any, path: str) -> None:
    names = Each(optional(is_number), lambda key: "/" not in key)
    form = Keys({"a": is_count, "b": Items(Keys({"c": is_text})), "d": names}, frozenset({"a"}))
    check_form({"a": 0, "b": [{"c": ""}, {}], "d": {"x": None, "y": 0.5}, "e": 1}, form, "file", RecipeError)
    with pytest.raises(RecipeError) as caught:
        check_form(value, form, "file", RecipeError)
    assert str(caught.value).startswith(f"file: damaged: {path} is not of the right kind")


@pytest.mark.parametrize("name", ["config.json", "npuq/manifest.json", "a b", "模型.json", "...", "a" * 255, "x/y/z"])
def test_file_names(name: str) -> None:
    assert FileName.parse(name, "x", RecipeError) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/a", "a/", "a//b", "a/../b", "../a", "./a", "a\\b", "..\\x", "C:\\x", "a\0b", "\ud800",
     "\x1b[31mx", "a\nb", "a" * 256, "a/" * 600 + "a", "\u202eb", None, 1, ["a"], b"a"],
)  # fmt: skip
def test_names_that_are_none(name: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        FileName.parse(name, "manifest", RecipeError)
    assert str(caught.value).isprintable()
    with pytest.raises(ValueError):
        FileName(name)


@given(st.text())
def test_a_file_name_joined_stays_below(name: str) -> None:
    import posixpath

    if FileName.holds(name):
        assert posixpath.normpath(posixpath.join("/a", name)) == f"/a/{name}"


@pytest.mark.parametrize("value", ["0" * 63, "0" * 65, "A" * 64, "g" * 64, "../" * 21 + "x", "0" * 64 + "\n", None, 0])
def test_hashes(value: Any) -> None:
    assert Sha256("0123456789abcdef" * 4) == "0123456789abcdef" * 4
    with pytest.raises(RecipeError, match="64 lower-case"):
        Sha256.parse(value, "manifest", RecipeError)


@given(_JSON)
def test_printable_json_is_the_same_value(value: Any) -> None:
    text = printable_json(json.dumps(value, indent=2, ensure_ascii=False))
    assert json.loads(text) == value
    assert printable(text, keep="\n") == text


def test_what_is_quoted_is_short_and_printable() -> None:
    assert shown("\x1b" * 100) == "'" + "\\x1b" * 14 + "\\x1"
    assert shown([10**5000]) == "of type list"


def test_printable() -> None:
    assert printable("a\x1b[31m\u202eb\x9b\ud800é字😀\u200d") == "a\\x1b[31m\\u202eb\\x9b\\ud800é字😀\u200d"
    hidden = "\u061c\ufff9\ufffa\ufffb\U000e0000\U000e0041\U000e007f"
    assert printable(hidden) == "\\u061c\\ufff9\\ufffa\\ufffb\\U000e0000\\U000e0041\\U000e007f"
    assert printable_json(json.dumps(hidden, ensure_ascii=False)) == json.dumps(hidden)
    assert printable("a\tb\nc\r", keep="\n\t") == "a\tb\nc\\r"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("failed,\n\n  error\tcode 5"), "failed, error code 5"),
        (OSError("\x1b[2Jgone\u202e"), "\\x1b[2Jgone\\u202e"),
        (MemoryError(), "MemoryError"),
        (ValueError("x" * 1000), "x" * 200),
    ],
)
def test_a_foreign_error_becomes_a_line(error: Exception, line: str) -> None:
    assert error_line(error) == line
