"""The thread that runs all steps, and its way of telling an event loop that pieces have come."""

from __future__ import annotations

import asyncio
import threading
from collections import abc, deque
from contextlib import suppress
from dataclasses import replace

from ..errors import GenerationError
from ..runtime import Inbox, LanguageModel, Piece, Request
from ..runtime.engine import StepOutput


class EngineThread:
    """Runs a model's steps while there are sequences. start, stop: in the thread of the event loop that is to be told.

    A step that fails ends the requests of that step; the thread goes on with the next ones.
    """

    def __init__(self, model: LanguageModel):
        self.model = model
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="npuq-engine", daemon=True)
        self._events: asyncio.AbstractEventLoop | None = None
        self._ready: deque[Generation] = deque()
        self._telling = False

    def start(self) -> None:
        self._events = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step."""
        self._stopped = True
        self.model.loop.wake()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def tell(self, generation: Generation) -> None:
        """Wake the reader of a generation, from the engine's thread: one call to the event loop for many of a step."""
        self._ready.append(generation)
        if not self._telling and self._events is not None:
            self._telling = True
            self._events.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._telling = False  # before the queue is emptied: a generation that comes meanwhile calls again
        while self._ready:
            self._ready.popleft().ready.set()

    def _run(self) -> None:
        while not self._stopped:
            with suppress(Exception):  # the clients of the step have it
                self.model.loop.run(lambda: self._stopped)


class Generation(Inbox):
    """A request in the engine: an asynchronous iterator of the pieces that came since the last."""

    def __init__(self, thread: EngineThread, request: Request):
        super().__init__(thread.model.tokenizer, request)
        self._thread = thread
        self._request = request
        self.ready = asyncio.Event()

    def start(self) -> None:
        """Queue the request. Raises GenerationError for one that the engine refuses."""
        self._thread.model.loop.add(self, self._request, self.stop_ids)

    def cancel(self) -> None:
        """End its sequences before the next step."""
        if self.open:
            self._thread.model.loop.abandon(self)

    def receive(self, output: StepOutput) -> bool:
        stopped = super().receive(output)
        if self.is_ready():
            self._thread.tell(self)
        return stopped

    def fail(self, error: GenerationError) -> None:
        super().fail(error)
        self._thread.tell(self)

    async def batches(self) -> abc.AsyncIterator[list[Piece]]:
        """Pieces as they come, all that wait together, those of one completion joined.

        Raises GenerationError where the engine failed.
        """
        while True:
            await self.ready.wait()
            self.ready.clear()
            error, open_before = self.error, self.open
            pieces = _joined(self._taken())
            if pieces:
                yield pieces
            if error is not None:
                raise error
            if not open_before:
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
        call = replace(call, arguments="".join(piece.call.arguments for piece in pieces if piece.call is not None))
    return Piece(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        pieces[-1].completion,
        tuple(token for piece in pieces for token in piece.token_ids),
        tuple(entry for piece in pieces for entry in piece.logprobs),
        "".join(piece.reasoning for piece in pieces),
        call,
    )
