"""What a server says of itself, and its tokenizer."""

from __future__ import annotations

import pytest
from serving import Brake, Running, running, wait_for

import npuq
import npuq.serve.engine_thread
from npuq.runtime import LanguageModel, SamplingParams
from npuq.serve.service import Service


def test_health_fails_when_the_engine_hangs_or_ends(
    model: LanguageModel, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work is there and no step ends; a server without work is well, however long its last step was ago."""
    with running(Service(model, ["tiny"], SamplingParams())) as found:
        monkeypatch.setattr(npuq.serve.engine_thread, "_STUCK_SECONDS", 0.2)
        monkeypatch.setattr(npuq.serve.engine_thread, "_STUCK_STEPS", 0)
        found.service.engine._progress_at -= 100
        assert found.ask("GET", "/health").status == 200
        held = found.send(prompt="A text", max_tokens=1)
        brake.wait()
        wait_for(lambda: found.ask("GET", "/health").status == 503)
        assert found.ask("GET", "/ready").status == 503
        brake.release()
        assert held.recv(100).startswith(b"HTTP/1.1 200")
        held.close()
        wait_for(lambda: found.ask("GET", "/health").status == 200)
        found.service.engine.stop()
        wait_for(lambda: found.ask("GET", "/health").status == 503)


def test_a_step_that_fails_ends_its_requests_alone(
    server: Running, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "step", lambda: 1 / 0)
        answer = server.complete(prompt="A text", max_tokens=1)
        assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert server.complete(prompt="A text", max_tokens=1).status == 200
    assert server.ask("GET", "/health").status == 200


def test_metrics_have_their_names(server: Running) -> None:
    before = {name: server.metric(name) for name in ("generation_tokens_total", "prompt_tokens_total")}
    server.complete(prompt=["A text", "Two"], max_tokens=4, n=2)
    assert server.metric("generation_tokens_total") == before["generation_tokens_total"] + 16
    tokens = sum(len(server.service.model.tokenizer.encode(text)) for text in ("A text", "Two"))
    assert server.metric("prompt_tokens_total") == before["prompt_tokens_total"] + tokens
    answer = server.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.body.decode()
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"),
        *("prompt_tokens_cached_total", "time_to_first_token_seconds_count", "inter_token_latency_seconds_count"),
        *("request_queue_time_seconds_count", "e2e_request_latency_seconds_count", "step_seconds_count"),
        'request_success_total{finished_reason="length"}',
    ):
        assert f"\nnpuq_{name} " in text


def test_version_and_models(server: Running) -> None:
    assert server.ask("GET", "/version").json == {"version": npuq.__version__}
    for path in ("/v1/models", "/v1/models/"):
        (found,) = server.ask("GET", path).json["data"]
        assert (found["id"], found["object"], found["max_model_len"]) == ("tiny", "model", 4096)
    assert server.ask("GET", "/v1/models/w4a8").json["id"] == "w4a8"


def test_tokens_of_a_text_and_back(server: Running, model: LanguageModel) -> None:
    text = "A text, 語🙂"
    found = server.ask("POST", "/tokenize", {"prompt": text}).json
    assert found["tokens"] == model.tokenizer.encode(text)
    assert found["count"] == len(found["tokens"])
    bare = server.ask("POST", "/tokenize", {"prompt": text, "add_special_tokens": False}).json["tokens"]
    assert bare == model.tokenizer.encode(text, special=False)
    assert server.ask("POST", "/detokenize", {"tokens": bare}).json == {"prompt": text}
    assert server.ask("POST", "/detokenize", {"tokens": []}).json == {"prompt": ""}
    for path, body in (("/detokenize", {"tokens": [10**6]}), ("/detokenize", {}), ("/tokenize", {"prompt": 1})):
        assert server.ask("POST", path, body).status == 400
