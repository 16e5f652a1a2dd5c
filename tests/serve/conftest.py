"""A server of the shipped example, in this process, behind a real socket."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from example_artifact import artifact  # noqa: F401  (fixture)

import npuq.runtime
from npuq.runtime import EngineConfig, LanguageModel, SamplingParams
from npuq.serve.limits import Limits
from npuq.serve.service import Service

sys.path.insert(0, str(Path(__file__).parent))

from serving import Brake, Running, running


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


@pytest.fixture
def brake(model: LanguageModel) -> Iterator[Brake]:
    """The engine's steps, held."""
    with Brake(model).on() as found:
        yield found
