"""Clients that leave: what they asked for ends, what others asked for does not."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving import SECONDS, Brake, Running, close_hard, read, wait_for

from npuq.runtime import LanguageModel

LONG = "The law of the United States " * 60
ENDLESS = {"max_tokens": 3000, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_a_client_that_leaves_ends_its_request(server: Running, brake: Brake, stream: bool, phase: str) -> None:
    """In the queue, in the middle of its prompt and while it is answered: its blocks are free within two steps."""
    before = server.metric("request_cancelled_total")
    engine = server.service.model.engine
    prompt = f"{phase} {stream} {LONG * 7}"  # more than a step takes, and nothing that the cache has of another test
    connection = server.send(prompt=prompt, stream=stream, **ENDLESS)
    brake.wait()  # before the first step
    (sequence,) = engine.scheduler._waiting
    if phase != "queue":
        brake.pass_steps()
        assert sequence.num_cached > 0
    if phase == "prefill":
        assert not sequence.is_decoding
    if phase == "decode":
        while not sequence.is_decoding:
            brake.pass_steps()
        brake.pass_steps(2)
    close_hard(connection)
    wait_for(lambda: server.metric("request_cancelled_total") == before + 1)
    steps = brake.steps
    brake.pass_steps(1)  # the step that was held, which knows nothing of it
    wait_for(server.is_idle)
    assert brake.steps - steps <= 2
    assert sequence.finish_reason == "cancelled"


def test_a_request_cancelled_in_the_queue_never_runs(server: Running, brake: Brake) -> None:
    """Behind others that fill the step, and beside one that goes on."""
    first = server.send(prompt="A first text", max_tokens=4, stream=False)
    brake.wait()
    others = [server.send(prompt=LONG, stream=True, **ENDLESS) for _ in range(3)]
    wait_for(lambda: server.service.num_answering == 4)
    before = server.metric("request_cancelled_total")
    for connection in others:
        close_hard(connection)
    wait_for(lambda: server.metric("request_cancelled_total") == before + 3)
    brake.release()
    wait_for(server.is_idle)
    assert brake.steps == 4  # a token each
    assert b'"finish_reason":"length"' in read(first)


def test_a_neighbours_text_is_the_same(client: openai.OpenAI, server: Running, model: LanguageModel) -> None:
    """While others of the same step come and go, in the queue and after it."""
    prompt = "The section of this title"
    alone = model.generate(prompt, max_new_tokens=60, temperature=0, ignore_eos=True)
    ended = threading.Event()

    def disturb(number: int) -> int:
        count = 0
        while not ended.is_set():
            connection = server.send(prompt=f"{number} {LONG[: 40 * number]}", stream=number % 2 == 0, **ENDLESS)
            if number in (2, 4):  # a stream that has begun
                connection.recv(100)
            close_hard(connection)
            count += 1
            ended.wait(0.2)  # the server's places are for all
        return count

    with ThreadPoolExecutor(4) as pool:
        disturbing = [pool.submit(disturb, number) for number in (1, 2, 4, 6)]
        try:
            texts = [
                client.completions.create(model="tiny", prompt=prompt, max_tokens=60, extra_body={"ignore_eos": True})
                for _ in range(4)
            ]
        finally:
            ended.set()
        assert all(each.result() for each in disturbing)
    assert [text.choices[0].text for text in texts] == [alone.text] * 4
    wait_for(server.is_idle)


def test_a_client_that_reads_nothing_is_given_up(
    server: Running, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket is full: what it asked for goes on, joined, until it is too long; others go on."""
    import npuq.serve.http.protocol as protocol
    import npuq.serve.responding as responding

    monkeypatch.setattr(protocol, "SEND_SECONDS", 0.3)
    monkeypatch.setattr(responding, "events", lambda documents: b": %b\n\n" % (b"x" * (1 << 20)))
    before = server.metric("request_cancelled_total")
    connection = server.send(prompt="A text", stream=True, **ENDLESS)
    wait_for(lambda: server.metric("request_cancelled_total") == before + 1)
    connection.close()
    wait_for(server.is_idle)


@pytest.mark.parametrize("header", ["Connection: close", "Accept: */*"])
def test_a_document_that_nobody_reads_is_given_up(
    server: Running, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    """With its connection: the client could hold any number of answers in memory."""
    import npuq.serve.http.protocol as protocol
    import npuq.serve.status as status

    monkeypatch.setattr(protocol, "SEND_SECONDS", 0.3)
    monkeypatch.setattr(status, "_model", lambda service, name: {"id": "x" * (32 << 20)})
    connections = server.server.server_state.connections
    wait_for(lambda: not connections)
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        wait_for(lambda: not connections)


def test_a_reset_of_an_idle_connection_leaves_no_timer(server: Running) -> None:
    """uvicorn's for idle connections would hold the connection's memory for a minute."""
    connections = server.server.server_state.connections
    wait_for(lambda: not connections)
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"
        (protocol,) = connections
        wait_for(lambda: protocol.timeout_keep_alive_task is not None)
        timers = [protocol.timeout_keep_alive_task, protocol._taking]
        close_hard(connection)
        wait_for(lambda: not connections)
    wait_for(lambda: all(timer.cancelled() for timer in timers))
    assert protocol.timeout_keep_alive_task is None


def test_hard_closes_leave_the_server_as_it_was(client: openai.OpenAI, server: Running, model: LanguageModel) -> None:
    """Fifty of them, with prompts whose blocks the next answer reuses."""
    expected = model.generate(LONG, max_new_tokens=20, temperature=0).text
    for number in range(50):
        connection = server.send(prompt=LONG[: 100 + 30 * number], stream=number % 2 == 0, **ENDLESS)
        if number % 10 == 0:
            connection.recv(50)
        close_hard(connection)
    wait_for(server.is_idle)
    answer = client.completions.create(model="tiny", prompt=LONG, max_tokens=20)
    assert answer.choices[0].text == expected
    wait_for(server.is_idle)
