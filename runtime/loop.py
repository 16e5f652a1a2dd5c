"""Sharing one engine among streams and threads: a thread that waits for text runs the next step, for all of them."""

from __future__ import annotations

from collections import abc, deque
from contextlib import contextmanager
from threading import Condition, Lock
from typing import Protocol

from torch import Tensor

from ..errors import GenerationError
from ..inputs.printable import printable
from .engine import Engine, StepOutput
from .sampler import SamplingParams
from .sequence import Sequence


class Client(Protocol):
    """The receiver of some sequences' tokens."""

    sequences: tuple[Sequence, ...]
    """Its sequences, in the order of its prompts; none before `expect`."""

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
    runs without the lock, in the thread whose mark is `_stepping`.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._stepping: object | None = None  # the mark of the thread that runs a step
        self._wanted = 0  # threads waiting to change the engine; steps let them pass first
        self._clients: dict[Sequence, Client] = {}
        self._abandoned: deque[Client] = deque()

    def add(
        self, client: Client, prompts: abc.Sequence[abc.Sequence[int]], params: SamplingParams, stop_ids: frozenset[int]
    ) -> None:
        """Queue prompts for a client, all or none. Raises GenerationError as `Engine.add` does."""
        with self._between_steps():
            added: list[Sequence] = []
            try:
                for prompt in prompts:
                    added.append(self.engine.add(prompt, params, stop_ids))  # noqa: PERF401  (one may raise)
            except BaseException:
                for sequence in added:
                    self.engine.finish(sequence, "cancelled")
                raise
            client.expect(tuple(added))
            self._clients.update(dict.fromkeys(added, client))

    def wait(self, client: Client) -> None:
        """Return when the client is ready. Until then run steps, unless another thread does."""
        # A mark of its own: interrupted anywhere, this thread ends its own step and no other thread's.
        mark = object()
        try:
            while not client.is_ready():
                with self._lock:
                    while not client.is_ready() and (self._stepping is not None or self._wanted):
                        self._changed.wait()
                    if client.is_ready():
                        return
                    self._stepping = mark
                self._step()
                self._end_step(mark)
        finally:
            self._end_step(mark)
            self._drop_abandoned()

    def _end_step(self, mark: object) -> None:
        if self._stepping is mark:
            with self._lock:
                self._stepping = None
                self._changed.notify_all()

    def drop(self, client: Client) -> None:
        """End a client's sequences and free their blocks."""
        with self._between_steps():
            self._drop(client)

    def abandon(self, client: Client) -> None:
        """Drop the client soon, without waiting: for finalizers, which may run anywhere, also within a step."""
        self._abandoned.append(client)
        self._drop_abandoned()

    def logits(self, sequences: abc.Sequence[abc.Sequence[int]]) -> abc.Iterator[Tensor]:
        """Logits as of `Engine.logits`, computed between the steps of other clients."""
        found = self.engine.logits(sequences)
        while True:
            with self._between_steps():
                logits = next(found, None)
            if logits is None:
                return
            yield logits

    def _step(self) -> None:
        """Run a step and hand out its results. A failure of the whole step goes to every client."""
        try:
            for output in self.engine.step():
                self._deliver(output)
        except BaseException as error:
            reason = printable(" ".join(str(error).split()))[:120] or type(error).__name__
            clients = set(self._clients.values())
            self._clients = {}
            self.engine.reset(sequence for client in clients for sequence in client.sequences)
            for client in clients:
                # An error each: raised in two threads, one error would mix their tracebacks.
                client.fail(GenerationError(f"a step that this prompt took part in has failed ({reason}); ask again"))
            raise

    def _deliver(self, output: StepOutput) -> None:
        sequence = output.sequence
        client = self._clients[sequence]
        try:
            stopped = client.receive(output)
        except GenerationError as error:
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

    def _drop_abandoned(self) -> None:
        """Drop abandoned clients; while the engine is in use, the thread that uses it does so afterwards."""
        while self._abandoned and self._lock.acquire(blocking=False):
            try:
                if self._stepping is not None:
                    return
                while self._abandoned:
                    self._drop(self._abandoned.popleft())
            finally:
                self._lock.release()

    @contextmanager
    def _between_steps(self) -> abc.Iterator[None]:
        """Hold the engine between two steps, alone."""
        try:
            with self._lock:
                self._wanted += 1
                try:
                    while self._stepping is not None:
                        self._changed.wait()
                    yield
                finally:
                    self._wanted -= 1
                    self._changed.notify_all()
        finally:
            self._drop_abandoned()
