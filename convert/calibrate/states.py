"""Hidden states between layers, on disk: whole or absent, so that a walk continues at the layer where it was killed.

One file has two streams of float32 [tokens, hidden]: the float model's and the quantized one's. `state.json` names the
layer whose input they are, the file and its hash, and carries the reports of the layers before. It is renamed into
place after the file is synced; only then is the file of the layer before removed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...deferred import torch
from ...errors import ConversionError
from ...formats.output_files import make_folder, new_file, publish, refuse_link
from ...inputs.files import file_sha256, inside, read_bytes
from ..write.checked_lines import checked_line, line_content
from .layer_report import LayerReport

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "calibration"
_STATE, _PARTIAL = "state.json", "partial.json"
_READY = "streams-{}.bin"
_SCRATCH = "scratch-{}.bin"
_SELECTIONS = "selections.bin"
_STAGED = "staged-"


class StreamPair:
    """Hidden states float32 [tokens, hidden] twice: of the float model, and of the quantized one."""

    def __init__(self, floats: Tensor, quantized: Tensor):
        self.floats = floats
        self.quantized = quantized

    def first(self, tokens: int) -> StreamPair:
        """The first `tokens` rows of both streams."""
        return StreamPair(self.floats[:tokens], self.quantized[:tokens])


class Streams(StreamPair):
    """Both streams in one file, memory-mapped."""

    def __init__(self, path: Path, tokens: int, hidden: int, *, create: bool):
        self.path = path
        shape = (2, tokens, hidden)
        if create:
            with new_file(path) as file:
                # Allocate blocks now and not at the first write to a page: a full disk is then an error and not a
                # signal.
                os.posix_fallocate(file.fileno(), 0, 4 * 2 * tokens * hidden)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b") as file:
            self._map = np.memmap(file, np.float32, "r+", shape=shape)
        super().__init__(*torch.from_numpy(self._map).unbind(0))

    def sync(self) -> None:
        """Return once every value is on stable storage."""
        self._map.flush()
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Selections:
    """The tokens that queries of the nearest full layer selected, int32 [2, tokens, topk]: in the float model, and in
    the quantized one. A memory-mapped file: it exceeds memory as hidden states do."""

    def __init__(self, path: Path, tokens: int, topk: int):
        with new_file(path) as file:
            os.posix_fallocate(file.fileno(), 0, 4 * 2 * tokens * topk)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b") as file:
            self._map = np.memmap(file, np.int32, "r+", shape=(2, tokens, 1, topk))
        self.floats, self.quantized = torch.from_numpy(self._map).unbind(0)


@dataclass(frozen=True)
class State:
    """The position of a walk: the reports of the layers behind it, in their order."""

    reports: tuple[LayerReport, ...] = ()

    @property
    def layer(self) -> int:
        """The index of the next layer."""
        return len(self.reports)


def state_bytes(tokens: int, hidden: int, topk: int) -> int:
    """Bytes of disk for hidden states: those of two layers, and those between attention and experts.

    topk: tokens that a query selects, 0 where none does. With it, also selections, and the states of the layer that an
    interrupted walk continues from.
    """
    return (4 if topk else 3) * 2 * 4 * tokens * hidden + 2 * 4 * tokens * topk


class StateStore:
    """The folder of a walk's hidden states. rank: of several that share it; each has files of its own, and all read
    the states that rank 0 publishes."""

    def __init__(self, folder: Path, tokens: int, hidden: int, rank: int = 0):
        self._folder = folder
        self._rank = f"rank-{rank}-" if rank else ""
        self._shape = (tokens, hidden)

    def load(self) -> tuple[State, Streams] | None:
        """The newest complete state; None: start at the first layer."""
        try:
            found = line_content(read_bytes(inside(self._folder, _STATE, ConversionError), ConversionError))
            if not isinstance(found["reports"], list):
                return None
            state = State(tuple(map(LayerReport.from_json, found["reports"])))
            path = inside(self._folder, _READY.format(state.layer), ConversionError)
            if (
                path.stat().st_size != 4 * 2 * self._shape[0] * self._shape[1]
                or file_sha256(path, ConversionError) != found["sha256"]
            ):
                return None
            return state, Streams(path, *self._shape, create=False)
        except (OSError, ConversionError, ValueError, KeyError, TypeError):
            return None  # torn or of another walk: everything is computed again

    def new(self, layer: int) -> Streams:
        """New streams for the input of `layer`; they count only once `publish`ed."""
        make_folder(self._folder)
        return Streams(self._own(_SCRATCH.format(layer)), *self._shape, create=True)

    def scratch(self) -> Streams:
        """Streams within a layer; no run resumes from them."""
        make_folder(self._folder)
        return Streams(self._own(_SCRATCH.format("inner")), *self._shape, create=True)

    def selections(self, topk: int) -> Selections:
        """New selections of `topk` tokens; no run resumes from them."""
        make_folder(self._folder)
        return Selections(self._own(_SELECTIONS), self._shape[0], topk)

    def _own(self, name: str) -> Path:
        return self._folder / f"{self._rank}{name}"

    def carry(self, streams: Streams, used: Streams) -> Streams:
        """Go on with `streams` instead of `used` without a state: a later run starts at the last published one."""
        self._discard(used)
        return streams

    def _discard(self, used: Streams) -> None:
        if not used.path.match(_READY.format("*")):
            used.path.unlink(missing_ok=True)

    def publish(self, streams: Streams, state: State, used: Streams) -> Streams:
        """Make `streams` the input of the state's layer, for a later run to start from; return them under their new
        name. The `used` ones are done with."""
        streams.sync()
        path = self._folder / _READY.format(state.layer)
        streams.path.replace(path)
        streams.path = path
        reports = [report.as_json() for report in state.reports]
        content = {"layer": state.layer, "sha256": file_sha256(path, ConversionError), "reports": reports}
        partial = self._folder / _PARTIAL
        with new_file(partial) as file:
            file.write(checked_line(content))
        publish(partial, self._folder / _STATE)
        self._discard(used)
        for old in self._folder.glob(_READY.format("*")):
            if old != path:
                old.unlink()
        return streams


def staged_folder(folder: Path, rank: int) -> Path:
    """The folder of the weights that a rank has quantized, until rank 0 has copied them to their places."""
    return folder / f"{_STAGED}{rank}"


def remove_staged(folder: Path) -> None:
    """Remove a rank's staged weights. Raises OSError."""
    refuse_link(folder)
    if folder.is_dir():
        for path in folder.glob("*.safetensors"):
            path.unlink()
        with suppress(OSError):
            folder.rmdir()


def remove_states(output_folder: Path) -> None:
    """Remove the files of a walk's continuation, and its folder unless it holds another file. Raises OSError."""
    folder = output_folder / FOLDER
    refuse_link(folder)
    if not folder.is_dir():
        return
    for path in (*folder.glob("*.bin"), *folder.glob("*.json")):
        path.unlink()
    for staged in folder.glob(f"{_STAGED}*"):
        remove_staged(staged)
    with suppress(OSError):
        folder.rmdir()
