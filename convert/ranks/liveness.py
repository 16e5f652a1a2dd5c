"""Whether the process of a run still works, told without trust in any machine's clock.

On its own machine a process is looked up by its number. Elsewhere its heartbeat tells: it sets the time of its journal
every few seconds, which the shared file system does by its own clock. Whoever waits sets the time of a file of its own
in the same way and compares the two. A file system that stood still, and all processes with it, leaves old times too:
so a process is taken for dead only if it was also seen to be silent while one's own heartbeats came through.
"""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...errors import ConversionError
from ..write.journal import Journal
from .claims import RUN_NAME
from .holder import Holder

BEAT_SECONDS: Final = 10.0
SILENT_SECONDS: Final = 300.0
"""Longer than any file system keeps a file's times in a cache (60 s on NFS), or is away for a restart of its server."""


@dataclass(frozen=True)
class Pulse:
    """Seconds between two heartbeats, and of silence after which a process of another machine counts as dead."""

    beat: float = BEAT_SECONDS
    silent: float = SILENT_SECONDS


@dataclass(frozen=True)
class State:
    """over: the run writes no more. holder: its process, where the journal tells. age: seconds since its heartbeat."""

    over: bool
    holder: Holder | None = None
    age: float = 0.0


class Watch:
    """Judges other runs by their journals in `folder`. touch: sets the time of a file there, and returns it in ns."""

    def __init__(self, folder: Path, touch: Callable[[], int], pulse: Pulse):
        self._folder, self._touch, self._pulse = folder, touch, pulse
        self._seen: dict[str, tuple[int, float]] = {}

    def state(self, run: str | None) -> State:
        """The state of a run. Raises OSError where the file system refuses."""
        if run is None or RUN_NAME.fullmatch(run) is None:
            return State(over=True)  # no run has this name
        path, holder = self._folder / run, None
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                return State(over=True)  # no run makes a link or a pipe
            beginning, record = Journal.look(path)
            if record.ended:
                return State(over=True)
            holder = Holder.from_json(beginning.process)
            lives = holder.lives()
            if lives is not None:
                return State(not lives, holder)
        except FileNotFoundError:
            return State(over=True)
        except ConversionError:
            holder = None  # a damaged journal: its times still tell
        return self._by_time(run, path, holder)

    def _by_time(self, run: str, path: Path, holder: Holder | None) -> State:
        now, beat = self._touch(), path.lstat().st_mtime_ns
        before, since = self._seen.get(run, (None, 0.0))
        if before != beat:
            since = time.monotonic()
            self._seen[run] = beat, since
        age = (now - beat) / 1e9
        watched = time.monotonic() - since
        return State(age >= self._pulse.silent and watched >= 3 * self._pulse.beat, holder, age)


class Heartbeat:
    """A `thread`, to be started, that calls `beat` every few seconds until `stop`, also after errors of the file
    system."""

    def __init__(self, beat: Callable[[], object], pulse: Pulse):
        self._beat, self._seconds = beat, pulse.beat
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="npuq-heartbeat", daemon=True)

    def stop(self) -> None:
        self._stop.set()
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            with suppress(OSError):
                self._beat()
