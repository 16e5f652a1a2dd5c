"""The thread that runs all steps, and its way of telling an event loop that pieces have come."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import abc, deque
from dataclasses import replace
from typing import Final

from ..errors import GenerationError
from ..runtime import Inbox, LanguageModel, Piece, Request
from ..runtime.engine import StepOutput

_GATHER_SECONDS: Final = 0.05
"""Pieces that come within this time are told together, but a generation's first and last: nobody sees the difference,
and events of fast steps cost less of the processor that the next step needs."""

_STUCK_SECONDS: Final = 60.0
_STUCK_STEPS: Final = 20
"""A step is stuck after so many seconds, and after so many times the longest step."""


class EngineThread:
    """Runs a model's steps while there are sequences.

    start: in the thread of the event loop that is to be told. A step that fails ends the requests of that step; the
    thread goes on with the next ones. failed: called in the thread with the error of such a step.
    """

    def __init__(self, model: LanguageModel, failed: abc.Callable[[BaseException], None] | None = None):
        self.model = model
        self._failed = failed
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="npuq-engine", daemon=True)
        self._events: asyncio.AbstractEventLoop | None = None
        self._ready: deque[Generation] = deque()
        self._telling = False
        self._woken_at = 0.0
        self._gathering: asyncio.TimerHandle | None = None
        self._longest_step = 0.0
        self.num_steps = 0
        self._progress_at = time.perf_counter()

    def start(self) -> None:
        self._events = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step."""
        self._stopped = True
        self.model.loop.wake()

    def step_ended(self, seconds: float) -> None:
        """Note the end of a step, by any thread."""
        self._longest_step = max(self._longest_step, seconds)
        self._progress_at = time.perf_counter()
        self.num_steps += 1

    def work_began(self) -> None:
        """Note that there is work now, after there was none."""
        self._progress_at = time.perf_counter()

    def is_well(self, has_work: bool) -> bool:
        """False when the thread has ended, or a step takes far longer than any before."""
        patience = max(_STUCK_SECONDS, _STUCK_STEPS * self._longest_step)
        return self._thread.is_alive() and not (has_work and time.perf_counter() - self._progress_at > patience)

    def tell(self, generation: Generation, *, at_once: bool) -> None:
        """Wake the reader of a generation, and all that wait to be woken; or let it wait for others a little."""
        self._ready.append(generation)
        if (at_once or not self._telling) and self._events is not None:
            self._telling = True
            try:
                self._events.call_soon_threadsafe(self._wake if at_once else self._wake_in_time)
            except RuntimeError:  # the event loop has ended, and with it all readers
                self._ready.clear()

    def _wake_in_time(self) -> None:
        """Wake the readers now, or a little later where they were woken just before."""
        assert self._events is not None
        if self._gathering is None:
            # At once, if that is over.
            self._gathering = self._events.call_at(self._woken_at + _GATHER_SECONDS, self._wake)

    def _wake(self) -> None:
        assert self._events is not None
        if (
            self._gathering is not None
        ):  # another has come first: with two timers, readers would be woken twice as often
            self._gathering.cancel()
            self._gathering = None
        self._woken_at = self._events.time()
        self._telling = False  # before the queue is emptied: a generation that comes meanwhile calls again
        while self._ready:
            self._ready.popleft().ready.set()

    def _run(self) -> None:
        while not self._stopped:
            self._run_until_failure()

    def _run_until_failure(self) -> None:
        try:
            self.model.loop.run(lambda: self._stopped)
        except BaseException as error:  # a library's panic too; the requests of the step have an error of their own
            if self._failed is not None:
                self._failed(error)


class Generation(Inbox):
    """A request in the engine: an asynchronous iterator of the pieces that came since the last.

    as_one: its reader waits for the end. first_at: when its first piece came.
    """

    def __init__(self, thread: EngineThread, request: Request, *, as_one: bool = False):
        super().__init__(thread.model.tokenizer, request)
        self.request = request
        self.admitted_at = time.perf_counter()
        self.ready = asyncio.Event()
        self.first_at: float | None = None
        self._as_one = as_one
        self._thread = thread

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that have not entered a step yet."""
        firsts = self.sequences[:: self.request.params.n]
        return sum(first.num_prompt_tokens for first in firsts if first.entered_at is None)

    def start(self) -> None:
        """Queue the request. Raises GenerationError for one that the engine refuses."""
        self._thread.model.loop.add(self, self.request, self.stop_ids)

    def cancel(self) -> None:
        """End its sequences before the next step."""
        if self.open:
            self._thread.model.loop.abandon(self)

    def receive(self, output: StepOutput) -> bool:
        stopped = super().receive(output)
        is_first = bool(self.pieces) and self.first_at is None
        if is_first:
            self.first_at = time.perf_counter()
        if not self.open or (self.pieces and not self._as_one):
            self._thread.tell(self, at_once=is_first or not self.open)
        return stopped

    def fail(self, error: GenerationError) -> None:
        super().fail(error)
        self._thread.tell(self, at_once=True)

    async def batches(self, ping_seconds: float | None = None) -> abc.AsyncIterator[list[Piece]]:
        """Pieces as they come: all that wait together, joined by completion. None after `ping_seconds` without any.

        Raises GenerationError where the engine failed.
        """
        events = asyncio.get_running_loop()
        while True:
            ping = None if ping_seconds is None else events.call_later(ping_seconds, self.ready.set)
            await self.ready.wait()
            self.ready.clear()
            if ping is not None:
                ping.cancel()
            error, still_open = self.error, self.open  # before the pieces are taken: they come before the end
            pieces = _joined(self._taken())
            if pieces or (error is None and still_open):
                yield pieces
            if error is not None:
                raise error
            if not still_open:
                return

    def _taken(self) -> abc.Iterator[Piece]:
        while self.pieces:
            yield self.pieces.popleft()


def _joined(pieces: abc.Iterable[Piece]) -> list[Piece]:
    """Pieces of a kind that follow each other in a completion as one, in the order in which the first ones came."""
    runs: dict[int, list[list[Piece]]] = {}
    for piece in pieces:
        own = runs.setdefault(piece.index, [])
        if own and _are_one_kind(own[-1][-1], piece):
            own[-1].append(piece)
        else:
            own.append([piece])
    return [run[0] if len(run) == 1 else _join(run) for own in runs.values() for run in own]


def _are_one_kind(first: Piece, second: Piece) -> bool:
    """True for two pieces of text, of reasoning, or of one call's arguments."""
    call, more = first.call, second.call
    if call is None or more is None:
        return call is more and bool(first.reasoning) == bool(second.reasoning)
    return call.name is None and more.name is None and call.index == more.index


def _join(pieces: list[Piece]) -> Piece:
    call = pieces[0].call
    if call is not None:
        call = replace(call, arguments="".join([piece.call.arguments for piece in pieces if piece.call is not None]))
    return Piece(
        pieces[0].index,
        "".join([piece.text for piece in pieces]),
        pieces[-1].completion,
        tuple([token for piece in pieces for token in piece.token_ids]),
        tuple([entry for piece in pieces for entry in piece.logprobs]),
        "".join([piece.reasoning for piece in pieces]),
        call,
    )
