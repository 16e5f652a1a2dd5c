"""Kimi's and Moonlight's tiktoken.model: the same ids as tiktoken with the models' own pattern, and text back."""

from __future__ import annotations

import json
import random
import time
from base64 import b64encode
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from npuq.errors import GenerationError
from npuq.runtime.text.tiktoken_files import FAMILIES
from npuq.runtime.text.tokenizer import Tokenizer

from .plain_text import PlainText
from .tiktoken_models import CODE, NAMED, ODD, PATTERN, SCRIPTS, config_of, reference, texts, write_files

SAMPLES = {**SCRIPTS, "code": CODE, **ODD}
PIECES = [
    *NAMED,
    "<|reserved_token_3860|>",
    "<|im_end|",
    "|>",
    "'s",
    "'LL",
    " ",
    "\n",
    "\r\n",
    "  \t",
    "1",
    "中",
    "é",
    "A",
]
PIECES += [*"aZʰǅ\u0301々〇ー한א\u200d🐋\x00\x85\u3000\ufffd", *texts()[:4]]
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@pytest.fixture(scope="module")
def tokenizer(kimi_files: Path) -> Tokenizer:
    return Tokenizer(kimi_files)


@pytest.fixture(scope="module")
def models_own(kimi_files: Path) -> tiktoken.Encoding:
    return reference(kimi_files)


# ---- ids -------------------------------------------------------------------------------------------------------------


def test_the_pattern_is_the_published_one() -> None:
    assert FAMILIES["TikTokenTokenizer"].pattern == PATTERN


@pytest.mark.parametrize("name", SAMPLES)
def test_ids_are_tiktokens(name: str, tokenizer: Tokenizer, models_own: tiktoken.Encoding) -> None:
    text = SAMPLES[name]
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encode(text, special=False) == models_own.encode(text, allowed_special="all")
    assert tokenizer.decode(ids) == text
    if len(text) > 40:
        assert len(ids) < len(text.encode()) / 2  # merges are at work


@given(text=ANY_TEXT)
@settings(max_examples=500)
def test_ids_of_any_text_are_tiktokens(text: str, tokenizer: Tokenizer, models_own: tiktoken.Encoding) -> None:
    ids = tokenizer.encode(text)
    assert ids == models_own.encode(text, allowed_special="all")
    assert tokenizer.decode(ids) == visible(models_own, tokenizer, ids)


def visible(models_own: tiktoken.Encoding, tokenizer: Tokenizer, ids: list[int]) -> str:
    """tiktoken's text of ids without special tokens."""
    hidden = set(tokenizer.special_ids.values())
    return models_own.decode([token for token in ids if token not in hidden])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("中文English混合", ["中文", "English", "混合"]),
        ("汉字abc", ["汉字", "abc"]),
        ("北京市 Pascal", ["北京市", " Pascal"]),
        ("a 中文", ["a", " ", "中文"]),  # a space belongs to a word, but not to Han
        ("々〇ー", ["々〇", "ー"]),  # Han are the first two
        ("a    b", ["a", "   ", " b"]),
        ("a   \n\n  b ", ["a", "   \n\n", " ", " b", " "]),
        ("x1234567", ["x", "123", "456", "7"]),
        ("HTTPServer camelCase", ["HTTPServer", " camel", "Case"]),
        ("we'LL, it’s", ["we'LL", ",", " it", "’s"]),
        ("a->b();\n\nc", ["a", "->", "b", "();\n\n", "c"]),
    ],
)
def test_pieces_of_the_pattern(text: str, expected: list[str], tokenizer: Tokenizer, ranks: dict[bytes, int]) -> None:
    """No token crosses a piece, and each piece is merged by itself: by another engine of regular expressions."""
    assert regex.findall(PATTERN, text, flags=regex.VERSION1) == expected
    assert tokenizer.encode(text) == [id for piece in expected for id in merged(piece.encode(), ranks)]


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding by its definition: join the neighbours of the lowest rank, the first of equals."""
    parts = [piece[place : place + 1] for place in range(len(piece))]
    while True:
        joined = [
            (ranks[left + right], place) for place, (left, right) in enumerate(pairwise(parts)) if left + right in ranks
        ]
        if not joined:
            return [ranks[part] for part in parts]
        place = min(joined)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_another_engine_of_regular_expressions_splits_the_texts_alike(
    tokenizer: Tokenizer, ranks: dict[bytes, int]
) -> None:
    for text in texts():
        pieces = regex.findall(PATTERN, text, flags=regex.VERSION1)
        assert "".join(pieces) == text
        assert tokenizer.encode(text) == [id for piece in pieces for id in merged(piece.encode(), ranks)]


# ---- special tokens --------------------------------------------------------------------------------------------------


def test_every_special_token(tokenizer: Tokenizer, models_own: tiktoken.Encoding) -> None:
    special = models_own._special_tokens
    assert len(special) == 256 and tokenizer.vocab_size == 4096
    for text, number in special.items():
        assert tokenizer.encode(f"a{text} b") == [*tokenizer.encode("a"), number, *tokenizer.encode(" b")]
        shown = "" if NAMED.get(text, (0, True))[1] else text
        assert tokenizer.decode([number]) == shown
        assert (text in tokenizer.special_ids) == (shown == "")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (special["[BOS]"], special["[EOS]"])


def test_of_two_special_tokens_the_longer_is_meant(ranks: dict[bytes, int], tmp_path: Path) -> None:
    config = config_of(len(ranks))
    for offset, text in ((30, "<|a|>"), (31, "<|a|><|b|>"), (32, "<|a|><")):
        config["added_tokens_decoder"][str(len(ranks) + offset)] = {"content": text, "special": True}
    write_files(tmp_path, ranks)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).encode("<|a|><|b|><|a|><<|a|>") == [len(ranks) + offset for offset in (31, 32, 30)]


def test_ids_beyond_the_models_vocabulary_are_none(ranks: dict[bytes, int], tmp_path: Path) -> None:
    """Moonlight's own code reserves two more than the model has."""
    write_files(tmp_path, ranks)
    config = config_of(len(ranks))
    config["added_tokens_decoder"] = {
        key: token for key, token in config["added_tokens_decoder"].items() if int(key) < len(ranks) + 100
    }
    config |= {"pad_token": None, "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    size = len(ranks) + 100
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": {"vocab_size": size}}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == size
    assert tokenizer.encode(f"<|reserved_token_{size - 1}|>") == [size - 1]
    assert len(tokenizer.encode(f"<|reserved_token_{size}|>")) > 1


# ---- long texts ------------------------------------------------------------------------------------------------------


def published_cuts(text: str) -> list[str]:
    """Pieces that the models' own code encodes one by one, found character by character."""
    return [piece for start in range(0, len(text), 400_000) for piece in published_runs(text[start : start + 400_000])]


def published_runs(text: str) -> list[str]:
    pieces, begin, length, space = [], 0, 0, text[:1].isspace()
    for place, character in enumerate(text):
        length = length + 1 if character.isspace() == space else 1
        space = character.isspace()
        if length > 25_000:
            pieces.append(text[begin:place])
            begin, length = place, 1
    return [*pieces, text[begin:]]


@pytest.mark.parametrize(
    "text",
    [
        " " * 60_000,
        "a" * 25_000,
        "a" * 25_001,
        "ab" * 30_000 + " \n" * 26_000 + "é" * 50_001 + "x",
        "".join(random.Random(5).choices("ab \n中", k=90_000)) + "中" * 30_000,
        "abcdefg" * 3000 + " the" * 100_000 + "xyz" * 100_000,
    ],
    ids=["spaces", "25000", "25001", "runs", "random", "long"],
)
def test_long_runs_are_cut_as_by_the_models_own_code(
    text: str, tokenizer: Tokenizer, models_own: tiktoken.Encoding
) -> None:
    expected = [id for piece in published_cuts(text) for id in models_own.encode_ordinary(piece)]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text


@pytest.mark.parametrize("text", [" ", "a", "^", "\n", "aA", "中", "\u0301", "1", "x ", "<|im_end|>", "👍🏽"])
def test_a_million_characters(text: str, tokenizer: Tokenizer) -> None:
    """tiktoken panics on a million spaces."""
    text = text * (1_000_000 // len(text))
    begin = time.process_time()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("<|im_end|>", "")
    assert time.process_time() - begin < 10


def test_a_special_token_is_not_cut(tokenizer: Tokenizer) -> None:
    end = tokenizer.special_ids["<|im_end|>"]
    assert tokenizer.encode("ab " * 133_332 + "<|im_end|>").count(end) == 1


def test_a_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(GenerationError, match="the tokenizer fails to encode"):
        tokenizer.encode("a\ud800")


# ---- text back -------------------------------------------------------------------------------------------------------


@given(ids=st.lists(st.integers(0, 4200), max_size=24))
def test_any_tokens_give_their_bytes(ids: list[int], tokenizer: Tokenizer, models_own: tiktoken.Encoding) -> None:
    known = [token for token in ids if token < 4096]
    assert tokenizer.decode(ids) == visible(models_own, tokenizer, known)
    text = PlainText(tokenizer, [0], ())
    pieces = [*map(text.add, ids), text.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)


@given(text=ANY_TEXT)
def test_characters_come_whole(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    stream = PlainText(tokenizer, [0], ())
    pieces = [*map(stream.add, ids), stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_every_byte_of_a_character_by_itself(tokenizer: Tokenizer, ranks: dict[bytes, int]) -> None:
    stream = PlainText(tokenizer, [0], ())
    assert [stream.add(ranks[bytes([byte])]) for byte in "a🐋".encode()] == ["a", "", "", "", "🐋"]


# ---- at the real size ------------------------------------------------------------------------------------------------


def test_163840_tokens_are_read_in_a_second_or_so(tmp_path: Path) -> None:
    rng = random.Random(5)
    tokens = [bytes([byte]) for byte in range(256)]
    known = set(tokens)
    while len(tokens) < 163_584:
        token = rng.choice(tokens) + rng.choice(tokens)
        if len(token) < 40 and token not in known:
            known.add(token)
            tokens.append(token)
    lines = (b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (tmp_path / "tiktoken.model").write_bytes(b"".join(lines))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config_of(len(tokens))))
    (tmp_path / "config.json").write_text('{"vocab_size": 163840}')
    begin = time.process_time()
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == 163_840
    assert tokenizer.decode(tokenizer.encode(CODE)) == CODE
    assert time.process_time() - begin < 5  # 0.4 s where the machine is idle
