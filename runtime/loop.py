"""Sharing one engine among streams and threads: a thread that waits for text runs the next step, for all of them."""

from __future__ import annotations

from collections import abc, deque
from contextlib import contextmanager
from threading import Condition, Lock
from time import perf_counter
from typing import Protocol

from torch import Tensor

from ..errors import GenerationError
from ..inputs.printable import error_line
from .engine import Engine, StepOutput
from .request import Request
from .sequence import Sequence


class Client(Protocol):
    """The receiver of some sequences' tokens."""

    sequences: tuple[Sequence, ...]
    """Its sequences, in the order of its prompts and their choices; none before `expect`."""

    def expect(self, sequences: tuple[Sequence, ...]) -> None:
        """Take the sequences of its prompts."""

    def is_ready(self) -> bool:
        """True when a result waits to be fetched, or none will come any more."""

    def receive(self, output: StepOutput) -> bool:
        """Take a step's result for one of the sequences: True if a stop string ends the sequence."""

    def fail(self, error: GenerationError) -> None:
        """Take the error after which no result will come."""


class Loop:
    """Steps an engine for its clients. One thread at a time touches the engine; all others wait for it.

    A thread holds the lock while it looks at a client, changes the engine between two steps, or computes logits. A step
    runs without the lock, in the thread whose mark is `_stepping`. Meanwhile new and abandoned clients queue: `add` and
    `abandon` do not wait for the step, so an event loop may call them.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.after_step: abc.Callable[[float], None] = _nothing
        """Called in the stepping thread with each step's seconds, after its results were handed out."""
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._stepping: object | None = None  # the mark of the thread that runs a step
        self._wanted = 0  # threads waiting to change the engine; steps let them pass first
        self._clients: dict[Sequence, Client] = {}
        self._arrived: deque[Client] = deque()
        self._abandoned: deque[Client] = deque()

    def add(self, client: Client, request: Request, stop_ids: frozenset[int]) -> None:
        """Take a client's request into the next step. Tokens of `stop_ids` end each of its sequences.

        Raises GenerationError as `Engine.sequence` does; then nothing is queued.
        """
        sequences: list[Sequence] = []
        for prompt in request.prompts:
            leader = None
            for choice in range(request.params.n):
                grammar = request.grammar() if request.grammar else None
                sequence = self.engine.sequence(prompt, request.params, stop_ids, choice, grammar, request.salt, leader)
                leader = leader or sequence
                sequences.append(sequence)
        client.expect(tuple(sequences))
        self._arrived.append(client)
        self._settle()

    def wait(self, client: Client) -> None:
        """Return when the client is ready. Until then run steps, unless another thread does."""
        self._step_until(client.is_ready, idle=False)

    def run(self, stopped: abc.Callable[[], bool]) -> None:
        """Run the steps of all clients until `stopped`, for a thread that does nothing else; wait while there are none.

        `stopped` is asked between steps, and after `wake`. A step that fails raises its error, after all clients of the
        step got theirs; the loop may be run again.
        """
        self._step_until(stopped, idle=True)

    def wake(self) -> None:
        """Make `run` ask whether it is stopped."""
        with self._lock:
            self._changed.notify_all()

    def drop(self, client: Client) -> None:
        """End a client's sequences and free their blocks."""
        with self._between_steps():
            self._drop(client)

    def abandon(self, client: Client) -> None:
        """Drop the client before the next step, without waiting: for finalizers, which may run within a step."""
        self._abandoned.append(client)
        self._settle()

    def logits(self, sequences: abc.Sequence[abc.Sequence[int]]) -> abc.Iterator[Tensor]:
        """Logits as of `Engine.logits`, computed between the steps of other clients."""
        found = self.engine.logits(sequences)
        while True:
            with self._between_steps():
                logits = next(found, None)
            if logits is None:
                return
            yield logits

    def _step_until(self, done: abc.Callable[[], bool], *, idle: bool) -> None:
        """Run steps until `done`, unless another thread does. idle: wait where there is nothing to compute."""
        # A mark of its own: interrupted anywhere, this thread ends its own step and no other thread's.
        mark = object()
        try:
            while not done():
                with self._lock:
                    while not done() and not self._may_step(idle):
                        self._changed.wait()
                    if done():
                        return
                    self._stepping = mark
                self._step()
                self._end_step(mark)
        finally:
            self._end_step(mark)
            self._settle()

    def _may_step(self, idle: bool) -> bool:
        """True if the engine is free. The caller holds the lock."""
        if self._stepping is not None or self._wanted:
            return False
        self._take_changes()
        return not idle or self.engine.scheduler.has_work

    def _end_step(self, mark: object) -> None:
        if self._stepping is mark:
            with self._lock:
                self._stepping = None
                self._changed.notify_all()

    def _step(self) -> None:
        """Run a step and hand out its results. A failure of the whole step goes to every client."""
        started = perf_counter()
        try:
            for output in self.engine.step():
                self._deliver(output)
        except BaseException as error:
            reason = error_line(error, 120)
            clients = set(self._clients.values())
            self._clients = {}
            self.engine.reset(sequence for client in clients for sequence in client.sequences)
            for client in clients:
                # An error each: raised in two threads, one error would mix their tracebacks.
                client.fail(GenerationError(f"a step that this prompt took part in has failed ({reason}); ask again"))
            raise
        self.after_step(perf_counter() - started)

    def _deliver(self, output: StepOutput) -> None:
        sequence = output.sequence
        client = self._clients[sequence]
        try:
            stopped = client.receive(output)
        except Exception as error:  # a client's own fault is no other's
            if not isinstance(error, GenerationError):
                error = GenerationError(f"the reply cannot be read ({error_line(error, 120)})")
            client.fail(error)
            stopped = True
        if stopped:
            self.engine.finish(sequence, "stop")
        if sequence.finish_reason is not None:
            del self._clients[sequence]

    def _drop(self, client: Client) -> None:
        for sequence in client.sequences:
            self.engine.finish(sequence, "cancelled")
            self._clients.pop(sequence, None)

    def _settle(self) -> None:
        """Take waiting changes; while the engine is in use, the thread that uses it does so afterwards."""
        while (self._arrived or self._abandoned) and self._lock.acquire(blocking=False):
            try:
                if self._stepping is not None:
                    return
                self._take_changes()
                self._changed.notify_all()
            finally:
                self._lock.release()

    def _take_changes(self) -> None:
        """Queue new clients' sequences and end those of abandoned ones. The caller holds the lock; no step runs."""
        while self._arrived:
            client = self._arrived[0]
            for sequence in client.sequences:
                if sequence not in self._clients:  # unless an interrupted call came so far
                    self.engine.queue(sequence)
                    self._clients[sequence] = client
            self._arrived.popleft()
        while self._abandoned:
            self._drop(self._abandoned.popleft())

    @contextmanager
    def _between_steps(self) -> abc.Iterator[None]:
        """Hold the engine between two steps, alone."""
        try:
            with self._lock:
                self._wanted += 1
                try:
                    while self._stepping is not None:
                        self._changed.wait()
                    self._take_changes()
                    yield
                finally:
                    self._wanted -= 1
                    self._changed.notify_all()
        finally:
            self._settle()


def _nothing(seconds: float) -> None:
    """Watch no steps."""
