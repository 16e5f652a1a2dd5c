"""Commands over the ranks that torchrun started: who may print, and how all end together, with one line.

Rank 0 prints, and all others are silent: their errors are told to rank 0. Where rank 0 itself is lost, rank 1 prints.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from ..errors import RankError
from ..inputs.launch import Launch
from .terminal.console import Settings, flush, say

if TYPE_CHECKING:
    from ..runtime.ranks.lifeline import Loss
    from ..runtime.ranks.world import World

OVER_RANKS: Final = frozenset({"convert", "generate", "evaluate", "serve"})
"""Commands that several ranks run together."""

_PATIENCE_SECONDS: Final = 0.5
"""So long another thread has to find the reason of an end, which is worth more than that there was one."""
_STUCK_SECONDS: Final = 5.0
_NOTE_SECONDS: Final = 10.0

Command = TypeVar("Command", bound=Callable[..., Any])


def parallel_option(command: Command) -> Command:
    """Add the option --parallel, for commands that several ranks run together."""
    return click.option(
        "--parallel",
        metavar="LAYOUT",
        callback=_needs_ranks,
        help="Under torchrun: how the ranks divide the model, like ep=8,tp=8.",
    )(command)


def _needs_ranks(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and ranks_of_command().launch.size == 1:
        raise click.BadParameter(
            "it divides a model among ranks: start them with torchrun --nproc-per-node N -m npuq …"
        )
    return value


def ranks_of_command() -> CommandRanks:
    """The ranks of the running command, which `main` has put into its settings."""
    settings = click.get_current_context().find_object(Settings)
    alone = CommandRanks(Launch(), lambda error: (str(error), 1))
    return alone if settings is None or settings.ranks is None else settings.ranks


@dataclass
class CommandRanks:
    """The part of this process in a command over ranks, and its end there. It ends once: the first thread does it.

    tell: prints an error, returns its line and exit code.
    """

    launch: Launch
    tell: Callable[[BaseException], tuple[str, int]]
    world: World | None = None

    def __post_init__(self) -> None:
        self.last_words: Callable[[str], None] = _nobody_listens
        """Called with a line before this process ends by the loss of another rank."""
        self._serves = False
        self._ending = threading.Lock()
        self._stderr: int | None = None
        if self.launch.size > 1:
            if self.launch.rank:
                self._be_silent()
            self._watch_signals()

    def check(self, command: str | None) -> None:
        """Raise RankError for a command that knows nothing of ranks."""
        if self.launch.size > 1 and command is not None and command not in OVER_RANKS:
            raise RankError(
                f"npuq {command} runs in one process: start it without torchrun, or unset RANK and WORLD_SIZE"
            )

    def join(self) -> World | None:
        """Meet the other ranks; None without others."""
        if self.launch.size > 1:
            from ..runtime.ranks.world import World

            with waiting_note(self.launch):
                self.world = World.join(self.launch, self)
        return self.world

    @property
    def leads(self) -> bool:
        """True where this process takes prompts and prints: alone, and on rank 0."""
        return self.launch.rank == 0

    def serve(self) -> None:
        """Leave signals to the command: rank 0 ends by them in its own time, and the others with it."""
        self._serves = True

    def layout(self, parallel: str | None) -> str | None:
        """The argument of `load` for the option --parallel; None for a process alone."""
        return None if self.launch.size == 1 else parallel or "auto"

    def fetch(self, local: Callable[[bool], Path]) -> Path:
        """Call `local(quiet)`, which may fetch a model: on one rank of each machine first, then on the others."""
        if self.world is None:
            return local(False)
        later = self.launch.local_rank > 0
        if later:
            self.world.group.barrier()
        found = local(self.launch.rank > 0)
        if not later:
            self.world.group.barrier()
        return found

    def end(self, error: BaseException) -> int:
        """End by an error: alone print it and return the exit code; a rank ends here, and with it all others."""
        if self.launch.size > 1 and not self._ending.acquire(blocking=False):
            time.sleep(_STUCK_SECONDS)  # the thread that came before ends the process
        if self.world is None and self.launch.rank and not self.launch.local_rank:
            self.speak()  # on a machine of its own, rank 0 cannot be told
        line, code = self.tell(error)  # on a rank that is silent, to nowhere
        if self.launch.size == 1:
            return code
        _flush()
        if self.launch.rank and self.world is None:
            time.sleep(_PATIENCE_SECONDS)  # rank 0 found the same error: torchrun ends it once this rank has ended
        if self.world is not None:
            prefix = f"rank {self.launch.rank}: " if self.launch.rank else ""
            self.world.fail(prefix + line, code)
        os._exit(code)

    def report(self, loss: Loss) -> None:
        """Print why another rank has ended, where this rank speaks."""
        if loss.told:
            time.sleep(_PATIENCE_SECONDS)  # this rank may have found the same error itself
        if self._ending.acquire(blocking=False) and loss.speaks:
            self.speak()
            self.tell(_error(loss.text, loss.code))
            _flush()

    def end_after(self, loss: Loss) -> None:
        """End this process after the loss of another rank."""
        self.last_words(loss.text)
        os._exit(loss.code)

    def speak(self) -> None:
        """Let a silent rank print on stderr."""
        if self._stderr is not None:
            os.dup2(self._stderr, 2)

    def _be_silent(self) -> None:
        """Redirect stdout and stderr to nowhere: of libraries too, which write to the descriptors."""
        self._stderr = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nowhere, number)
        os.close(nowhere)

    def _watch_signals(self) -> None:
        """See signals in a thread: the main one may wait in a collective for a rank that is gone.

        torchrun passes SIGINT and SIGTERM on to every rank, and a terminal sends SIGINT to all. Rank 0 is interrupted;
        the others end with it.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, _nothing)
        if self.launch.rank:
            signal.signal(signal.SIGINT, _nothing)
        threading.Thread(target=self._obey, args=(reader,), name="npuq-signals", daemon=True).start()

    def _obey(self, reader: socket.socket) -> None:
        while True:
            number = reader.recv(1)[0]
            if self._serves:
                continue
            if number == signal.SIGINT and self.launch.rank == 0:
                time.sleep(_STUCK_SECONDS)
                self.end(KeyboardInterrupt())
            elif number == signal.SIGTERM:
                time.sleep(_PATIENCE_SECONDS)
                self.end(_error("ended by SIGTERM", 128 + number))


@contextmanager
def waiting_note(launch: Launch, seconds: float = _NOTE_SECONDS) -> Iterator[None]:
    """Say on rank 0, after so many seconds within, for whom it waits: RANK and WORLD_SIZE may be set by chance."""
    text = (
        f"waiting for {launch.size - 1} more ranks at {launch.address}:{launch.port} (WORLD_SIZE={launch.size}); "
        "to run one process, unset RANK and WORLD_SIZE"
    )
    note = threading.Timer(seconds, say, [text])
    note.daemon = True
    if launch.rank == 0:
        note.start()
    try:
        yield
    finally:
        note.cancel()


def _error(text: str, code: int) -> RankError:
    error = RankError(text)
    error.exit_code = code
    return error


def _nothing(number: int, frame: object) -> None:
    """Handle a signal by nothing: the thread that reads the wakeup descriptor does it."""


def _nobody_listens(line: str) -> None:
    """Say nothing: a command that serves nobody has no more to tell."""


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            flush(stream)
