"""Connections between rank 0 and the followers, found through the store that torchrun keeps for a launch."""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

from ...errors import RankError
from ...inputs.launch import Launch

START_SECONDS: Final = 300.0
"""For all ranks to connect."""
_GREETING_SECONDS: Final = 10.0
_KEY: Final = "lifeline"
_TOKEN_BYTES: Final = 16


class Store(Protocol):
    """Key-value store of all ranks, of torch.distributed."""

    def set(self, key: str, value: str) -> None:
        """Store a value."""

    def get(self, key: str) -> bytes:
        """The value of a key, awaited."""


@dataclass
class Peer:
    """A connection to another rank. heard: when bytes last came from it. left: its end is known, and expected."""

    rank: int
    connection: socket.socket
    heard: float = field(default_factory=time.monotonic)
    buffer: bytes = b""
    left: bool = False


def connect(launch: Launch, store: Store) -> list[Peer]:
    """Connect rank 0 to all others, which prove by a token from the store that they are of the launch.

    Returns the connections of this rank. Raises RankError where a rank does not come in time.
    """
    try:
        return _accept(launch, store) if launch.rank == 0 else [_reach(launch, store)]
    except (OSError, OverflowError, ValueError) as error:  # the last two: of a store with something else in it
        raise RankError(f"rank {launch.rank} of {launch.size} cannot connect to the others: {error}") from error


def _accept(launch: Launch, store: Store) -> list[Peer]:
    token, deadline = secrets.token_hex(_TOKEN_BYTES), time.monotonic() + START_SECONDS
    found: dict[int, socket.socket] = {}
    with closing(_listener(launch.address, launch.size)) as listener:
        store.set(_KEY, f"{listener.getsockname()[1]} {token}")
        while len(found) < launch.size - 1:
            listener.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, launch.size)) - found.keys())
                raise RankError(f"ranks {missing} did not connect to rank 0 within {START_SECONDS:.0f} s") from None
            rank = _greeting(connection, token)
            if rank is None or not 1 <= rank < launch.size or rank in found:
                connection.close()
            else:
                found[rank] = connection
    return [Peer(rank, found[rank]) for rank in sorted(found)]


def _listener(address: str, ranks: int) -> socket.socket:
    """Listen at rank 0's own address; at all of the machine's where that is a name of something before it."""
    family, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    with suppress(OSError):
        return socket.create_server(place[:2], family=family, backlog=ranks)
    return socket.create_server(("", 0), family=family, backlog=ranks)


def _greeting(connection: socket.socket, token: str) -> int | None:
    """Rank that a connection names beside the token; None for a stranger's."""
    deadline = time.monotonic() + _GREETING_SECONDS
    wanted = 2 * _TOKEN_BYTES + 5
    greeting = b""
    with suppress(OSError):
        while len(greeting) < wanted:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            if time.monotonic() > deadline or not (more := connection.recv(wanted - len(greeting))):
                break
            greeting += more
    said, number = greeting[: 2 * _TOKEN_BYTES], greeting[2 * _TOKEN_BYTES :]
    if len(greeting) != wanted or not hmac.compare_digest(said, token.encode()) or not number.isdigit():
        return None
    return int(number)


def _reach(launch: Launch, store: Store) -> Peer:
    port, token = store.get(_KEY).decode().split()
    connection = socket.create_connection((launch.address, int(port)), timeout=START_SECONDS)
    connection.sendall(f"{token}{launch.rank:05d}".encode())
    return Peer(0, connection)
