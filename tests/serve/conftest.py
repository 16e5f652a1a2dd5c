"""A server of the shipped example, in this process, behind a real socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from example_artifact import artifact  # noqa: F401  (fixture)

import npuq.runtime
from npuq.runtime import EngineConfig, LanguageModel, SamplingParams
from npuq.serve.limits import Limits
from npuq.serve.server import bind, make_server
from npuq.serve.service import Service

SECONDS = 120
"""Patience of clients: the machine may be busy."""


@dataclass(frozen=True)
class Running:
    """A server that runs. url: without a path."""

    service: Service
    url: str

    def client(self, **options: object) -> openai.OpenAI:
        """A client as people make it: with its own defaults, retries among them."""
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "unused", "timeout": SECONDS, **options})


@contextmanager
def running(service: Service) -> Iterator[Running]:
    """Serve in a thread of this process."""
    listener = bind("127.0.0.1", 0)
    server = make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Running(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="session")
def model(artifact: Path) -> LanguageModel:  # noqa: F811
    """The example's artifact, loaded once for all servers of these tests."""
    return npuq.runtime.load(artifact, "cpu", engine=EngineConfig(64 << 20, step_seconds=0.25))


@pytest.fixture(scope="session")
def server(model: LanguageModel) -> Iterator[Running]:
    """A server with default limits, greedy where a request says nothing."""
    with running(Service(model, ["tiny", "w4a8"], SamplingParams(), Limits())) as found:
        yield found


@pytest.fixture(scope="session")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as found:
        yield found
