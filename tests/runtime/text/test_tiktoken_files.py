"""A tiktoken.model from outside: what is damaged or made to harm is refused in one line that says where."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npuq.errors import GenerationError
from npuq.runtime.text.tokenizer import Tokenizer

from .tiktoken_models import PATTERN, RANKS

CONFIG = r"tokenizer_config\.json: "
MODEL = r"tiktoken\.model"


@pytest.fixture
def files(kimi_files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kimi_files, tmp_path / "kimi"))


def refused(directory: Path, expected: str) -> None:
    begin = time.process_time()
    with pytest.raises(GenerationError, match=expected) as caught:
        Tokenizer(directory)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert time.process_time() - begin < 10


def lines_of(directory: Path) -> list[bytes]:
    return (directory / "tiktoken.model").read_bytes().splitlines()


def write_lines(directory: Path, lines: list[bytes]) -> None:
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")


def configure(directory: Path, **values: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def add(directory: Path, number: object, content: Any, **values: Any) -> None:
    """Add an entry to added_tokens_decoder."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"][str(number)] = {"content": content, "special": True, **values}
    path.write_text(json.dumps(config))


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"YWFh 4", "its rank must be 700, not '4'"),  # twice
        (b"YWFh 699", "its rank must be 700, not '699'"),
        (b"YWFh 701", "its rank must be 700, not '701'"),  # a gap
        (b"YWFh -1", "its rank must be 700, not '-1'"),
        (b"YWFh 99999999999999999999", "its rank must be 700, not '99999999999999999999'"),
        (b"YWFh 700 700", "its rank must be 700, not '700 700'"),
        (b"YWFh  700", "its rank must be 700, not ' 700'"),
        (b"YWFh 0x2bc", "its rank must be 700"),
        (b"YWFh 7_00", "its rank must be 700"),
        (b"YWFh", "its rank must be 700, not ''"),
        (b"", "its rank must be 700, not ''"),
        (b"\x00\xff\x1b[31m \x1b", r"its rank must be 700, not '\\x1b'"),
        (b" 700", "'' is no byte string in base64"),
        (b"==== 700", "'====' is no byte string in base64"),
        (b"YWF! 700", "'YWF!' is no byte string in base64"),
        (b"YWFhY 700", "'YWFhY' is no byte string in base64"),
        (b"YWE 700", "'YWE' is no byte string in base64"),
        (b"\xff\x1b 700", r".*is no byte string in base64"),
        (b"x" * 100_000 + b"! 700", "'x{59} is no byte string in base64"),
        (b"YQ== 700", "has the byte string of line [0-9]+;"),
        (b"YR== 700", "has the byte string of line [0-9]+;"),  # the same byte: a decoder ignores the last bits
    ],
)
def test_a_damaged_line(files: Path, line: bytes, expected: str) -> None:
    lines = lines_of(files)
    lines[700] = line
    write_lines(files, lines)
    refused(files, f"{MODEL}, line 701: {expected}.*fetch it again")


def test_lines_out_of_order(files: Path) -> None:
    lines = lines_of(files)
    lines[10], lines[20] = lines[20], lines[10]
    write_lines(files, lines)
    refused(files, f"{MODEL}, line 11: its rank must be 10, not '20'")


def test_a_byte_that_no_token_has(files: Path) -> None:
    lines = [line for line in lines_of(files) if line.split()[0] != b64encode(b"\xc3")]
    write_lines(files, [line.split()[0] + b" %d" % rank for rank, line in enumerate(lines)])
    refused(files, f"{MODEL}: has no token of the single byte 0xC3")


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\x0a\x0e\x0a\x05<unk>", b"version https://git-lfs.github.com/spec/v1"]
)
def test_no_ranks_at_all(files: Path, content: bytes) -> None:
    (files / "tiktoken.model").write_bytes(content)
    refused(files, f"{MODEL}, line 1: its rank must be 0")


def test_a_cut_file(files: Path) -> None:
    """Where the cut leaves whole lines, config.json's vocab_size tells."""
    lines = lines_of(files)
    write_lines(files, lines[:300])
    configure(files, added_tokens_decoder={}, **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token")))
    (files / "config.json").write_text('{"vocab_size": 4096}')
    refused(files, "its tokenizer has 556 tokens, and config.json's vocab_size is 4096")


def test_line_ends_of_windows_and_none_at_the_end(files: Path) -> None:
    expected = Tokenizer(files).encode("naïve 鯨")
    (files / "tiktoken.model").write_bytes(b"\r\n".join(lines_of(files)))
    assert Tokenizer(files).encode("naïve 鯨") == expected


def test_too_many(files: Path) -> None:
    (files / "tiktoken.model").write_bytes(b"\n".join([b"a 0"] * ((1 << 20) + 1)))
    refused(files, f"{MODEL}: has 1048577 lines; npuq reads up to 1048576")
    with (files / "tiktoken.model").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    refused(files, f"{MODEL}: is larger than")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_out(path: Path) -> None:
    path.symlink_to("/etc/hostname")


@pytest.mark.parametrize("make", [fifo, link_out, Path.mkdir])
def test_what_is_no_file_of_the_checkpoint(files: Path, make: Callable[[Path], None]) -> None:
    (files / "tiktoken.model").unlink()
    make(files / "tiktoken.model")
    refused(files, MODEL)


# ---- special tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "content", "expected"),
    [
        (5, "<|x|>", r"gives '<\|x\|>' the id 5, which is a rank of tiktoken.model \(line 6\)"),
        (RANKS - 1, "<|x|>", f"the id {RANKS - 1}, which is a rank"),
        (RANKS + 256, "<|x|>", f"the id {RANKS + 256}, beyond the model's vocabulary of {RANKS + 256}"),
        (999_999_999, "<|x|>", "the id 999999999, beyond the model's vocabulary"),
        (10**30, "<|x|>", "'1000000000000000000000000000000' is no token id"),
        (-1, "<|x|>", "'-1' is no token id"),
        ("", "<|x|>", "'' is no token id"),
        ("٣", "<|x|>", "'٣' is no token id"),
        ("\x1b", "<|x|>", r"'\\x1b' is no token id"),
        (RANKS + 50, "", "must have content, a text of 1 to 128 characters"),
        (RANKS + 50, "x" * 129, "must have content, a text of 1 to 128 characters"),
        (RANKS + 50, 5, "must have content"),
        (RANKS + 50, None, "must have content"),
        (RANKS + 50, "[BOS]", rf"'\[BOS\]' has the ids {RANKS} and {RANKS + 50}|has the ids {RANKS + 50} and {RANKS}"),
        (RANKS + 50, f"<|reserved_token_{RANKS + 60}|>", f"has the ids {RANKS + 50} and {RANKS + 60}"),
        (f"0{RANKS}", "<|x|>", f"has the id {RANKS} twice"),
    ],
)
def test_an_added_token(files: Path, number: object, content: Any, expected: str) -> None:
    (files / "config.json").write_text(json.dumps({"vocab_size": RANKS + 256}))
    add(files, number, content)
    refused(files, f"{CONFIG}added_tokens_decoder.*{expected}")


def test_without_a_config_ids_have_an_end_too(files: Path) -> None:
    add(files, 100_000_000, "<|x|>")
    refused(files, f"{CONFIG}added_tokens_decoder .* beyond")


@pytest.mark.parametrize("special", [None, 1, "true", []])
def test_special_is_true_or_false(files: Path, special: Any) -> None:
    add(files, RANKS + 50, "<|x|>", special=special)
    refused(files, f"{CONFIG}added_tokens_decoder: {RANKS + 50} must have content, .* and special, true or false")


@pytest.mark.parametrize("given", [[], "x", 5, True, None, {str(number): {} for number in range(20_000)}])
def test_no_object_of_tokens(files: Path, given: Any) -> None:
    configure(files, added_tokens_decoder=given)
    refused(files, f"{CONFIG}added_tokens_decoder must be an object of at most 16384 tokens by id")


@pytest.mark.parametrize("entry", [None, "x", 5, []])
def test_an_entry_that_is_no_object(files: Path, entry: Any) -> None:
    configure(files, added_tokens_decoder={str(RANKS): entry})
    refused(files, f"{CONFIG}added_tokens_decoder: {RANKS} must have content")


def test_sixteen_thousand_special_tokens(files: Path) -> None:
    """A long list that is no mistake costs no time."""
    named = {str(RANKS + 256 + place): {"content": f"<|{place}|>" * 10, "special": True} for place in range(16_000)}
    config = json.loads((files / "tokenizer_config.json").read_text())
    configure(files, added_tokens_decoder={**config["added_tokens_decoder"], **named})
    begin = time.process_time()
    tokenizer = Tokenizer(files)
    assert tokenizer.encode("<|7|>" * 10) == [RANKS + 263]
    for text in ("<|7|" * 250_000, "<" * 1_000_000, "<|reserved_token_38" * 50_000):
        assert len(tokenizer.encode(text)) > 1000
    assert time.process_time() - begin < 20


def test_a_named_token_that_is_none(files: Path) -> None:
    configure(files, eos_token={"content": "<|nowhere|>", "special": True})
    refused(files, rf"{CONFIG}eos_token '<\|nowhere\|>' is none of the special tokens in added_tokens_decoder")


@pytest.mark.parametrize("name", ["QWenTokenizer", "LlamaTokenizer", None, 5, ["TikTokenTokenizer"], "\x1b"])
def test_a_class_whose_pattern_is_unknown(files: Path, name: Any) -> None:
    configure(files, tokenizer_class=name)
    refused(files, rf"{CONFIG}tokenizer_class .* does not say how tiktoken.model is read; npuq knows TikTokenTokenizer")


CODE = """class TikTokenTokenizer(PreTrainedTokenizer):
    pat_str = "|".join([
{}
    ])

    def __init__(self): raise SystemExit('remote code')
"""


@pytest.mark.parametrize("indent", ["        ", ""])
def test_the_pattern_of_the_models_own_code(files: Path, indent: str) -> None:
    """It is read as text. One that differs would mean other tokens without a word."""
    parts = [part for part in re.split(r"\|(?=\[|\\|\s)", PATTERN) if part]
    assert "|".join(parts) == PATTERN and len(parts) == 8
    code = files / "tokenization_kimi.py"
    code.write_text(CODE.format("\n".join(f'{indent}r"""{part}""",' for part in parts)))
    assert Tokenizer(files).encode("naïve")
    parts[3] = r"\p{N}"
    code.write_text(CODE.format("\n".join(f'{indent}r"""{part}""",' for part in parts)))
    refused(
        files, r"tokenization_kimi\.py: its pat_str is not the pattern by which npuq splits a text.*tokenizer\.json"
    )


@pytest.mark.parametrize(
    "code",
    [
        'pat_str = "|".join([' + 'r"""a""",' * 100_000,
        'pat_str = "|".join([' + " " * 900_000,
        'pat_str = "|".join(' * 40_000,
    ],
)
def test_code_takes_no_time(files: Path, code: str) -> None:
    begin = time.process_time()
    (files / "tokenization_kimi.py").write_text(code)
    assert Tokenizer(files).encode("naïve")
    assert time.process_time() - begin < 5


def test_no_configuration(files: Path) -> None:
    (files / "tokenizer_config.json").unlink()
    refused(files, r"tiktoken\.model without the tokenizer_config\.json")


def test_more_ranks_than_the_model_has_tokens(files: Path) -> None:
    sizes = {"vocab_size": RANKS - 1}
    for config in (sizes, {"model_type": "kimi_k25", "text_config": sizes}):
        (files / "config.json").write_text(json.dumps(config))
        refused(files, f"{MODEL}: has {RANKS} ranks, and config.json's vocab_size is {RANKS - 1}")


@pytest.mark.parametrize("kind", [None, 5, [], {}, "kimi_k25", "\x1b"])
@pytest.mark.parametrize("text", [None, 5, [], {"vocab_size": []}, {"model_type": []}])
def test_a_strange_config(files: Path, kind: Any, text: Any) -> None:
    """Of config.json the tokenizer needs the vocabulary's size alone, and does without."""
    (files / "config.json").write_text(json.dumps({"model_type": kind, "text_config": text, "vocab_size": "x"}))
    try:
        assert Tokenizer(files).vocab_size == RANKS + 256
    except GenerationError as error:
        assert "config.json" in str(error) and str(error).isprintable()


def test_mutations_end_in_one_line(files: Path) -> None:
    """Bytes of the ranks or values of the configuration replaced: the tokenizer works, or says in one line why not."""
    rng = random.Random(5)
    strange: list[Any] = [None, True, -1, 2**70, 1.5, "", "x\x1b", [], {}, [[]], {"a": []}, "\x00" * 100]
    model, config = ((files / name).read_bytes() for name in ("tiktoken.model", "tokenizer_config.json"))
    worked = 0
    for number in range(60):
        damaged, changed = bytearray(model), json.loads(config)
        if number % 2:
            for _ in range(rng.randint(1, 4)):
                begin = rng.randrange(len(damaged))
                damaged[begin : begin + rng.choice((0, 1, 40))] = rng.randbytes(rng.choice((0, 1, 30)))
        else:
            place = changed if number % 4 else changed["added_tokens_decoder"]
            place[rng.choice(list(place))] = rng.choice(strange)
        (files / "tiktoken.model").write_bytes(damaged)
        (files / "tokenizer_config.json").write_text(json.dumps(changed))
        try:
            tokenizer = Tokenizer(files)
            tokenizer.decode(tokenizer.encode("Hello, 鯨 [BOS]"))
            tokenizer.chat("x", chat_template="{{ messages }}{{ bos_token }}")
            worked += 1
        except GenerationError as error:
            assert str(error).isprintable(), (number, str(error))
    assert 0 < worked < 60
