"""A SentencePiece tokenizer.model without tokenizer.json: as SentencePiece itself encodes, or refused in one line."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npuq.errors import GenerationError
from npuq.runtime.text.tokenizer import Tokenizer

from .tiktoken_models import RANKS, documents, texts

sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("transformers")

SIZE = 1500
LLAMA: dict[str, Any] = {
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gemma": {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>"]},
}
MODELS: dict[str, bytes] = {}


def train(name: str, **settings: Any) -> bytes:
    """Content of a tokenizer.model, trained once a name."""
    if name not in MODELS:
        lines = [line for text in [*texts() * 5, *documents()] for line in text.split("\n") if line.strip()]
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=SIZE, minloglevel=2, **settings
        )
        MODELS[name] = file.getvalue()
    return MODELS[name]


def write(directory: Path, content: bytes, **config: Any) -> Path:
    (directory / "tokenizer.model").write_bytes(content)
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "vocab_size": SIZE}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**names, "add_bos_token": True, **config}))
    return directory


def refused(directory: Path, expected: str) -> None:
    with pytest.raises(GenerationError, match=expected) as caught:
        Tokenizer(directory)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_sentencepieces(kind: str, legacy: bool | None, tmp_path: Path) -> None:
    content = train(kind, **KINDS[kind])
    golden = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokenizer = Tokenizer(write(tmp_path, content, **({} if legacy is None else {"legacy": legacy})))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (SIZE, 1, 2)
    for text in texts():
        if legacy is False:
            text = text.lstrip(" ")
        expected = golden.encode(text)
        assert tokenizer.encode(text, special=False) == expected
        assert tokenizer.encode(text) == [1, *expected]
        assert tokenizer.decode(expected) == golden.decode(expected)


def test_no_code_runs_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question is asked"))
    content = train("llama", **LLAMA)
    auto_map = {"AutoTokenizer": ["tokenization_mine.MineTokenizer", None]}
    write(tmp_path, content, tokenizer_class="MineTokenizer", auto_map=auto_map)
    (tmp_path / "tokenization_mine.py").write_text("raise SystemExit('remote code')\n")
    golden = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert Tokenizer(tmp_path).encode("a whale", special=False) == golden.encode("a whale")


@pytest.mark.parametrize("kind", ["unigram", "char", "word"])
def test_kinds_that_transformers_does_not_convert_exactly(kind: str, tmp_path: Path) -> None:
    content = train(kind, **{**LLAMA, "model_type": kind, "byte_fallback": False, "hard_vocab_limit": False})
    refused(write(tmp_path, content), r"npuq reads byte-pair models.*put the model's tokenizer\.json there")


def test_a_table_of_replacements(tmp_path: Path) -> None:
    content = train("nfkc", **{**LLAMA, "normalization_rule_name": "nmt_nfkc"})
    refused(
        write(tmp_path, content), r"tokenizer\.model: it normalizes texts by a table.*put the model's tokenizer\.json"
    )


def test_a_conversion_that_drops_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of LlamaTokenizer, which has a prefix before every text."""
    monkeypatch.setattr("npuq.runtime.text.tokenizer_conversion._ANY_CLASS", "LlamaTokenizer")
    content = train("gemma", **KINDS["gemma"])
    refused(write(tmp_path, content), r"tokenizer\.model: transformers does not convert it exactly \('The quick")


def test_what_is_no_sentencepiece_model(tmp_path: Path, ranks: dict[bytes, int]) -> None:
    """Some models have tiktoken's ranks under this name. transformers would guess their pattern."""
    from .tiktoken_models import write_ranks

    said = r"tokenizer\.model: is no SentencePiece model; .*or put the model's tokenizer\.json there"
    assert len(ranks) == RANKS
    content = write_ranks(tmp_path, ranks).read_bytes()
    (tmp_path / "tiktoken.model").unlink()
    refused(write(tmp_path, content), said)
    garbled = train("llama", **LLAMA).replace("人".encode(), b"\xff\xfe\xfd")
    for content in (
        b"",
        b"\x00",
        garbled,
        b"version https://git-lfs.github.com/spec/v1\n",
        train("llama", **LLAMA)[:-1],  # inside the last field: where a longer cut falls depends on the training
    ):
        refused(write(tmp_path, content), said)


def change(edit: Callable[[Any], object]) -> bytes:
    """The trained model with an edit."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(train("llama", **LLAMA))
    edit(proto)
    return bytes(proto.SerializeToString())


def test_what_would_take_hours(tmp_path: Path) -> None:
    def lengthen(proto: Any) -> None:
        proto.pieces[700].piece = "a" * 1_000_000

    def multiply(proto: Any) -> None:
        piece = proto.pieces[700]
        proto.pieces.extend([piece] * (1 << 20))

    refused(write(tmp_path, change(lengthen)), "piece 700 is longer than the 512 bytes")
    refused(write(tmp_path, change(multiply)), "pieces; npuq reads up to 1048576")
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(1 << 40)
    refused(tmp_path, "is larger than")


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    refused(
        write(tmp_path, train("llama", **LLAMA)),
        r"tokenizer\.model: install sentencepiece and protobuf to read it, or put the model's tokenizer\.json there",
    )


def test_mutations_end_in_one_line(tmp_path: Path) -> None:
    rng = random.Random(5)
    whole = train("llama", **LLAMA)
    for number in range(25):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            begin = rng.randrange(len(damaged))
            damaged[begin : begin + rng.choice((0, 1, 20))] = rng.randbytes(rng.choice((0, 1, 15)))
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            tokenizer = Tokenizer(write(folder, bytes(damaged)))
            tokenizer.decode(tokenizer.encode("Hello, 鯨 <s>"))
        except GenerationError as error:
            assert str(error).isprintable(), (number, str(error))
        shutil.rmtree(folder)
