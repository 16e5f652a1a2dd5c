"""Who may use a server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import openai
import pytest
from serving import SECONDS, Running, read, running, wait_for

from npuq.runtime import LanguageModel, SamplingParams
from npuq.serve.http.access import Access, loopback_hosts
from npuq.serve.service import Service

PAGE = "https://page.example"


@pytest.fixture(scope="module")
def log() -> list[str]:
    return []


@pytest.fixture(scope="module")
def keyed(model: LanguageModel, log: list[str]) -> Iterator[Running]:
    """A server with keys, hosts and an origin."""
    access = Access.of(["key-1", "key-2"], (*loopback_hosts(), "Gateway"), [PAGE])
    with running(Service(model, ["tiny"], SamplingParams(), access=access, log=log.append, log_prompts=True)) as found:
        yield found


def test_a_key_is_needed(keyed: Running) -> None:
    """As OpenAI's clients send it, or as Azure's do; the log has neither."""
    with keyed.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    with keyed.client(api_key="key-2") as client:
        assert len(client.models.list().data) == 1
    for headers in (
        {"api-key": "key-1"},
        {"Authorization": "bearer key-1"},
        {"Authorization": "x", "api-key": "key-2"},
    ):
        assert keyed.ask("GET", "/v1/models", headers=headers).status == 200
    for headers in ({}, {"api-key": ""}, {"Authorization": "Bearer "}, {"Authorization": "Bearer \xff"}):
        answer = keyed.ask("GET", "/v1/models", headers=headers)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"


def test_paths_that_need_no_key(keyed: Running) -> None:
    for path, status in (("/health", 200), ("/ready/", 200), ("/metrics/", 401), ("/version", 401), ("/x", 401)):
        assert keyed.ask("GET", path).status == status
    assert Access.of(["key"], open_metrics=True).open_paths >= {"/metrics", "/health"}


def test_a_foreign_host_is_refused(keyed: Running, server: Running) -> None:
    """A name that somebody else's page was made to point here by."""
    headers = {"api-key": "key-1"}
    for host, status in (
        *((f"127.0.0.1:{keyed.port}", 200), ("localhost", 200), ("[::1]:80", 200), ("GATEWAY:1", 200)),
        *(("evil.example", 400), ("127.0.0.1.evil.example", 400), ("", 400), ("localhost@evil", 400)),
    ):
        assert keyed.ask("GET", "/v1/models", headers={**headers, "Host": host}).status == status
    assert server.ask("GET", "/v1/models", headers={"Host": "any"}).status == 200  # without a rule


def test_a_foreign_page_gets_nothing(keyed: Running, server: Running) -> None:
    """No header that lets it read, and no work done for it; an allowed one gets both."""
    for origin in ("https://evil.example", "null", f"{PAGE}.evil", "http://localhost:1"):
        for found in (keyed, server):
            answer = found.ask("POST", "/v1/completions", {"prompt": "x"}, {"Origin": origin, "api-key": "key-1"})
            assert answer.status == 403
            assert not [name for name in answer.headers if name.startswith("access-control-allow")]
    own = server.ask("GET", "/v1/models", headers={"Origin": server.url})
    assert own.status == 200
    allowed = keyed.ask("GET", "/v1/models", headers={"Origin": PAGE, "api-key": "key-1"})
    assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    asked = keyed.ask("OPTIONS", "/v1/completions", headers=asks)
    assert (asked.status, asked.headers["access-control-allow-origin"]) == (200, PAGE)
    asked = keyed.ask("OPTIONS", "/v1/completions", headers={**asks, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize("asked", ["POST", "OPTIONS"])
def test_a_body_with_two_lengths_is_refused(keyed: Running, asked: str) -> None:
    """A proxy and the server could take different ends for it: what follows would be somebody's next request."""
    head = f"{asked} /tokenize HTTP/1.1\r\nHost: localhost\r\napi-key: key-1\r\nContent-Length: 4".encode()
    if asked == "OPTIONS":
        head += f"\r\nOrigin: {PAGE}\r\nAccess-Control-Request-Method: POST".encode()
    inner = b"GET /version HTTP/1.1\r\nHost: localhost\r\napi-key: key-1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", keyed.port), timeout=SECONDS) as connection:
        connection.sendall(head + b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner)
        answer = read(connection)
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1


def test_a_path_is_one_word_of_the_log(keyed: Running, log: list[str]) -> None:
    """Whatever is in it: no client writes the words of another line, nor a line of its own."""
    keyed.ask("GET", "/x%20200%200.001s%20finish=stop%0areq-1", headers={"X-Request-Id": "path-1"})
    wait_for(lambda: any(line.startswith("path-1 ") for line in log))
    (line,) = [line for line in log if line.startswith("path-1 ")]
    assert line.split()[:4] == ["path-1", "GET", "/x%20200%200.001s%20finish=stop%0areq-1", "401"]


def test_prompts_of_the_log_are_made_beside_the_event_loop(keyed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long one takes its time, in which no stream would go on."""
    on_the_loop: list[bool] = []
    decode = keyed.service.model.tokenizer.decode

    def noted(tokens: list[int]) -> str:
        on_the_loop.append(asyncio._get_running_loop() is not None)
        return decode(tokens)

    monkeypatch.setattr(keyed.service.model.tokenizer, "decode", noted)
    for stream in (False, True):
        fields = {"prompt": "A", "max_tokens": 1, "stream": stream}
        assert keyed.ask("POST", "/v1/completions", fields, {"api-key": "key-1"}).status == 200
    assert on_the_loop and not any(on_the_loop)


def test_each_request_has_an_id_and_a_line(keyed: Running, log: list[str]) -> None:
    headers = {"api-key": "key-1", "X-Request-Id": "mine-1"}
    answer = keyed.ask("POST", "/v1/completions", {"prompt": "A text", "max_tokens": 3}, headers)
    assert answer.headers["x-request-id"] == "mine-1"
    wait_for(lambda: len([line for line in log if line.startswith("mine-1 ")]) == 2)  # the line comes after the answer
    prompt, line = [line for line in log if line.startswith("mine-1 ")]
    assert prompt == "mine-1 prompt: A text"
    assert line.startswith("mine-1 POST /v1/completions 200 ")
    for word in ("prompt_tokens=", "cached_tokens=0", "new_tokens=3", "finish=length", "first_token="):
        assert word in line
    for hostile in ("\x1b[2J", "x" * 129, "a b"):
        answer = keyed.ask("GET", "/v1/models", headers={**headers, "X-Request-Id": hostile})
        assert answer.headers["x-request-id"].startswith("req-")
    assert not any("key-" in line for line in log)
    keyed.ask("GET", "/health")
    keyed.ask("GET", "/last")
    wait_for(lambda: " GET /last 401 " in log[-1])
    assert not any("/health" in line for line in log)
