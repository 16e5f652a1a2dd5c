"""`npuq chat` with a model in this process: the second turn's cache, Ctrl-C, a pipe, refusals."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import warm
from terminal_process import TerminalProcess

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-deepseek-v3-fp8"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
LONG = "The whale swims in the deep sea, and nobody has seen it since the spring. " * 20


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "template.jinja"
    path.write_text(TEMPLATE)
    return path


def test_the_second_turn_of_a_pipe_starts_from_the_prefix_cache(template: Path) -> None:
    arguments = ("--greedy", "--max-new-tokens", "4", "--dtype", "float32", "--json", "--quiet")
    done = warm.run("chat", EXAMPLE, "--chat-template", template, *arguments, input=f"{LONG}\nAnd then?\n/retry\n")
    assert done.returncode == 0 and done.stderr == "(the answer reached its limit of tokens)\n" * 3
    first, second, again = json.loads(done.stdout)["turns"]
    assert first["prompt_tokens"] > 256 and first["cached_tokens"] == 0
    # All whole blocks of the first turn.
    assert second["cached_tokens"] == first["prompt_tokens"] // 64 * 64
    assert second["prompt_tokens"] > first["prompt_tokens"] + 4
    assert second["content"] and again["content"] == second["content"]  # greedy: the same context, the same answer


def test_in_a_terminal_ctrl_c_stops_the_model_and_its_answer_is_kept(template: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    process = TerminalProcess("chat", EXAMPLE, "--chat-template", template, "--seed", "7")
    try:
        process.expect("/help lists the commands, Ctrl-D leaves\n> ")
        process.type("/set ignore_eos=true\n")
        process.expect("seed=7, ignore_eos=true\n> ")
        process.type(f"{LONG[:600]}\n")
        process.expect(r"The whal\n")
        process.expect(r"[a-z]+ [a-z]+ [a-z]+")  # the answer has begun
        process.type("\x03")
        process.expect(r"\(stopped; Ctrl-C again, or Ctrl-D, leaves\)")
        process.type("/set max-new-tokens=2\n/set temperature=-1\n")
        process.expect("npuq: temperature -1 is not valid")
        process.type("And then?\n")
        process.expect("reached its limit of tokens")
        process.type(f"/stats\n/save {saved}\n")
        cached = process.expect(r"([0-9]+) of them from the prefix cache")
        assert not cached.endswith(" 0 of them from the prefix cache")
        process.expect("saved 4 messages[^>]*> ")
        time.sleep(0.5)  # Python loses a signal between the prompt and its wait for a key, until there is one
        process.type("\x03")
        process.expect("Ctrl-C again")
        process.type("\x03")
        assert process.wait() == 130
        assert process.shown.endswith("npuq: error:\x1b[0m interrupted\n") and "Traceback" not in process.shown
    finally:
        process.kill()
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert len(messages[1]["content"]) > 10


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ((), 1, "has no chat template; give one with --chat-template FILE"),
        (("--chat-template", "{template}", "--temperature", "1", "--greedy"), 2, "contradict"),
        (("--chat-template", "{template}", "--min-tokens", "5", "--max-new-tokens", "2"), 2, "min_tokens 5"),
        (("--chat-template", "{template}", "--api-key-file", "{template}"), 2, "not for a model in this process"),
        (("--chat-template", "{template}", "--system", LONG * 20), 1, "/undo takes the last question back"),
    ],
)
def test_refusals_are_one_line(arguments, code: int, expected: str, template: Path) -> None:
    given = [each.replace("{template}", str(template)) for each in arguments]
    done = warm.run("chat", EXAMPLE, *given, "--quiet", input="Hi\n")
    assert done.returncode == code and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("npuq: error: ") or code == 2
    assert expected in done.stderr.splitlines()[-1]


def test_ranks_are_refused(template: Path) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = warm.run("chat", EXAMPLE, env={**environment, "PATH": "/usr/bin"}, input="")
    assert done.returncode == 1 and "npuq chat runs in one process" in done.stderr
