"""`npuq serve` under clients: time to first token, tokens a second; beside the library, and llama.cpp's server.

    python benchmarks/serve.py [--threads 2] [--rounds 3] [--json]
    python benchmarks/serve.py --random --llama-cpp ENV/bin/python      # a model of 2.6 GB, and the peer on its shape
    python benchmarks/serve.py --random --layers 2 --llama-cpp …        # 0.6 GB of it

The model is the shipped example as an artifact. With `--random` it is that of benchmarks/runtime.py, with a tokenizer
of characters (build/random-small-v3-text). Clients stream `/v1/completions`, all at once, each with its own prompt.
A round has 1, 16 and 32 clients, `LanguageModel.generate` with as many prompts as the 16, and the two turns of a long
conversation. Prompts differ in each round, so the prefix cache helps the second turn alone. `--llama-cpp` names the
Python of an environment that has llama-cpp-python[server] and gguf: 1 and 16 clients ask its server too
(build/random-small-v3-text.gguf), which answers one at a time. What it has not written after `--peer-seconds` does not
count, and it is started again. All take turns with the same threads. Figures are medians over the rounds, with the
least and the most; ratios are computed within a round first.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from measure.machine import as_json
from measure.rounds import Figures, summary, with_spread

HERE: Final = Path(__file__).resolve().parent
BUILD: Final = HERE.parent / "build"
EXAMPLES: Final = HERE.parent / "examples"
CLIENTS: Final = (1, 16, 32)
LIBRARY: Final = 16
PATIENCE: Final = 600.0
"""Seconds in which the server's own answers have to be whole, and a model written."""
START_SECONDS: Final = 120.0
"""In which the peer's server has to listen."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=300, help="characters of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a request")
    parser.add_argument("--conversation", type=int, default=4000, help="tokens of the long conversation; 0: none")
    parser.add_argument("--random", action="store_true", help="the random model instead of the example")
    parser.add_argument("--layers", type=int, help="with --random: another number of layers")
    parser.add_argument("--llama-cpp", type=Path, metavar="PYTHON", help="with --random: the peer's Python")
    parser.add_argument("--peer-seconds", type=float, default=60.0, help="for the peer's answers to all clients")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (options.llama_cpp or options.layers) and not options.random:
        parser.error("--llama-cpp and --layers need --random: the peer has no such model as the example")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    model = random_model(options.layers) if options.random else example()
    text = (EXAMPLES / "eval.txt").read_text(encoding="ascii", errors="ignore")
    shape = Shape(text, options.prompt, options.tokens, options.conversation)
    with npuq_server(model) as server:
        peer = Peer(options) if options.llama_cpp else None
        library = Library(model)
        rounds = []
        try:
            for number in range(-1, options.rounds):  # the first, small, warms all up
                if number >= 0:
                    print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
                small = Shape(text, options.prompt, 4, 0)
                found = measure_round(server, peer, library, shape if number >= 0 else small, number)
                rounds += [found] if number >= 0 else []
        finally:
            if peer is not None:
                peer.stop()
    if options.json:
        print(as_json({**vars(options), **summary(rounds)}))
    else:
        print(table(rounds, options))


@dataclass(frozen=True)
class Shape:
    """Sizes of the requests. prompt: characters. conversation: tokens of the first turn."""

    text: str
    prompt: int
    tokens: int
    conversation: int

    def prompts(self, number: int, count: int) -> list[str]:
        """Prompts of a round's clients: no two begin alike."""
        step = len(self.text) // 4096
        places = [(number * 997 + count * 131 + index * 61) % 4000 * step for index in range(count)]
        return [f"{number} {count} {index}: {self.text[place:]}"[: self.prompt] for index, place in enumerate(places)]


def measure_round(server: Server, peer: Peer | None, library: Library, shape: Shape, number: int) -> Figures:
    """Measure one round: seconds, tokens/s and ratios. Round −1 warms up, the peer by one client."""
    found: Figures = {}
    for count in CLIENTS:
        prompts = shape.prompts(number, count)
        found |= asked(server, f"npuq {count}", prompts, shape.tokens)
        if count == LIBRARY:
            rate = library.rate(shape.prompts(number + 500, count), shape.tokens)
            found["library"] = rate
            found["of the library"] = found[f"npuq {count} tokens/s"] / rate
        if peer is not None and count <= (LIBRARY if number >= 0 else 1):
            found |= peer.asked(f"llama.cpp {count}", prompts, shape.tokens)
            for what in ("tokens/s", "first"):
                found[f"llama.cpp {count} {what} ratio"] = (
                    found[f"npuq {count} {what}"] / found[f"llama.cpp {count} {what}"]
                )
    if shape.conversation:
        found |= turns(server, shape, number)
    return found


def asked(server: Server, name: str, prompts: list[str], tokens: int, seconds: float = PATIENCE) -> Figures:
    """Ask all prompts at once, and take what is there after some seconds."""
    answers: list[Answer] = []
    until = time.perf_counter() + seconds
    threads = [
        threading.Thread(target=lambda text=text: answers.append(server.ask(text, tokens, until))) for text in prompts
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - started
    assert len(answers) == len(prompts), "a client failed"
    firsts = sorted(answer.first for answer in answers)
    return {
        f"{name} tokens/s": sum(answer.tokens for answer in answers) / took,
        f"{name} first": statistics.median(firsts),
        f"{name} last first": firsts[-1],
        f"{name} whole": sum(answer.is_whole for answer in answers) / len(answers),
    }


def turns(server: Server, shape: Shape, number: int) -> Figures:
    """A long first turn, and the second: the first, its answer and a short question."""
    ids = server.post("/tokenize", {"prompt": f"{number}. {shape.text[number * 1000 :]}"})["tokens"]
    most = shape.conversation - shape.tokens - 40
    text = server.post("/detokenize", {"tokens": ids[:most]})["prompt"]
    first = server.ask(text, shape.tokens)
    second = server.ask(f"{text}{first.text}\nAnd then?", shape.tokens)
    return {
        "first turn": first.first,
        "second turn": second.first,
        "second of first": second.first / first.first,
        "turn tokens": first.prompt_tokens,
    }


@dataclass(frozen=True)
class Answer:
    """One answer, or its beginning. first: seconds to its first text, at least."""

    text: str
    first: float
    tokens: int
    prompt_tokens: int
    is_whole: bool = True


@dataclass
class Server:
    """A server that runs at a port of this machine."""

    process: subprocess.Popen[Any]
    port: int
    settings: dict[str, Any]

    def ask(self, prompt: str, tokens: int, until: float | None = None) -> Answer:
        """Stream a completion, and leave at a time of `perf_counter`."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, **self.settings}
        started = time.perf_counter()
        until = until or started + PATIENCE
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=until - started)
        first, parts, usage, chunks, ended = None, [], {}, 0, False
        with contextlib.suppress(TimeoutError):
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            for line in response:
                if time.perf_counter() > until:
                    break
                ended = ended or line.startswith(b"data: [DONE]")
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    chunks += 1
                    if choice["text"]:
                        first = first or time.perf_counter() - started
                        parts.append(choice["text"])
        connection.close()
        new = usage.get("completion_tokens", min(chunks, tokens))
        first = first or time.perf_counter() - started
        return Answer("".join(parts), first, new, usage.get("prompt_tokens", 0), ended)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        found: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        return found

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def npuq_server(model: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "npuq", "serve", str(model), "--port", "0", "--json", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    head = ""
    while not head.endswith("}\n"):
        line = process.stdout.readline()
        assert line, "the server did not start"
        head += line
    port = int(json.loads(head)["url"].removesuffix("/v1").rpartition(":")[2])
    server = Server(process, port, {"ignore_eos": True, "stream_options": {"include_usage": True}})
    try:
        yield server
    finally:
        server.stop()


class Peer:
    """llama.cpp's server: it answers one request at a time, and lets the others wait."""

    def __init__(self, options: argparse.Namespace):
        self._python, self._threads, self._seconds = options.llama_cpp, options.threads, options.peer_seconds
        self._model = BUILD / f"{'-'.join(['random-small-v3-text', *_number(options.layers)])}.gguf"
        command = [self._python, HERE / "peers/llama_cpp_runtime.py", self._model, "--write-text"]
        command += ["--layers", str(options.layers)] if options.layers else []
        subprocess.run(list(map(str, command)), check=True, timeout=PATIENCE)
        self._server = self._start()

    def asked(self, name: str, prompts: list[str], tokens: int) -> Figures:
        """As `asked`. A server that was left works on for clients who have gone: then the next one has a new one."""
        found = asked(self._server, name, prompts, tokens, self._seconds)
        if found[f"{name} whole"] < 1:
            self.stop()
            self._server = self._start()
        return found

    def stop(self) -> None:
        self._server.stop()

    def _start(self) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        threads = self._threads
        settings = {"model": self._model, "port": port, "n_ctx": 4096, "n_threads": threads, "n_threads_batch": threads}
        command = [str(self._python), "-m", "llama_cpp.server", "--interrupt_requests", "false"]
        command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        server = Server(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), port, {})
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and server.process.poll() is None:
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    return server
            time.sleep(0.2)
        server.stop()
        raise SystemExit(f"the peer did not start: {' '.join(command)}")


class Library:
    """The same model in this process."""

    def __init__(self, model: Path):
        import npuq.runtime

        self.model = npuq.runtime.load(model, "cpu")

    def rate(self, prompts: list[str], tokens: int) -> float:
        """Tokens a second of all prompts together, from their texts to texts."""
        started = time.perf_counter()
        done = self.model.generate(prompts, max_new_tokens=tokens, temperature=0, ignore_eos=True)
        return sum(completion.completion_tokens for completion in done) / (time.perf_counter() - started)


def example() -> Path:
    """The shipped checkpoint as an artifact, made once."""
    path = BUILD / "example-w4a8"
    if not (path / "npuq" / "manifest.json").is_file():
        import npuq

        npuq.convert_checkpoint(EXAMPLES / "tiny-deepseek-v3-fp8", path)
    return path


def _number(layers: int | None) -> list[str]:
    return [str(layers)] if layers else []


def random_model(layers: int | None) -> Path:
    """The random model with a tokenizer: each ASCII character is a token, and all others are only written."""
    from measure.random_artifact import SMALL_V3, make

    path = BUILD / "-".join(["random-small-v3-text", *_number(layers)])
    if (path / "tokenizer.json").is_file():
        return path
    plain = BUILD / "-".join(["random-small-v3", *_number(layers)])
    if not (plain / "npuq" / "manifest.json").is_file():
        make(plain, {**SMALL_V3, **({"num_hidden_layers": layers} if layers else {})})
    path.mkdir(parents=True, exist_ok=True)
    for file in plain.rglob("*"):
        if file.is_file():
            target = path / file.relative_to(plain)
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                os.link(file, target)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-c", _TOKENIZER, str(SMALL_V3["vocab_size"]), f"{folder}/tokenizer.json"], check=True
        )
        shutil.move(f"{folder}/tokenizer.json", path)
    return path


# As the peer's file has it: the alphabet of bytes as GPT-2 writes them, then t256, t257, …
_TOKENIZER: Final = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
names = alphabet + [f"t{n}" for n in range(256, int(sys.argv[1]))]
found = Tokenizer(models.BPE(vocab={name: id for id, name in enumerate(names)}, merges=[]))
found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
found.save(sys.argv[2])
"""


def table(rounds: list[Figures], options: argparse.Namespace) -> str:
    figures = summary(rounds)

    def shown(name: str, digits: int = 2) -> str:
        return with_spread(figures, name, digits)

    lines = [
        f"{options.threads} threads, {options.rounds} rounds, {options.prompt} characters, {options.tokens} tokens"
    ]
    lines.append(f"{'':24} {'tokens/s':>28} {'first token, s':>28} {'last client, s':>28}")
    names = [name.removesuffix(" tokens/s") for name in rounds[0] if name.endswith(" tokens/s")]
    for name in names:
        columns = (shown(f"{name} tokens/s", 1), shown(f"{name} first", 3), shown(f"{name} last first", 3))
        lines.append(f"{name + ' clients':24} " + " ".join(f"{column:>28}" for column in columns))
    lines.append(f"{f'library, {LIBRARY} prompts':24} {shown('library', 1):>28}")
    lines.append(f"server of library: {shown('of the library')}")
    lines += [f"npuq of {name.removesuffix(' ratio')}: {shown(name)}" for name in rounds[0] if name.endswith(" ratio")]
    for name in names:
        if (part := figures["medians"][f"{name} whole"]) < 1:
            seconds = options.peer_seconds
            lines.append(
                f"{name} clients: {part:.2f} of them had their answers after {seconds:g} s, where it was ended"
            )
    if "second of first" in rounds[0]:
        lines.append(
            f"conversation of {rounds[0]['turn tokens']:.0f} tokens: first turn {shown('first turn', 3)} s, second "
            f"{shown('second turn', 3)} s, {shown('second of first', 3)} of it"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
