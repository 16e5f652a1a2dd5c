"""`npuq serve` as a process: its start, its end by signals, and over ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import campaign
import openai
import pytest
from json_schemas import check
from listening import start_document
from serving import SECONDS, wait_for

from npuq.runtime import LanguageModel

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


class Server:
    """A process that serves the example."""

    def __init__(self, model: Path, *options: str, ranks: int = 1, **variables: str):
        launcher = [] if ranks == 1 else ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m"]
        command = [*launcher, "npuq", "serve", model, "--port", "0", "--json", "--cache-size", "64MiB", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # ranks are ended with it
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent), **variables},
        )
        self.lines: list[str] = []
        self.drained = threading.Thread(target=self._drain, daemon=True)
        self.drained.start()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(line.rstrip("\n") for line in iter(self.process.stderr.readline, ""))

    @cached_property
    def start(self) -> dict[str, Any]:
        """What it says when it listens."""
        found = start_document(self.process.stdout)
        check("serve", found)
        return found

    def wait(self) -> int:
        code = self.process.wait(SECONDS)
        self.drained.join(SECONDS)
        return code


@pytest.fixture(scope="module")
def servers(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """All processes of these tests, which start beside each other."""
    template = tmp_path_factory.mktemp("template") / "own.jinja"
    template.write_text("{{ messages[0].content }}◁think▷", encoding="utf-8")
    chats = ("--chat-template", str(template), "--tools", "deepseek-v31")
    found = {
        "drains": Server(artifact, "--cache-size", "16MiB", NPUQ_API_KEY="key"),
        "ends": Server(artifact, "--served-name", "tiny", "--shutdown-timeout", "600", *chats),
        "ranks": Server(artifact, "--cache-size", "auto", ranks=2),
    }
    yield found
    for server in found.values():
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)


def begun(client: openai.OpenAI, tokens: int) -> Iterator[str]:
    """A stream whose first chunk has come: its other texts."""
    stream = client.completions.create(
        model="w4a8", prompt="The law", max_tokens=tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    first = next(chunks).choices[0].text

    def rest() -> Iterator[str]:
        yield first
        for chunk in chunks:
            yield chunk.choices[0].text

    return rest()


def test_the_campaign_tells_a_leak_from_noise() -> None:
    """One rest that holds 8 MB more is no leak; 1 KB a request is."""
    rests = [(part * 1000, 7919 * part % 300_000) for part in range(12)]
    flat = campaign.Memory([(310_000_000 + noise + (n == 8000) * 8_000_000, n) for n, noise in rests])
    leaking = campaign.Memory([(310_000_000 + noise + 1024 * n, n) for n, noise in rests])
    assert (flat.tells(), flat.leaks()) == (True, False)
    assert leaking.leaks()


def test_clients_of_all_kinds_get_their_texts_and_memory_stays(
    servers: dict[str, Server], model: LanguageModel
) -> None:
    """A short part of the campaign beside requests that are refused, three times: the last takes little memory."""
    server = servers["drains"]
    start = server.start
    assert start.keys() == {"schema", "url", "models", "context", "cache_tokens", "cache_bytes", "pid"}
    assert start["cache_bytes"] <= 16 << 20 and start["cache_tokens"] == model.cache_tokens * start["cache_bytes"] // (
        model.cache_bytes
    )
    cases = [(asked, campaign.expected(model, asked)) for asked in campaign.requests()[::4]]
    memory = []
    for part in range(3):
        until = time.monotonic() + 1.5
        clients = [campaign.Client(start["url"], cases, until, 10 * part + number, "key") for number in range(8)]
        for client in clients:
            client.start()
        with openai.OpenAI(base_url=start["url"], api_key="key", timeout=SECONDS) as hostile:
            for number in range(40):
                with pytest.raises(openai.BadRequestError):
                    hostile.completions.create(model="w4a8", prompt=[10**6 + number] * 1000, n=1 + number)
        for client in clients:
            client.join()
        assert [line for client in clients for line in client.wrong] == []
        assert all(client.done + client.left for client in clients)
        memory.append(campaign.resident(start["pid"]))
    assert memory[2] < 1.1 * memory[1]  # these times are short: the long campaign allows less


def test_sigterm_lets_answers_end(servers: dict[str, Server]) -> None:
    """New requests are refused meanwhile, in a way that clients ask again; it has said where it listens."""
    server = servers["drains"]
    start = server.start
    assert start["models"] == ["w4a8"]
    with openai.OpenAI(base_url=start["url"], api_key="key", timeout=SECONDS, max_retries=0) as client:
        running = begun(client, 300)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: any("ends after 1 running answers" in line for line in server.lines))
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="w4a8", prompt="x")
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert len("".join(running)) > 300
    assert server.wait() == 0
    assert any(" POST /v1/completions 200 " in line and "finish=length" in line for line in server.lines)
    assert not any("Traceback" in line or "key" in line.split() for line in server.lines)


def test_a_second_signal_ends_at_once(servers: dict[str, Server]) -> None:
    """Before it, the template and the format of calls that the command names are those of chat."""
    server = servers["ends"]
    start = server.start
    assert start["models"] == ["tiny", "w4a8"]
    with openai.OpenAI(base_url=start["url"], api_key="none", timeout=SECONDS) as client:
        asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 4}
        message = client.chat.completions.create(**asked).choices[0].message
        assert message.content == "" and (message.model_extra or {})["reasoning"]
        tool: Any = {"type": "function", "function": {"name": "f", "strict": True}}
        with pytest.raises(openai.BadRequestError, match="the markers of calls are no tokens here"):
            client.chat.completions.create(**asked, tools=[tool])
        running = begun(client, 3500)
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: any("once more ends at once" in line for line in server.lines))
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert next(running)


def test_ranks_serve_what_one_process_does_and_end_together(servers: dict[str, Server], model: LanguageModel) -> None:
    """Rank 0 alone listens. When another one is killed, requests get 503 or an error event, and all processes end."""
    server = servers["ranks"]
    start = server.start
    with openai.OpenAI(base_url=start["url"], api_key="none", timeout=SECONDS, max_retries=0) as client:
        prompts = ["The law", "A section of"]
        answer = client.completions.create(model="w4a8", prompt=prompts, max_tokens=12, temperature=0)
        expected = model.generate(prompts, max_new_tokens=12, temperature=0)
        assert [choice.text for choice in answer.choices] == [done.text for done in expected]
        running = begun(client, 3500)
        (other,) = [pid for pid in children(server.process.pid) if pid != start["pid"]]
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(
                client.completions.create, model="w4a8", prompt="x", max_tokens=3000, extra_body={"ignore_eos": True}
            )
            assert next(running)
            os.kill(other, signal.SIGKILL)
            with pytest.raises(openai.APIError):
                list(running)
            with pytest.raises(openai.InternalServerError) as refused:
                whole.result()
            assert refused.value.status_code == 503
    assert server.wait() != 0
    own = [line for line in server.lines if line.startswith("npuq: error:")]
    assert len(own) == 1 and "rank 1" in own[0]


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(each) for each in found.split()]


def test_starts_that_are_refused(run: Run, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the weights are read, each in a line."""
    monkeypatch.delenv("NPUQ_API_KEY", raising=False)
    code, _, said = run("serve", artifact, "--host", "0.0.0.0")
    assert (code, "give a key (--api-key-file or $NPUQ_API_KEY), or --no-auth" in said) == (2, True)
    (tmp_path / "keys").write_text("\n  \n", encoding="utf-8")
    assert run("serve", artifact, "--api-key-file", tmp_path / "keys")[0] == 2
    (tmp_path / "keys").write_text("a key\n", encoding="utf-8")
    code, _, said = run("serve", artifact, "--api-key-file", tmp_path / "keys")
    assert (code, "without spaces" in said) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, said = run("serve", artifact, "--port", taken.getsockname()[1])
    assert (code, said.count("\n")) == (1, 1)
    assert "Address already in use" in said
    code, _, said = run("serve", tmp_path)
    assert (code, said.count("\n")) == (1, 1)
