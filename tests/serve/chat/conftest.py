"""A server whose model thinks and calls tools as DeepSeek-V3.1 does, and one that does as Kimi-K2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from example_artifact import artifact  # noqa: F401  (fixture)

import npuq.runtime
from npuq.runtime import EngineConfig, LanguageModel, SamplingParams
from npuq.runtime.text.replies.formats import find_format
from npuq.serve.service import Service

from ..conftest import Running, running
from .chat_models import KIMI_K2, V31, ScriptedConversations, write_tokenizer


@pytest.fixture(scope="session")
def chat_model(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:  # noqa: F811
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("chat") / "v31", V31)
    return npuq.runtime.load(artifact, "cpu", engine=EngineConfig(64 << 20, step_seconds=0.25), tokenizer=tokenizer)


def _serving(model: LanguageModel, reasoning: str = "auto") -> Iterator[Running]:
    service = Service(model, ["tiny"], SamplingParams())
    service.conversations = ScriptedConversations(model, find_format(model.tokenizer, reasoning))
    with running(service) as found:
        yield found


@pytest.fixture(scope="session")
def chat_server(chat_model: LanguageModel) -> Iterator[Running]:
    yield from _serving(chat_model)


@pytest.fixture(scope="session")
def kimi_server(chat_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("chat") / "kimi", KIMI_K2)
    model = LanguageModel(chat_model.directory, {}, chat_model.engine, tokenizer)
    model.loop = chat_model.loop  # one loop steps the engine
    yield from _serving(model, "none")


@pytest.fixture
def script(chat_server: Running) -> Iterator[ScriptedConversations]:
    """What the server's model says next."""
    yield from _clean(chat_server)


@pytest.fixture
def kimi_script(kimi_server: Running) -> Iterator[ScriptedConversations]:
    yield from _clean(kimi_server)


def _clean(server: Running) -> Iterator[ScriptedConversations]:
    conversations = server.service.conversations
    assert isinstance(conversations, ScriptedConversations)
    yield conversations
    conversations.say()


@pytest.fixture(scope="session")
def chat(chat_server: Running) -> Iterator[openai.OpenAI]:
    with chat_server.client() as found:
        yield found


@pytest.fixture(scope="session")
def kimi(kimi_server: Running) -> Iterator[openai.OpenAI]:
    with kimi_server.client() as found:
        yield found
