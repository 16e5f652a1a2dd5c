"""Many clients of one server for a while: every text must be the one that it is alone, and none may be lost.

    python tests/serve/campaign.py --clients 32 --seconds 300

Clients are the official one, with its own defaults. They stream or not, ask greedily or with a seed, with stop strings
and several choices, share beginnings of prompts or not, and some leave in the middle; some want log-probabilities, an
echo, or JSON by a schema in a chat. It serves the shipped example in a process of its own.

Every 25 seconds the clients rest until the server has given back what it does not need: its memory is read then
(`Memory`), so a leak of 1 KB a request is found in five minutes. Under load it holds a step's temporaries too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from listening import start_document

import npuq.runtime
from npuq.runtime import LanguageModel, SamplingParams
from npuq.serve.memory import TRIM_SECONDS

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v3-fp8"
BEGINNINGS = [
    "",
    "The Congress of the United States, in the year of its last session, has found as follows. " * 12,
    "Section 12. Terms of this title, and what they mean in all that follows. " * 20,
]
SUBJECTS = ["The law", "A section", "The House of", "In the year", "Its members", "The term", "No person", "A court"]

LOAD_SECONDS = 25.0
"""Between two rests."""
REST_SECONDS = TRIM_SECONDS + 2
"""A rest: the server gives its free memory back meanwhile."""
NOISE = 1 << 20
"""Bytes by which what it holds differs from rest to rest: parts of pages."""
LEAK = 512
"""Bytes a request, beyond the noise, that are called a leak."""


def requests() -> list[dict[str, Any]]:
    """What is asked for, again and again, in the words of the protocol."""
    made: list[dict[str, Any]] = []
    for number in range(48):
        asked: dict[str, Any] = {
            "model": "w4a8",
            "prompt": BEGINNINGS[number % 3] + SUBJECTS[number % 8],
            "max_tokens": 8 + 5 * (number % 7),
            "temperature": 0.0 if number % 2 else 0.8,
            "top_p": 1.0 if number % 4 else 0.9,
            "seed": number,
        }
        if number % 5 == 0:
            asked["stop"] = [" the", "."]
        if number % 11 == 0:
            asked["n"] = 2
        made.append(asked)
    return made


SCHEMA = {
    "type": "object",
    "properties": {"title": {"type": "string", "maxLength": 12}, "year": {"type": "integer", "maximum": 2100}},
    "required": ["title", "year"],
    "additionalProperties": False,
}
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def other_requests() -> list[dict[str, Any]]:
    """Requests that use more of the server than text: their answers alone are the server's own."""
    made: list[dict[str, Any]] = []
    for number, subject in enumerate(SUBJECTS):
        fields: dict[str, Any] = {"model": "w4a8", "max_tokens": 24, "seed": number, "temperature": number % 2}
        schema = {"type": "json_schema", "json_schema": {"name": "act", "schema": SCHEMA}}
        made.append({**fields, "messages": [{"role": "user", "content": subject}], "response_format": schema})
        made.append({**fields, "prompt": subject, "logprobs": 5})
        made.append({**fields, "prompt": BEGINNINGS[number % 3] + subject, "logprobs": 1, "echo": True})
    return made


def expected(model: LanguageModel, asked: dict[str, Any]) -> list[str]:
    """The texts of a request alone."""
    fields = {name: value for name, value in asked.items() if name not in ("model", "prompt", "max_tokens")}
    params = SamplingParams(max_new_tokens=asked["max_tokens"], **fields)
    return [done.text for done in model.generate([asked["prompt"]], params)]


def resident(pid: int) -> int:
    """Bytes of memory that a process has of its own, without mapped files."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


@dataclass
class Memory:
    """What a server holds at its rests, after so many requests; the first third does not count: caches fill.

    most: what it held under load before each rest, at most.
    """

    held: list[tuple[int, int]] = field(default_factory=list)
    most: list[int] = field(default_factory=list)

    @property
    def counted(self) -> list[tuple[int, int]]:
        """Bytes held and requests answered, at the rests that count."""
        return self.held[len(self.held) // 3 :]

    def growth(self) -> tuple[float, int]:
        """Bytes a request, and requests: the median of the slopes between any two rests, which no single rest moves.

        Two rests beside each other differ by noise alone, so they are not compared.
        """
        rests = self.counted
        far = max(2, len(rests) // 3)
        slopes = [
            (late - early) / max(1, more - few)
            for place, (early, few) in enumerate(rests)
            for late, more in rests[place + far :]
        ]
        return (statistics.median(slopes), rests[-1][1] - rests[0][1]) if slopes else (0.0, 0)

    def leaks(self) -> bool:
        slope, requests = self.growth()
        return slope * requests > NOISE + LEAK * requests

    def tells(self) -> bool:
        """True where a leak of 1 KB a request would be seen."""
        return (1024 - LEAK) * self.growth()[1] > NOISE


def fill_cache(url: str) -> None:
    """Write every block of the cache once: its memory is the server's from then on."""
    text = (EXAMPLE.parent / "eval.txt").read_text(encoding="utf-8")
    with openai.OpenAI(base_url=url, api_key="none") as client:
        for part in range(6):
            beginning = text[part * 6000 : (part + 1) * 6000]
            client.completions.create(model="w4a8", prompt=beginning, max_tokens=1)


class Client(threading.Thread):
    """Asks one request after another, and compares."""

    def __init__(
        self, url: str, cases: list[tuple[dict[str, Any], list[str]]], until: float, seed: int, key: str = "none"
    ):
        super().__init__(daemon=True)
        self._url, self._cases, self._until, self._key = url, cases, until, key
        self._random = random.Random(seed)
        self.done = self.left = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        with openai.OpenAI(base_url=self._url, api_key=self._key) as client:
            while time.monotonic() < self._until:
                asked, texts = self._random.choice(self._cases)
                try:
                    self._ask(client, asked, texts)
                except Exception as error:  # any: a client that ends unseen would count as a sound one
                    self.wrong.append(f"{json.dumps(asked)[-120:]}: {type(error).__name__}: {error}"[:300])

    def _ask(self, client: openai.OpenAI, asked: dict[str, Any], texts: list[str]) -> None:
        if asked.get("echo") or self._random.random() < 0.5:
            found = answer(client, asked)
        else:
            leaves = self._random.random() < 0.1
            found = [""] * len(texts)
            with _create(client, asked)(stream=True, **asked) as stream:
                for chunk in stream:
                    if leaves:
                        self.left += 1
                        return
                    choice = chunk.choices[0]
                    found[choice.index] += (choice.delta.content or "") if "messages" in asked else choice.text
        self.done += 1
        if found != texts:
            self.wrong.append(f"{json.dumps(asked)[-200:]}: {found} is not {texts}"[:600])


def answer(client: openai.OpenAI, asked: dict[str, Any]) -> list[str]:
    """The texts of a request's choices."""
    choices = _create(client, asked)(**asked).choices
    return [choice.message.content if "messages" in asked else choice.text for choice in choices]


def _create(client: openai.OpenAI, asked: dict[str, Any]) -> Any:
    return client.chat.completions.create if "messages" in asked else client.completions.create


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300.0, help="of load, without the rests")
    parser.add_argument("--model", type=Path, default=EXAMPLE)
    options = parser.parse_args()
    model = npuq.runtime.load(options.model, "cpu")
    with ThreadPoolExecutor(1) as pool:
        cases = [(asked, pool.submit(expected, model, asked).result()) for asked in requests()]
    del model
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder, "template.jinja")
        template.write_text(TEMPLATE, encoding="utf-8")
        command = ["serve", options.model, "--port", "0", "--served-name", "w4a8", "--cache-size", "64MiB"]
        command += ["--chat-template", template, "--json", "--quiet"]
        server = subprocess.Popen([sys.executable, "-m", "npuq", *map(str, command)], stdout=subprocess.PIPE, text=True)
        try:
            ran, memory = run(server, cases, options.clients, options.seconds)
        finally:
            server.terminate()
            code = server.wait(60)
    wrong = [line for client in ran for line in client.wrong]
    done, left = sum(client.done for client in ran), sum(client.left for client in ran)
    print(f"{done} answers, {left} clients left, {len(wrong)} wrong, exit {code}")
    print("memory at rest, MiB:", *(f"{held / (1 << 20):.1f}" for held, _ in memory.held))
    print("under load, at most:", *(f"{most / (1 << 20):.1f}" for most in memory.most))
    slope, counted = memory.growth()
    enough = "" if memory.tells() else ", too few to tell a leak of 1 KB"
    print(f"memory: {slope:+.0f} bytes a request over {counted} requests{enough}")
    print(*wrong[:10], sep="\n")
    return 1 if wrong or memory.leaks() or code or not done else 0


def run(
    server: subprocess.Popen[str], cases: list[tuple[dict[str, Any], list[str]]], number: int, seconds: float
) -> tuple[list[Client], Memory]:
    """Let so many clients ask a server that starts: the clients, and its memory."""
    url = start_document(server.stdout)["url"]
    fill_cache(url)
    with openai.OpenAI(base_url=url, api_key="none") as alone:
        cases = cases + [(asked, answer(alone, asked)) for asked in other_requests()]
    clients: list[Client] = []
    memory = Memory()
    parts = max(1, round(seconds / LOAD_SECONDS))
    for part in range(parts):
        until = time.monotonic() + seconds / parts
        new = [Client(url, cases, until, part * number + each) for each in range(number)]
        for client in new:
            client.start()
        most = 0
        while any(client.is_alive() for client in new):
            most = max(most, resident(server.pid))
            time.sleep(0.25)
        clients += new
        time.sleep(REST_SECONDS)
        memory.most.append(most)
        memory.held.append((resident(server.pid), sum(client.done for client in clients)))
    return clients, memory


if __name__ == "__main__":
    sys.exit(main())
