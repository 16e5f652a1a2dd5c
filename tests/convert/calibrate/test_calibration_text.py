"""Calibration text: every form it may have, and one clear line for every way it can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calibrated import add_tokenizer, text
from tokenizers import Tokenizer

from npuq.convert.calibrate.texts import read_calibration
from npuq.errors import CalibrationError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    add_tokenizer(directory)
    return directory


def read(path, checkpoint, samples=4, length=9, vocabulary=100, positions=256):
    return read_calibration(path, checkpoint, vocabulary, positions, samples, length)


def test_windows_are_spread_over_the_text_and_led_by_bos(checkpoint, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{index % 98}" for index in range(800)))
    found = read(file, checkpoint)
    assert found.tokens.shape == (4, 9) and found.name == "text.txt"
    assert found.tokens[:, 0].tolist() == [0] * 4
    starts = [0, 25 * 8, 50 * 8, 75 * 8]
    assert found.tokens[:, 1:].tolist() == [[2 + (start + k) % 98 for k in range(8)] for start in starts]
    assert read(file, checkpoint).sha256 == found.sha256


def test_short_texts_overlap_before_they_are_refused(checkpoint, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(text(12))
    found = read(file, checkpoint)
    assert found.samples == 4 and len({tuple(row) for row in found.tokens.tolist()}) == 4
    file.write_text(text(7))
    with pytest.raises(CalibrationError, match=r"text\.txt: has 7 tokens, and one sample .* needs 8"):
        read(file, checkpoint)


def test_json_lines_chats_and_directories(checkpoint, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("w1 w2 w3")
    records = [
        {"text": "w4 w5"},
        {"messages": [{"role": "user", "content": "w6"}, {"role": "assistant", "content": "w7"}]},
    ]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (folder / "ignored.bin").write_bytes(b"\xff")
    found = read(folder, checkpoint, samples=1, length=10)
    # </s> (1) between documents; words are two above their number.
    assert found.tokens.tolist() == [[0, 3, 4, 5, 1, 6, 7, 1, 8, 9]]


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (b"", "txt", "is empty"),
        (b" \n", "jsonl", "is empty"),
        (b"\xff\xfe w1", "txt", "is not UTF-8"),
        (b'{"text": 3}', "jsonl", "line 1: needs"),
        (b'{"text": "w1"}\n[]', "jsonl", "line 2: needs"),
        (b'{"text": "w1"', "jsonl", "line 1: not valid JSON"),
        (b"[" * 100_000, "jsonl", "line 1: not valid JSON"),
        (b'{"text": "w1 \\ud800"}', "jsonl", "line 1: not valid JSON: a text holds the lone surrogate"),
        (
            b'{"messages": [{"role": "user", "content": "\\udfff"}]}',
            "jsonl",
            "line 1: not valid JSON: a text holds the lone surrogate",
        ),
        (b'{"messages": [3]}', "jsonl", "line 1: needs"),
        (b'{"messages": [{"role": "user"}]}', "jsonl", "line 1: needs"),
    ],
)
def test_bad_text(checkpoint, tmp_path, content, suffix, message):
    file = tmp_path / f"text.{suffix}"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read(file, checkpoint)
    assert "text." in str(caught.value) and "\n" not in str(caught.value)


def test_other_bad_input(checkpoint, tmp_path):
    with pytest.raises(CalibrationError, match="no such file"):
        read(tmp_path / "none.txt", checkpoint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"no \.txt"):
        read(tmp_path / "empty", checkpoint)
    file = tmp_path / "text.txt"
    file.write_text(text(100))
    with pytest.raises(CalibrationError, match="the model has 50: tokenizer and config"):
        read(file, checkpoint, vocabulary=50)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_special_tokens(["<late>"])
    (tmp_path / "late").mkdir()
    tokenizer.save(str(tmp_path / "late" / "tokenizer.json"))
    (tmp_path / "late" / "tokenizer_config.json").write_text('{"bos_token": "<late>"}')
    with pytest.raises(CalibrationError, match="go up to 100, but the model has 100"):
        read(file, tmp_path / "late")
    with pytest.raises(CalibrationError, match="exceeds the model's 8 positions"):
        read(file, checkpoint, positions=8)
    with pytest.raises(CalibrationError, match="must be at least"):
        read(file, checkpoint, samples=0)
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "w1"}]}')
    config = checkpoint / "tokenizer_config.json"
    config.write_text('{"chat_template": "{{ nothing.at.all }}"}')
    with pytest.raises(CalibrationError, match=r"chat\.jsonl: a chat cannot be rendered"):
        read(chat, checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CalibrationError, match="tokenizer"):
        read(file, checkpoint)
