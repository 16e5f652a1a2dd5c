"""The text of `json.dumps`, faster."""

from __future__ import annotations

import json
from enum import Enum

import pytest

from npuq.formats.json_text import json_pieces


class Scheme(str, Enum):
    FLOAT = "FLOAT"


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        None,
        "a",
        {"a": {}, "b": [], "c": [[]], "d": [{}, {"e": None}]},
        {"names": {f"layer.{number}": number / 7 for number in range(3000)}, "flat": list(range(2500))},
        {'null}"{': {'{"': "ü\n\u2028", "null": [True, False, None, 1e300, float("inf"), -0.0]}, "": 0},
        {1: {2.5: {None: {True: [0]}}}, "scheme": Scheme.FLOAT, "pair": (1, (2, "3"))},
    ],
    ids=range(8),
)
def test_is_the_standard_librarys(content):
    assert "".join(json_pieces(content)) == json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def test_goes_in_pieces():
    assert max(map(len, json_pieces({"map": {f"{number:09}": 0 for number in range(100_000)}}))) < 32_000


def test_refuses_what_json_refuses():
    with pytest.raises(TypeError):
        list(json_pieces({"a": [{"b": object()}]}))
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RecursionError):
        list(json_pieces(deep))
