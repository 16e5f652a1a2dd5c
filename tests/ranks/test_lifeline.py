"""What a rank learns of the end of another one, over a pair of connected sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from npuq.errors import RankError
from npuq.inputs.launch import Launch
from npuq.runtime.ranks import connections
from npuq.runtime.ranks.connections import Peer, connect
from npuq.runtime.ranks.lifeline import Lifeline, Loss

WAIT = 20.0


class Recorder:
    """Ending that notes what it is called with, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Loss]] = []
        self.ended = threading.Event()

    def report(self, loss: Loss) -> None:
        self.calls.append(("report", loss))

    def end_after(self, loss: Loss) -> None:
        self.calls.append(("end", loss))
        self.ended.set()


class Ranks:
    """Lifelines of rank 0 and two followers in one process. The far ends of the followers' sockets are at hand."""

    def __init__(self, silence: float = 30.0):
        pairs = {rank: socket.socketpair() for rank in (1, 2)}
        self.endings = {rank: Recorder() for rank in range(3)}
        self.followers = {rank: pair[1] for rank, pair in pairs.items()}
        self.leader = Lifeline(0, [Peer(rank, pairs[rank][0]) for rank in (1, 2)], self.endings[0], silence)
        self.silence = silence

    def start(self, rank: int) -> Lifeline:
        return Lifeline(rank, [Peer(0, self.followers[rank])], self.endings[rank], self.silence)

    def loss(self, rank: int) -> Loss:
        assert self.endings[rank].ended.wait(WAIT), "nothing was noticed"
        (first, loss), (second, same) = self.endings[rank].calls
        assert (first, second) == ("report", "end")
        assert loss == same
        return loss


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.leader.leave()
    for connection in made.followers.values():
        connection.close()


def test_a_killed_rank_closes_its_connection(ranks: Ranks) -> None:
    ranks.start(1)
    ranks.followers[2].close()
    loss = ranks.loss(0)
    assert loss.text.startswith("rank 2 ended without a word")
    assert (loss.speaks, loss.told, loss.code) == (True, False, 1)
    assert ranks.loss(1) == replace(loss, speaks=False, told=True)  # passed on


def test_a_failed_rank_says_why(ranks: Ranks) -> None:
    ranks.start(1)
    failing = ranks.start(2)
    started = time.monotonic()
    failing.fail("rank 2: a file\nbecame shorter", 7)  # returns when rank 0 has told the user
    assert time.monotonic() - started < 2.9
    assert ranks.endings[0].calls[0][0] == "report"
    assert ranks.loss(0) == Loss("rank 2: a file became shorter", 7, told=True, speaks=True)
    assert ranks.loss(1) == Loss("rank 2: a file became shorter", 7, told=True, speaks=False)
    assert not ranks.endings[2].calls  # it ends by its own error


@pytest.mark.parametrize("message", [b"fail\xff x y", b"fail -1 words", b"fail 1", b"fail \xd9\xa3 words", b"fail  "])
def test_a_strange_message_is_a_loss(ranks: Ranks, message: bytes) -> None:
    ranks.followers[2].send(b"fail " + message.removeprefix(b"fail") + b"\n")
    assert ranks.loss(0).text == "rank 2 sent a message that npuq does not know: is it the same version?"


def test_words_of_a_rank_are_printable(ranks: Ranks) -> None:
    ranks.followers[2].send(b"fail 70 a\x1b[31mb\n")
    assert ranks.loss(0) == Loss("a\\x1b[31mb", 70, told=True, speaks=True)


@pytest.mark.parametrize("rank", [1, 2])
def test_of_the_followers_rank_1_speaks_for_rank_0(rank: int) -> None:
    near, far = socket.socketpair()
    ending = Recorder()
    Lifeline(rank, [Peer(0, near)], ending)
    far.close()
    assert ending.ended.wait(WAIT)
    assert ending.calls[0][1].text.startswith("rank 0 ended without a word")
    assert ending.calls[0][1].speaks == (rank == 1)


def test_a_silent_rank_is_lost() -> None:
    ranks = Ranks(silence=3.0)
    ranks.start(1)  # beats; nobody reads or writes at the end of rank 2
    loss = ranks.loss(0)
    assert loss.text.startswith("rank 2 has been silent for 3 seconds")
    assert ranks.loss(1).text == loss.text


def test_ranks_that_leave_are_no_loss(ranks: Ranks) -> None:
    followers = [ranks.start(rank) for rank in (1, 2)]
    ranks.leader.leave()
    for follower in followers:
        follower.leave()
    for connection in ranks.followers.values():
        connection.shutdown(socket.SHUT_RDWR)
    assert ranks.leader.loss(1.0) is None
    assert not any(ending.calls for ending in ranks.endings.values())


class Store:
    """A key-value store of threads."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, WAIT)
            return self._values[key].encode()


def test_strangers_are_sent_away() -> None:
    store = Store()
    launch = Launch(size=3, address="127.0.0.1", port=1)
    found: list[Peer] = []
    leader = threading.Thread(target=lambda: found.extend(connect(launch, store)))
    leader.start()
    port, token = store.get("lifeline").decode().split()
    greetings = [f"{'0' * 32}00001", f"{token}00000", f"{token}00003", f"{token}x0001", f"{token[:-1]}"]
    strangers = []
    for greeting in greetings:
        stranger = socket.create_connection(("127.0.0.1", int(port)))
        stranger.sendall(greeting.encode())
        stranger.shutdown(socket.SHUT_WR)
        strangers.append(stranger)
    followers = [connect(replace(launch, rank=rank), store)[0] for rank in (2, 1)]
    leader.join(WAIT)
    assert [peer.rank for peer in found] == [1, 2]
    assert all(stranger.recv(1) == b"" for stranger in strangers)
    for open_one in (*strangers, *(peer.connection for peer in (*found, *followers))):
        open_one.close()


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "START_SECONDS", 0.2)
    with pytest.raises(RankError, match=r"ranks \[1, 2\] did not connect"):
        connect(Launch(size=3, address="127.0.0.1", port=1), Store())


@pytest.mark.parametrize("value", ["", "1", "x y", "99999999 y", "-1 y"])
def test_a_store_that_holds_something_else_is_an_error(value: str) -> None:
    store = Store()
    store.set("lifeline", value)
    with pytest.raises(RankError, match="rank 1 of 2"):
        connect(Launch(1, 2, 1, 2, "127.0.0.1", 1), store)
