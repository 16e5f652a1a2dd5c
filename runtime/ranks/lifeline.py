"""Connections that tell every rank at once when another one has ended, and why.

A collective waits for all ranks. If one is gone, the others may wait for ever, or fail without knowing whom they lost.
So rank 0 keeps a connection to each follower beside the collectives, and a thread of each rank watches its own:

* a rank that leaves, or fails, says so before it ends; rank 0 passes a failure on to all others;
* a rank that was killed says nothing: its connection closes;
* a rank that was stopped, or whose machine is gone, is silent: the others hear no beat of it.

Messages are lines: `beat`, `leave`, `fail CODE TEXT`, and `word TEXT`, of a follower to rank 0, for whoever listens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from selectors import EVENT_READ, DefaultSelector
from typing import Final, Protocol

from ...inputs.printable import printable
from .connections import Peer

SILENCE_SECONDS: Final = 30.0
_BEAT_SECONDS: Final = 1.0
_NOTICE_SECONDS: Final = 3.0
"""The longest that a failed follower waits for rank 0 to take notice."""
_MOST_BYTES: Final = 8192  # of a line


@dataclass(frozen=True)
class Loss:
    """The end of another rank before its time.

    text: one line on it. code: an exit code for this process. told: the rank said so itself. speaks: true on the one
    rank that tells the user: rank 0, or rank 1 where rank 0 is lost.
    """

    text: str
    code: int
    told: bool
    speaks: bool


class Ending(Protocol):
    """Actions of a rank when another one has ended before its time. Both are called once, in the watching thread."""

    def report(self, loss: Loss) -> None:
        """Tell the user, if the loss says so. Only then do other ranks end, and torchrun ends all."""

    def end_after(self, loss: Loss) -> None:
        """End this process, now or soon."""


class Lifeline:
    """The connections of one rank: of rank 0 one to each follower, of a follower one to rank 0.

    silence: seconds without a beat after which a rank counts as lost.
    """

    def __init__(self, rank: int, peers: list[Peer], ending: Ending, silence: float = SILENCE_SECONDS):
        self._rank, self._peers, self._ending, self._silence = rank, peers, ending, silence
        self._sending = threading.Lock()
        self._lost = threading.Event()
        self._loss: Loss | None = None
        self._over = False
        self.hear: Callable[[int, str], None] = _nobody_listens
        """Called in the watching thread with the rank and the text of each word that comes."""
        self._selector = DefaultSelector()
        for peer in peers:
            peer.connection.setblocking(False)
            self._selector.register(peer.connection, EVENT_READ, peer)
        threading.Thread(target=self._watch, name="npuq-lifeline", daemon=True).start()

    def loss(self, seconds: float) -> Loss | None:
        """The loss of another rank, awaited for so long; None without one."""
        self._lost.wait(seconds)
        return self._loss

    def leave(self) -> None:
        """Tell the others that this rank's work is done."""
        self._over = True
        self._tell(b"leave\n")

    def tell_leader(self, word: str) -> None:
        """Tell rank 0 a word of one line. Nothing on rank 0, and after the end."""
        if self._rank and not self._over:
            self._tell(_line("word", word))

    def fail(self, text: str, code: int) -> None:
        """Tell the others that this rank ends by an error. A follower returns when rank 0 has told the user."""
        if self._over:
            return
        self._over = True
        self._tell(_failure(text, code))
        if self._rank:
            # torchrun ends all ranks when one has ended.
            self._lost.wait(_NOTICE_SECONDS)

    def _tell(self, message: bytes) -> None:
        with self._sending:
            for peer in self._peers:
                with suppress(OSError):  # it is gone, or so far behind that its buffer is full
                    peer.connection.send(message)

    def _watch(self) -> None:
        last = beat = time.monotonic()
        while True:
            ready = self._selector.select(_BEAT_SECONDS / 2)
            now = time.monotonic()
            if now - last > self._silence / 4:  # this process stood still, and not the others
                for peer in self._peers:
                    peer.heard = now
            last = now
            losses = [loss for key, _ in ready for loss in self._read(key.data)] or list(self._silent(now))
            if losses:
                # What a rank says of its own end explains more than a closed connection.
                self._end(max(losses, key=lambda loss: loss.told))
                return
            if now - beat >= _BEAT_SECONDS:
                self._tell(b"beat\n")
                beat = now
            if not self._selector.get_map():
                return

    def _silent(self, now: float) -> Iterator[Loss]:
        for peer in self._peers:
            if not peer.left and now - peer.heard > self._silence:
                yield self._lost_one(
                    peer, f"has been silent for {self._silence:.0f} seconds: it was stopped, or its machine is gone"
                )

    def _read(self, peer: Peer) -> Iterator[Loss]:
        """Read what has come from a peer; yield the loss that it means, if any."""
        peer.heard = time.monotonic()
        try:
            found = peer.connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            found = b""
        if not found:
            self._selector.unregister(peer.connection)
            if not peer.left:
                peer.left = True
                yield self._lost_one(peer, "ended without a word: it was killed, perhaps for lack of memory")
            return
        *lines, rest = (peer.buffer + found).split(b"\n")
        peer.buffer = rest[-_MOST_BYTES:]
        for line in lines:
            if line == b"leave":
                peer.left = True
            elif line.startswith(b"word "):
                self.hear(peer.rank, printable(line[5:].decode(errors="replace")))
            elif line.startswith(b"fail "):
                peer.left = True
                yield self._told(peer, line.decode(errors="replace"))

    def _told(self, peer: Peer, line: str) -> Loss:
        _, code, text = (*line.split(" ", 2), "")[:3]
        if not code.isascii() or not code.isdigit() or not text:
            return self._lost_one(peer, "sent a message that npuq does not know: is it the same version?")
        return Loss(printable(text), min(int(code[:3]), 255), told=True, speaks=self._rank == 0)

    def _lost_one(self, peer: Peer, what: str) -> Loss:
        speaks = self._rank == 0 or (self._rank == 1 and peer.rank == 0)
        return Loss(f"rank {peer.rank} {what}", 1, told=False, speaks=speaks)

    def _end(self, loss: Loss) -> None:
        self._loss = loss
        if self._over:
            self._lost.set()
            return
        self._ending.report(loss)
        if self._rank == 0:
            self._tell(_failure(loss.text, loss.code))
        self._lost.set()
        self._ending.end_after(loss)


def _failure(text: str, code: int) -> bytes:
    return _line(f"fail {code}", text)


def _line(kind: str, text: str) -> bytes:
    return f"{kind} {' '.join(text.split())}".encode(errors="replace")[: _MOST_BYTES // 2] + b"\n"


def _nobody_listens(rank: int, word: str) -> None:
    """Drop a word: only some commands have any."""
