"""Many clients of one server for a while: every text must be the one that it is alone, and none may be lost.

    python tests/serve/campaign.py --clients 32 --seconds 300

Clients are the official one, with its own defaults. They stream or not, ask greedily or with a seed, with stop strings
and several choices, share beginnings of prompts or not, and some leave in the middle. It serves the shipped example in
a process of its own, and watches the memory of that (`Memory`): a leak of 1 KB a request is found in five minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

import npuq.runtime
from npuq.runtime import LanguageModel, SamplingParams

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v3-fp8"
BEGINNINGS = [
    "",
    "The Congress of the United States, in the year of its last session, has found as follows. " * 12,
    "Section 12. Terms of this title, and what they mean in all that follows. " * 20,
]
SUBJECTS = ["The law", "A section", "The House of", "In the year", "Its members", "The term", "No person", "A court"]

WINDOW = 12.0
"""Seconds. The server gives free memory back every 10: the least of a window is what it holds."""
NOISE = 2 << 20
"""Bytes by which what it holds differs from window to window: requests that run, and parts of pages."""
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


def expected(model: LanguageModel, asked: dict[str, Any]) -> list[str]:
    """The texts of a request alone."""
    fields = {name: value for name, value in asked.items() if name not in ("model", "prompt", "max_tokens")}
    params = SamplingParams(max_new_tokens=asked["max_tokens"], **fields)
    return [done.text for done in model.generate([asked["prompt"]], params)]


def resident(pid: int) -> int:
    """Bytes of memory that a process has of its own, without mapped files."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


class Memory:
    """What a server holds, as requests go by. The first third of the time does not count: caches fill."""

    def __init__(self) -> None:
        self._least: dict[int, tuple[int, int]] = {}

    def note(self, seconds: float, held: int, requests: int) -> None:
        """Note a look at the server's memory, some seconds after its first request."""
        window = int(seconds / WINDOW)
        self._least[window] = min(self._least.get(window, (held, requests)), (held, requests))

    def windows(self) -> list[tuple[int, int]]:
        """Bytes held and requests answered, of the windows that count; the last one was cut short."""
        found = [self._least[window] for window in sorted(self._least)][:-1]
        return found[len(found) // 3 :]

    def growth(self) -> tuple[float, int]:
        """Bytes a request, and requests: the median of the slopes between any two windows, which no single step moves.

        Two windows beside each other differ by noise alone, so they are not compared.
        """
        windows = self.windows()
        far = max(2, len(windows) // 3)
        slopes = [
            (late - early) / max(1, more - few)
            for place, (early, few) in enumerate(windows)
            for late, more in windows[place + far :]
        ]
        return (statistics.median(slopes), windows[-1][1] - windows[0][1]) if slopes else (0.0, 0)

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
                except openai.OpenAIError as error:
                    self.wrong.append(f"{asked['prompt'][-20:]!r}: {type(error).__name__}: {error}"[:300])

    def _ask(self, client: openai.OpenAI, asked: dict[str, Any], texts: list[str]) -> None:
        found = [""] * len(texts)
        if self._random.random() < 0.5:
            for choice in client.completions.create(**asked).choices:
                found[choice.index] = choice.text
        else:
            leaves = self._random.random() < 0.1
            with client.completions.create(stream=True, **asked) as stream:
                for chunk in stream:
                    if leaves:
                        self.left += 1
                        return
                    found[chunk.choices[0].index] += chunk.choices[0].text
        self.done += 1
        if found != texts:
            self.wrong.append(f"{asked['prompt'][-20:]!r}: {found} is not {texts}"[:600])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--model", type=Path, default=EXAMPLE)
    options = parser.parse_args()
    model = npuq.runtime.load(options.model, "cpu")
    with ThreadPoolExecutor(1) as pool:
        cases = [(asked, pool.submit(expected, model, asked).result()) for asked in requests()]
    del model
    command = [
        "serve",
        options.model,
        "--port",
        "0",
        "--served-name",
        "w4a8",
        "--cache-size",
        "64MiB",
        "--json",
        "--quiet",
    ]
    server = subprocess.Popen([sys.executable, "-m", "npuq", *map(str, command)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        text = ""
        while not text.endswith("}\n"):
            text += server.stdout.readline()
        url = json.loads(text)["url"]
        fill_cache(url)
        until = time.monotonic() + options.seconds
        clients = [Client(url, cases, until, number) for number in range(options.clients)]
        for client in clients:
            client.start()
        memory, started = Memory(), time.monotonic()
        while time.monotonic() < until:
            time.sleep(0.5)
            memory.note(time.monotonic() - started, resident(server.pid), sum(client.done for client in clients))
        for client in clients:
            client.join()
    finally:
        server.terminate()
        code = server.wait(60)
    wrong = [line for client in clients for line in client.wrong]
    done, left = sum(client.done for client in clients), sum(client.left for client in clients)
    print(f"{done} answers, {left} clients left, {len(wrong)} wrong, exit {code}")
    print("memory, MiB:", *(f"{held / (1 << 20):.1f}" for held, _ in memory.windows()))
    slope, counted = memory.growth()
    enough = "" if memory.tells() else ", too few to tell a leak of 1 KB"
    print(f"memory: {slope:+.0f} bytes a request over {counted} requests{enough}")
    print(*wrong[:10], sep="\n")
    return 1 if wrong or memory.leaks() or code or not done else 0


if __name__ == "__main__":
    sys.exit(main())
