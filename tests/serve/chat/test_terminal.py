"""`npuq chat URL` with a server of npuq's own."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from ..conftest import Running
from .chat_models import ScriptedConversations


def test_two_turns_with_reasoning_start_from_the_cache(
    chat_server: Running,
    script: ScriptedConversations,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script.say("<think>Hm. Long ago.</think>In the year 1851, it is said.")
    question = "When was it written, and by whom, and what is it about? " * 12
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{question}\nAnd then?\n".encode())))
    options = ("--json", "--max-new-tokens", "32", "--chat-template-kwargs", '{"thinking": true}')
    code, out, err = run("chat", chat_server.url, *options)
    assert code == 0, err
    first, second = json.loads(out)["turns"]
    assert (first["reasoning"], first["content"]) == ("Hm. Long ago.", "In the year 1851, it is said.")
    assert first["finish_reason"] == "stop" and first["cached_tokens"] == 0
    assert second["cached_tokens"] == first["prompt_tokens"] // 64 * 64 > 0
    assert "In the year 1851, it is said." in script.prompt and "Long ago" not in script.prompt


def test_a_refusal_is_one_line(chat_server: Running, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    code, out, err = run("chat", chat_server.url, "--model", "another", "--quiet")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "the model 'another' does not exist" in err and "(status 404)" in err
