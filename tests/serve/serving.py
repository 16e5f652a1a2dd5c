"""Servers in this process behind real sockets, and clients that misbehave."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai

from npuq.runtime import LanguageModel
from npuq.runtime.engine import StepOutput
from npuq.serve.server import HttpServer, bind
from npuq.serve.service import Service

SECONDS = 120
"""Patience of clients: the machine may be busy."""


@dataclass(frozen=True)
class Answer:
    """A response as it came."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, which has OpenAI's form."""
        error: dict[str, Any] = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert self.headers["content-type"] == "application/json"
        return error


@dataclass(frozen=True)
class Running:
    """A server that runs. url: without a path."""

    service: Service
    server: HttpServer
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> openai.OpenAI:
        """A client as people make it: with its own defaults, retries among them."""
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "unused", "timeout": SECONDS, **options})

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """Send one request. body: bytes as they are, anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, content, headers or {})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def complete(self, **fields: Any) -> Answer:
        return self.ask("POST", "/v1/completions", fields)

    def send(self, **fields: Any) -> socket.socket:
        """Begin a completion on a connection of its own: reading and closing it are the caller's."""
        body = json.dumps(fields).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)
        head = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {len(body)}"]
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
        return connection

    def is_idle(self) -> bool:
        """True when nothing runs, waits or is held."""
        engine = self.service.model.engine
        free = engine.blocks.num_free == engine.blocks.num_blocks
        return not engine.scheduler.has_work and free and not self.service.num_answering

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = self.service.metrics.text().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == f"npuq_{name}")


def read(connection: socket.socket) -> bytes:
    """All that comes, to the end."""
    with connection, connection.makefile("rb") as file:
        return file.read()


def close_hard(connection: socket.socket) -> None:
    """Close a connection by a reset, as a process that is killed may."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is true."""
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


@contextmanager
def running(service: Service, drain_seconds: float = 30.0) -> Iterator[Running]:
    """Serve in a thread of this process."""
    listener = bind("127.0.0.1", 0)
    server = HttpServer(service, drain_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Running(service, server, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server did not end"


class Brake:
    """Lets steps of an engine through as a test says."""

    def __init__(self, model: LanguageModel):
        self._engine = model.engine
        self._step = model.engine.step
        self._allowed = threading.Semaphore(0)
        self._waiting = threading.Event()
        self._on = False
        self._delay = 0.0
        self.steps = 0

    def step(self) -> list[StepOutput]:
        if self._on:
            self._waiting.set()
            self._allowed.acquire()
            self._waiting.clear()
        time.sleep(self._delay)
        self.steps += 1
        return self._step()

    @contextmanager
    def on(self) -> Iterator[Brake]:
        """Hold all steps within, but those that `pass_steps` lets through."""
        self._on, self._engine.step = True, self.step  # type: ignore[method-assign]
        try:
            yield self
        finally:
            self.release()
            self._engine.step = self._step  # type: ignore[method-assign]

    def release(self, delay: float = 0.0) -> None:
        """Hold no step any more; each takes so many seconds longer."""
        self._on, self._delay = False, delay
        self._allowed.release(1000)

    def wait(self) -> None:
        """Wait until a step is held."""
        assert self._waiting.wait(SECONDS)

    def pass_steps(self, count: int = 1) -> None:
        """Let steps through, and wait until the next one is held, or there is no work."""
        for _ in range(count):
            self.wait()
            self._waiting.clear()
            self._allowed.release()
            wait_for(lambda: self._waiting.is_set() or not self._engine.scheduler.has_work)
