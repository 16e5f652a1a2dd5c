"""Progress of long work: a bar at a terminal, lines elsewhere, or JSON lines, always on stderr; lines in the log.

It never ends the work: when stderr refuses (its reader is gone, its disk is full), progress is no longer shown.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from ...choices import PROGRESS_FORMS
from ...inputs.printable import printable_json
from ...progress import Task
from .color import wants_color
from .console import say_unlogged
from .log import log
from .pace import Pace

if TYPE_CHECKING:
    from tqdm import tqdm

# Seconds: between two drawings of a bar, at most between two, and at most between two lines.
_DRAWN_SECONDS, _REDRAWN_SECONDS, _LINE_SECONDS = 0.1, 1.0, 30.0
_BAR_STEPS = 1000

Command = TypeVar("Command", bound=Callable[..., Any])


def progress_options(command: Command) -> Command:
    """Add `--progress` and `--quiet` to a command with long work."""
    quiet = click.option("--quiet", is_flag=True, help="No progress and no notes on stderr.")
    form = click.option(
        "--progress",
        type=click.Choice(PROGRESS_FORMS),
        default="auto",
        show_default=True,
        help="On stderr: a bar; lines, every 30 seconds and at each layer; or JSON lines. auto: a bar on a terminal, "
        "else lines.",
    )
    return form(quiet(command))


class View(Protocol):
    """A way to show a task."""

    seconds: float
    """Seconds between two calls of `show`, with progress or without."""

    def show(self, pace: Pace, *, layer_done: bool) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class TerminalProgress:
    """`npuq.progress.Progress` by the options; notes are lines on stderr. Thread-safe, a context manager."""

    def __init__(self, form: str = "auto", quiet: bool = False):
        self._form = "none" if quiet else form
        self._quiet = quiet
        self._lock = threading.RLock()
        self._view: View | None = None
        self._views: list[View] = []  # that of stderr, and the log's
        self._pace: Pace | None = None
        self._ended: threading.Event | None = None
        self.total = 0

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def start(self, task: Task, /) -> None:
        self._end()
        self.total = task.total
        if task.done:
            self.note(f"continuing: {Pace(task).count_text()} are done")
        if task.total == 0:
            return
        with self._lock:
            self._view, self._pace = _view(self._form), Pace(task)
            self._views = [*([] if self._view is None else [self._view]), *([_LogLines()] if log.is_open else [])]
            self._ended = threading.Event()
        for view in self._views:
            watcher = threading.Thread(target=self._watch, args=(self._ended, view), daemon=True)
            try:
                watcher.start()
            except RuntimeError:  # no new thread can start: shown at each advance only
                break

    def advance(
        self, count: int, /, *, effort: float | None = None, layer: int | None = None, layer_done: bool = False
    ) -> None:
        with self._lock:
            if self._pace is not None and self._views:
                self._pace.advance(count, effort, layer, layer_done)
                for view in self._views:
                    view.show(self._pace, layer_done=layer_done)

    def note(self, text: str, /) -> None:
        """Print one line for the user, unless --quiet; the log has it in any case."""
        log.add(text)
        if self._quiet:
            return
        with self._lock:
            if self._view is not None:
                self._view.note(text)
            elif self._form == "json":
                _say_json({"event": "note", "text": text})
            else:
                say_unlogged(text)

    def _watch(self, ended: threading.Event, view: View) -> None:
        while not ended.wait(view.seconds):
            with self._lock:
                if not ended.is_set() and self._pace is not None:
                    view.show(self._pace, layer_done=False)

    def _end(self) -> None:
        with self._lock:
            if self._ended is not None:
                self._ended.set()
            for view in self._views:
                view.close()
            self._view = self._pace = self._ended = None
            self._views = []


def _view(form: str) -> View | None:
    if sys.stderr is None:  # closed
        return None
    if form == "auto":
        form = "bar" if sys.stderr.isatty() else "lines"
    views: dict[str, Callable[[], View]] = {"bar": _Bar, "lines": _Lines, "json": _JsonLines}
    return views[form]() if form in views else None


class _Lines:
    """Lines, every 30 seconds and at the end of each layer."""

    seconds = _LINE_SECONDS

    def __init__(self) -> None:
        self._last = time.monotonic()

    def show(self, pace: Pace, *, layer_done: bool) -> None:
        now = time.monotonic()
        # A waiting thread wakes up a little early or late.
        if layer_done or now - self._last >= 0.9 * self.seconds:
            self._last = now
            self._write(pace, layer_done)

    def _write(self, pace: Pace, layer_done: bool) -> None:
        say_unlogged(f"{pace.task.name}: {pace.line(layer_done=layer_done)}")

    def note(self, text: str) -> None:
        say_unlogged(text)

    def close(self) -> None:
        return


class _LogLines(_Lines):
    """The same lines, in the log."""

    def _write(self, pace: Pace, layer_done: bool) -> None:
        log.add(f"{pace.task.name}: {pace.line(layer_done=layer_done)}")


class _JsonLines(_Lines):
    """Lines as JSON objects: `event` is progress, layer or note."""

    def _write(self, pace: Pace, layer_done: bool) -> None:
        _say_json({"event": "layer" if layer_done else "progress", **pace.as_dict()})

    def note(self, text: str) -> None:
        _say_json({"event": "note", "text": text})


class _Bar:
    """A bar by tqdm, drawn again every second even without progress."""

    seconds = _REDRAWN_SECONDS

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._drawn = 0.0
        self._pace: Pace | None = None

    def show(self, pace: Pace, *, layer_done: bool) -> None:
        now, self._pace = time.monotonic(), pace
        if now - self._drawn < _DRAWN_SECONDS:
            return
        self._drawn = now
        try:
            self._draw(pace)
        except (OSError, ValueError):
            return

    def _draw(self, pace: Pace) -> None:
        if self._bar is None:
            self._bar = _new_bar()
        line = pace.line(layer_done=False).replace("{", "{{").replace("}", "}}")
        self._bar.bar_format = f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {line}"
        self._bar.set_description_str(pace.task.name, refresh=False)
        self._bar.n = round(_BAR_STEPS * pace.fraction)
        self._bar.refresh()

    def note(self, text: str) -> None:
        if self._bar is not None:
            try:
                self._bar.clear()
            except (OSError, ValueError):
                self._bar = None
        say_unlogged(text)

    def close(self) -> None:
        try:
            if self._pace is not None:
                self._draw(self._pace)  # the final state
            if self._bar is not None:
                self._bar.close()
        except (OSError, ValueError):
            return


def _new_bar() -> tqdm[Any]:
    from tqdm import tqdm

    # Terminals of `script`, of containers and of CI often report a size of 0: tqdm would draw nothing there.
    sized = sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno()))
    return tqdm(
        total=_BAR_STEPS,
        file=sys.stderr,
        colour="cyan" if wants_color(sys.stderr) else None,
        dynamic_ncols=sized,
        ncols=None if sized else 100,
        nrows=None if sized else 24,
    )


def _say_json(content: dict[str, Any]) -> None:
    try:
        click.echo(printable_json(json.dumps(content)), err=True)
    except (OSError, ValueError):
        return
