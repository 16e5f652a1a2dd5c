"""Calibration text: files become samples of token ids, always the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CalibrationError, GenerationError
from ...inputs.files import MOST_GIVEN_BYTES, read_given_text, read_text
from ...inputs.json_text import parse_json
from ...inputs.printable import name_as_text
from ...models.config import ModelConfig
from ...runtime.text.tokenizer import Tokenizer
from ...runtime.text.tokenizer_check import require_tokenizer
from .settings import BUILTIN

_SUFFIXES = (".txt", ".md", ".jsonl")
_TURN = {"role", "content"}


@dataclass(frozen=True)
class Calibration:
    """The calibration set: `tokens` int64 [samples, sequence_length], the text's name, and a hash of the tokens."""

    name: str
    tokens: Tensor
    sha256: str

    @property
    def samples(self) -> int:
        return self.tokens.shape[0]

    @property
    def sequence_length(self) -> int:
        return self.tokens.shape[1]

    def selected(self, config: ModelConfig) -> int:
        """Tokens that a query selects in samples of this length; 0 where every query attends to all earlier tokens."""
        most = config.attention.dense_tokens
        return most if most is not None and self.sequence_length > most else 0


def read_calibration(
    path: str | Path, checkpoint: Path, vocab_size: int, max_position: int, samples: int, sequence_length: int
) -> Calibration:
    """Cut a text into samples, by the tokenizer in the checkpoint's directory.

    `path` is "builtin", a file of plain text or of JSON lines ({"text": …}, or {"messages": […]} for the chat
    template), or a directory of such files. Documents are tokenized one by one and joined, with the end-of-sequence
    token between them where there is one. `samples` samples are spread evenly over the text, overlapping only where it
    is too short. Each is preceded by the beginning-of-sequence token, as a prompt would be.

    Raises CalibrationError for a text that is missing, not UTF-8, malformed or shorter than one sample, and for token
    ids that the model does not have.
    """
    if samples < 1 or sequence_length < 2:
        raise CalibrationError(f"--samples {samples} and --sequence-length {sequence_length} must be at least 1 and 2")
    if sequence_length > max_position:
        raise CalibrationError(f"--sequence-length {sequence_length} exceeds the model's {max_position} positions")
    tokenizer = read_tokenizer(checkpoint)
    name, documents = _documents(path)
    separator = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    stream: list[int] = []
    for document in documents:
        ids = (
            tokenizer.encode(document, special=False) if isinstance(document, str) else _chat(tokenizer, document, name)
        )
        stream += [*(separator if stream else []), *ids]
    lead = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    largest = max(chain(lead, stream), default=0)
    if largest >= vocab_size:
        raise CalibrationError(
            f"{name}: its tokens go up to {largest}, but the model has {vocab_size}: tokenizer and config.json of "
            f"{checkpoint} are not of one model"
        )
    width = sequence_length - len(lead)
    if len(stream) < width:
        raise CalibrationError(
            f"{name}: has {len(stream)} tokens, and one sample of --sequence-length {sequence_length} needs {width}; "
            "give a longer text or a shorter sequence length"
        )
    count = min(samples, len(stream) - width + 1)
    last = len(stream) - width
    starts = [last * index // max(1, count - 1) for index in range(count)]
    if count * width <= len(stream):
        starts = [len(stream) // width * index // count * width for index in range(count)]
    tokens = torch.tensor([lead + stream[start : start + width] for start in starts])
    return Calibration(name, tokens, hashlib.sha256(tokens.numpy().tobytes()).hexdigest())


def read_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's directory. Raises CalibrationError where it cannot be read."""
    try:
        require_tokenizer(checkpoint)
        return Tokenizer(checkpoint)
    except GenerationError as error:
        raise CalibrationError(
            f"calibration needs the checkpoint's tokenizer: {error}; or leave out what needs a text: --method mse, or "
            "rotate+mse"
        ) from error


def _documents(path: str | Path) -> tuple[str, Iterator[Any]]:
    if str(path) == BUILTIN:
        text = (files(__package__) / "builtin.jsonl").read_text(encoding="utf-8")
        return BUILTIN, _json_lines(text, BUILTIN)
    path = Path(path)
    if path.is_dir():
        found = sorted(child for child in path.iterdir() if child.suffix in _SUFFIXES)
        if not found:
            raise CalibrationError(f"{path}: no {', '.join(_SUFFIXES)} files in it to calibrate on")
        # The user did not name the files of a directory one by one: its pipes and devices are not read.
        texts = ((read_text(child, CalibrationError, MOST_GIVEN_BYTES), child) for child in found)
        return name_as_text(path.resolve()), (document for text, child in texts for document in _split(text, child))
    if not path.exists():
        raise CalibrationError(f"{path}: no such file; give a text to calibrate on, or 'builtin'")
    return name_as_text(path), _split(read_given_text(path, CalibrationError), path)


def _split(text: str, path: Path) -> Iterator[Any]:
    if not text.strip():
        raise CalibrationError(f"{path}: is empty; give a text to calibrate on, or 'builtin'")
    return _json_lines(text, str(path)) if path.suffix == ".jsonl" else iter([text])


def _json_lines(text: str, where: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        record = parse_json(line, f"{where}, line {number}", CalibrationError)
        found = record.get("text", record.get("messages")) if isinstance(record, dict) else None
        if not found or not (isinstance(found, str) or _is_chat(found)):
            raise CalibrationError(f'{where}, line {number}: needs {{"text": "…"}} or {{"messages": […]}}')
        yield found


def _is_chat(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(turn, dict) and turn.keys() >= _TURN for turn in found)


def _chat(tokenizer: Tokenizer, messages: list[Any], where: str) -> list[int]:
    try:
        return tokenizer.chat(messages)
    except GenerationError as error:
        raise CalibrationError(f"{where}: a chat cannot be rendered: {error}") from error
