"""Requests beyond a limit, and bodies that are none: each is refused in OpenAI's form, and the server goes on."""

from __future__ import annotations

import gc
import json
import logging.handlers
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from serving import SECONDS, Brake, Running, read, running, wait_for

import npuq.serve.http.bodies
import npuq.serve.http.protocol
from npuq.runtime import LanguageModel, SamplingParams
from npuq.serve.http.protocol import Protocol
from npuq.serve.limits import Limits
from npuq.serve.service import Service

DEEP = 100_000


@pytest.fixture(scope="module")
def small(model: LanguageModel) -> Iterator[Running]:
    """A server with narrow limits."""
    limits = Limits(max_body=2000, max_queue=2, max_queued_tokens=50, max_prompts=3)
    with running(Service(model, ["tiny"], SamplingParams(), limits)) as found:
        yield found


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({"n": 5_000_000}, "n"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"logprobs": 10**9}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 6}, "logprobs"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "1"}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": [2**40]}, "stop_token_ids"),
    ({"stop_token_ids": [10**6]}, None),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"1000000": 1}}, None),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {str(number): 1 for number in range(1025)}}, "logit_bias"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"priority": 1}, "priority"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [[], [1]]}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": [[1], 2]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**31]}, "prompt"),
    ({"prompt": [10**6]}, None),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [["x"]]}, "prompt"),
    ({"prompt": ["x"] * 129}, None),
    ({"prompt": ["x"] * 9, "n": 16}, None),
    ({"prompt": [5] * 4096}, None),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:40])
def test_a_value_out_of_range_is_refused(server: Running, fields: dict[str, Any], param: str | None) -> None:
    """With the field's name, in one line."""
    answer = server.complete(**{"prompt": "A text", "max_tokens": 8, **fields})
    assert answer.status == 400, answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == param
    message = answer.error["message"]
    assert message.isprintable() and len(message) <= 1000 and "Traceback" not in message


HOSTILE = {
    "empty": b"",
    "no JSON": b"prompt=x",
    "no object": b'["prompt"]',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": 1e999}',
    "deep lists": b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects in a field that is not known": b'{"prompt": "x", "tools": '
    + b'{"a":' * DEEP
    + b"1"
    + b"}" * DEEP
    + b"}",
    "a field's name that is no text": b'{"prompt": "x", "\xff": 1}',
    "an unfinished text": b'{"prompt": "x',
    "two documents": b'{"prompt": "x"} {}',
    "a number of a million digits": b'{"prompt": "x", "n": ' + b"9" * 1_000_000 + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused(server: Running, name: str) -> None:
    answer = server.ask("POST", "/v1/completions", HOSTILE[name])
    assert answer.status == 400, answer.body
    assert answer.error["message"].isprintable()


def test_escapes_in_a_message_are_printable(server: Running) -> None:
    answer = server.complete(model="\x1b[2J" + "m" * 500, prompt="x")
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert answer.error["message"].isprintable() and len(answer.error["message"]) < 400


def test_unknown_fields_are_counted(server: Running) -> None:
    before = server.metric("unknown_fields_total")
    assert server.complete(prompt="x", max_tokens=1, user="me", a=[1], b={}).status == 200
    assert server.metric("unknown_fields_total") == before + 3


def test_a_prompt_beyond_the_context_has_its_own_code(client: openai.OpenAI, model: LanguageModel) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="word " * 5000)
    assert caught.value.code == "context_length_exceeded"
    assert str(model.context) in str(caught.value)


def test_the_context_clips_an_answer(
    client: openai.OpenAI, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.engine, "context", 40)
    prompt = [5] * 37
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=100, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_a_body_that_is_too_long_is_refused_unread(small: Running) -> None:
    """By its length, and by its bytes where it tells none."""
    assert small.complete(prompt="x" * 2000).status == 413
    with socket.create_connection(("127.0.0.1", small.port), timeout=SECONDS) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"1000\r\n" + b"x" * 0x1000 + b"\r\n")  # and nothing more
        assert b" 413 " in connection.recv(1000)
    with socket.create_connection(("127.0.0.1", small.port), timeout=SECONDS) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n")
        assert b" 413 " in connection.recv(1000)


def test_headers_that_are_too_long_are_refused(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (70 << 10))
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_a_body_that_does_not_come_is_given_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npuq.serve.http.bodies, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        assert b" 408 " in connection.recv(1000)
    wait_for(lambda: not server.service.num_answering)


def test_a_head_that_does_not_come_is_given_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a first request, also where a byte of it comes now and then, and of one behind another."""
    monkeypatch.setattr(npuq.serve.http.protocol, "HEAD_SECONDS", 0.3)
    for words in (b"", b"G"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
            connection.sendall(words)
            assert connection.recv(100) == b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            answer += connection.recv(1000)
        connection.sendall(b"GET ")
        assert connection.recv(100) == b""


@pytest.mark.parametrize("most", ["time", "bytes"])
def test_a_body_behind_its_answer_is_given_up(server: Running, monkeypatch: pytest.MonkeyPatch, most: str) -> None:
    """However it drips: the answer did not need it. One that ends in time leaves the connection as it was."""
    monkeypatch.setattr(npuq.serve.http.protocol, "REST_BYTES", 1000)
    head = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        for length in (900, 900, 10**9):
            if length == 10**9 and most == "time":
                monkeypatch.setattr(npuq.serve.http.protocol, "REST_SECONDS", 0.3)
            connection.sendall(head % length)
            answer = b""
            while b"no such path" not in answer:
                part = connection.recv(1000)
                assert part, answer
                answer += part
            assert answer.startswith(b"HTTP/1.1 404")
            if length < 10**9:
                connection.sendall(b"x" * length)
        until = time.monotonic() + SECONDS
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while time.monotonic() < until:
                connection.sendall(b"x" if most == "time" else b"x" * 100)
                time.sleep(0.01)


def test_the_rest_of_a_body_has_no_part_in_the_next_request(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests in one packet: the first's end finds the second's body on its way, whose own time counts."""
    monkeypatch.setattr(npuq.serve.http.protocol, "REST_SECONDS", 0.2)
    body = json.dumps({"prompt": "A text"}).encode()
    first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    second = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(first + second + body[:5])
        time.sleep(0.6)
        connection.sendall(body[5:])
        answer = b""
        while b"tokens" not in answer:
            part = connection.recv(1000)
            assert part, answer
            answer += part
        assert answer.count(b"HTTP/1.1 200") == 2


def test_what_is_no_http_is_refused(server: Running) -> None:
    """In a document, where no answer has begun; else the connection is closed, without an error in the log."""
    errors = logging.handlers.BufferingHandler(100)
    logging.getLogger("asyncio").addHandler(errors)
    for words in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/9\r\nHost: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
            connection.sendall(words)
            head, _, body = read(connection).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400")
            assert json.loads(body)["error"]["type"] == "invalid_request_error"
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b" 404 " in connection.recv(1000)
        connection.sendall(b"no chunk\r\n")
        with suppress(ConnectionResetError):
            assert b"HTTP" not in read(connection)
    logging.getLogger("asyncio").removeHandler(errors)
    assert errors.buffer == []


def test_a_client_that_takes_hardly_anything_is_given_up() -> None:
    """A few bytes now and then: its answer would stay in memory for days. One that is slow is not."""
    aborted: list[int] = []
    looks: list[int] = []  # what the next one is told
    unsent = [0]
    transport = SimpleNamespace(
        get_write_buffer_size=lambda: unsent[0], abort=lambda: aborted.append(unsent[0]), is_closing=lambda: False
    )
    protocol: Any = SimpleNamespace(
        transport=transport,
        flow=SimpleNamespace(write_paused=True),
        loop=SimpleNamespace(call_later=lambda seconds, call, before: looks.append(before)),
        _took=False,
        _check_taking=None,
    )
    for before, unsent[0] in ((0, 10**6), (10**6, 9 * 10**5), (2 * 10**5, 180_000)):
        Protocol._check_taking(protocol, before)
    assert not aborted
    assert looks == [10**6, 9 * 10**5, 180_000]
    protocol.flow.write_paused = False  # the answer grows: the client may have taken any number of bytes meanwhile
    Protocol._check_taking(protocol, 10**6)
    assert looks[-1] == 0 and not aborted
    protocol.flow.write_paused = True
    for before, unsent[0] in ((2 * 10**5, 190_000), (10**6, 950_000)):  # less than 16 KiB, less than a sixteenth
        Protocol._check_taking(protocol, before)
        assert aborted.pop() == unsent[0]


def test_connections_have_a_limit(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(server.server.server_state.connections) + 2
    monkeypatch.setattr(npuq.serve.http.protocol, "most_connections", lambda: count)
    opened = [socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) for _ in range(3)]
    with suppress(ConnectionResetError):
        assert opened[2].recv(1) == b""
    opened[0].sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert opened[0].recv(100).startswith(b"HTTP/1.1 200")
    for connection in opened:
        connection.close()


def test_a_full_queue_says_when_to_ask_again(small: Running, brake: Brake) -> None:
    """Nothing is read of such a request. The official client asks again by itself, and gets its answer."""
    held = [small.send(prompt="A text", max_tokens=2) for _ in range(2)]
    wait_for(lambda: small.service.num_answering == 2)
    answer = small.complete(prompt="A text")
    assert answer.status == 429
    assert answer.error["code"] == "busy"
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert small.metric("rejected_total") >= 1
    assert small.ask("GET", "/health").status == 200
    with ThreadPoolExecutor(1) as pool, small.client() as client:
        waiting = pool.submit(client.completions.create, model="tiny", prompt="A text", max_tokens=2)
        time.sleep(0.3)
        assert not waiting.done()
        brake.release()
        assert waiting.result().usage is not None
    for connection in held:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()


def test_prompts_with_log_probabilities_have_a_limit(small: Running) -> None:
    """Each token's are kept until the answer: 1 KB for one of two bytes in the body."""
    answer = small.complete(prompt=[[5] * 26, [5] * 26], max_tokens=1, echo=True, logprobs=0)
    assert answer.status == 400 and "52 prompt tokens" in answer.error["message"]
    assert small.complete(prompt=[[5] * 26, [5] * 24], max_tokens=1, echo=True, logprobs=0).status == 200


def test_millions_of_lists_hold_nobody(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's collector would look at them again and again while they are decoded, and no thread could run."""
    collections: list[int] = []

    def note(phase: str, details: dict[str, int]) -> None:
        if threading.current_thread().name.startswith("AnyIO"):
            collections.append(details["generation"])

    gc.callbacks.append(note)
    try:
        answer = server.ask("POST", "/v1/completions", b'{"prompt":[' + b"[5]," * 100_000 + b"[5]]}")
    finally:
        gc.callbacks.remove(note)
    assert answer.status == 400 and "100001 prompts" in answer.error["message"]
    assert len(collections) < 20
    assert gc.isenabled()


def test_waiting_tokens_have_a_limit(small: Running, brake: Brake) -> None:
    """One request may be longer than that, while none waits."""
    held = small.send(prompt=[5] * 60, max_tokens=1)
    brake.wait()
    answer = small.complete(prompt="A text")
    assert answer.status == 429
    assert "60 prompt tokens wait" in answer.error["message"]
    brake.release()
    assert held.recv(100).startswith(b"HTTP/1.1 200")
    held.close()


def test_prompts_of_a_request_have_a_limit(small: Running) -> None:
    assert small.complete(prompt=["x", "y"], n=2).status == 400
    assert small.complete(prompt=["x", "y", "z"], max_tokens=1).status == 200


def test_no_work_is_done_for_prompts_beyond_the_limit(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body has room for millions, and n and logprobs multiply what is kept of each."""
    monkeypatch.setattr(small.service.model.tokenizer, "encode", None)
    answer = small.complete(prompt=["x"] * 200, n=2, logprobs=0)
    assert answer.status == 400
    assert "200 prompts" in answer.error["message"]


def test_an_answer_that_takes_too_long_ends(small: Running, brake: Brake, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official client does not ask for it again."""
    monkeypatch.setattr(small.service, "limits", replace(small.service.limits, request_seconds=1.0))
    brake.release(delay=0.2)
    with small.client() as client, pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt="x", max_tokens=3000, extra_body={"ignore_eos": True})
    assert caught.value.status_code == 504
    assert caught.value.response.headers["x-should-retry"] == "false"
    with small.client() as client, pytest.raises(openai.APIError, match="took more than 1 s") as broken:
        stream = client.completions.create(
            model="tiny", prompt="x", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
        assert len(list(stream)) > 0
    assert not isinstance(broken.value, openai.APIStatusError)  # within the stream
    wait_for(small.is_idle)


def test_a_huge_text_stops_nobody(server: Running) -> None:
    """It is tokenized beside all else: a stream goes on, and the server answers."""
    text = json.dumps({"prompt": "The law of the land, " * 40_000}).encode()
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(server.ask, "POST", "/v1/completions", text)
        answers = 0
        while not refused.done():
            assert server.ask("GET", "/health").status == 200
            answers += 1
        assert refused.result().error["code"] == "context_length_exceeded"
    assert answers >= 5


def test_paths_and_methods_that_are_none(server: Running) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)):
        answer = server.ask(method, path)
        assert (answer.status, answer.error["type"] != "") == (status, True)
    assert server.ask("GET", "/v1/models/../../etc/passwd").status == 404
    assert server.ask("GET", "/v1/models/other").error["code"] == "model_not_found"
    assert json.loads(server.ask("GET", "/v1/models/").body)["data"][0]["id"] == "tiny"
