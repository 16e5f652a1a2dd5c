"""Every command that a page or a help shows is run here, by another test, or is listed with the reason why not.

Here `DeepSeek-V3` is the small model of examples/, with a chat template; the hub is one on the loopback interface.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from page_commands import ROOT, shown

sys.path.insert(0, str(ROOT / "tests/hub/rig"))
sys.path.insert(0, str(ROOT / "tests/foreign"))
import foreign
from loopback import LoopbackHub
from loopback_state import State, User

# Pattern of commands → the test that runs them, if with other sizes.
ELSEWHERE = {
    r"bash examples/quickstart\.sh|bash tests/(run|typecheck)\.sh.*|bash \.ci/run": ".ci/run",
    r".*tests/fuzz/\w+\.py .*": "tests/fuzz/test_commands.py",
    r"npuq convert .*--method (auto|rotate\+smooth\+gptq).*": "tests/convert/calibrate",
    r"npuq (generate|evaluate) OUT .*--kv-cache-dtype int8": "tests/runtime/test_int8_cache.py",
    r"npuq (push|pull) .*--hub modelscope": "tests/hub/test_modelscope.py",
    r"(torchrun .*-m )npuq (generate|evaluate|serve) .*": "tests/ranks/test_commands.py",
    r"torchrun .*-m npuq convert .*|(NODE=.* )?bash examples/convert(\.slurm|_torchrun\.sh) .*": "tests/convert/ranks",
    r"npuq convert .*--(shard-of|finish|ranks) .*": "tests/convert/ranks",
    r".*tests/convert/ranks/killing_ranks\.py .*|bash tests/convert/ranks/two_hosts\.sh .*": "tests/convert/ranks",
    r"npuq (generate|evaluate) DeepSeek-V4-Flash-w4a8 .*": "tests/runtime/test_deepseek_v4.py",
    r"npuq serve .*|curl http://127\.0\.0\.1:8000/.*": "tests/serve/test_command.py",
    r"npuq chat http.*": "tests/cli/test_chat_server.py",
    r"npuq chat (?!.*< ).*": "tests/cli/test_chat.py",
    r"npuq doctor --selftest": "tests/ascend/test_doctor.py",
    r"npuq doctor --bench": "tests/runtime/diagnostics/test_bench.py",
    r"npuq doctor --tune .*": "tests/ascend/tuning",
    r'eval "\$\(_NPUQ_COMPLETE=.*|_NPUQ_COMPLETE=.*': "tests/cli/test_completion.py",
    r"(HF_ENDPOINT=.*)?python examples/\w+\.py .*": "tests/pages/test_examples.py",
    r"python tests/hub/rig/loopback\.py .*": "tests/pages/test_examples.py",
}
# … → why they cannot be run here.
NOT_HERE = {
    r"(.*-m )?pip (install|download) .*|python3 -m venv .*": "installs; release/try_wheels.sh installs a wheel",
    r"(apt-get download|npm pack) .*": "fetches the sources of built-in texts",
    r"(python -m sglang\.launch_server|vllm serve) .*": "needs an engine and NPUs; tests/engines has their loaders",
    r"npuq generate .* --backend ascend .*|source /usr/local/Ascend/.*": "needs an NPU and CANN",
    r"python benchmarks/.*": "a measurement, of minutes to hours",
    r"docker run .*|OPENAI_API_BASE=.* aider .*": "another project's client",
    r"npuq evaluate .* --tasks .*|lm_eval .*|.*/check_(lm_eval|tasks)\.py .*": "needs lm-evaluation-harness",
    r"python -m twine .*|bash release/.*\.sh.*|git tag .*|python release/.*": "part of a release",
}
# Commands that end otherwise with so small a model.
STATUS = {r"npuq verify .* --engine vllm-ascend --tp 8 --ep": (1, "8 ranks cannot share 4 attention heads")}

RUN = [command for command in shown() if not any(re.fullmatch(known, command) for known in (*ELSEWHERE, *NOT_HERE))]
TEXT = "The state of the Union is strong, and the whale swims in the deep sea. " * 12


def test_every_command_is_run_somewhere_or_has_a_reason() -> None:
    """What is no command of npuq's has to be in a table, and every line of the tables has a command."""
    assert [command for command in RUN if not command.startswith("npuq ")] == []
    assert [place for place in ELSEWHERE.values() if not (ROOT / place).exists()] == []
    unused = [known for known in (*ELSEWHERE, *STATUS) if not any(re.fullmatch(known, command) for command in shown())]
    assert unused == []


class Sandbox:
    """A directory in which the names of the pages exist."""

    def __init__(self, folder: Path, endpoint: str):
        self.folder = folder
        self._made = folder / "made"
        self._environment = {
            "HF_ENDPOINT": endpoint,
            "HF_TOKEN": "hf_user",
            "HF_HOME": str(folder / "hf"),
        }
        source = shutil.copytree(ROOT / "examples/tiny-deepseek-v3-fp8", folder / "DeepSeek-V3")
        shutil.copy(ROOT / "examples/chat.jinja", source / "chat_template.jinja")
        shutil.copy(source / "config.json", folder)
        for name in ("SOURCE", "examples"):
            (folder / name).symlink_to(source if name == "SOURCE" else ROOT / "examples")
        messages = [{"role": "user", "content": "Who is Ishmael?"}]
        for name in ("eval.txt", "held-out.txt", "question.txt", "questions.txt"):
            (folder / name).write_text(TEXT if name in ("eval.txt", "held-out.txt") else "Who is Ishmael?\n")
        (folder / "conversation.json").write_text(json.dumps(messages))
        (folder / "prompts.jsonl").write_text('"The river"\n{"prompt": "In the beginning"}\n')
        assert self.shell("npuq convert DeepSeek-V3 made --method minmax --quiet")[0] == 0
        floats = foreign.write_float(source, folder / "float")
        foreign.write_modelslim(floats, folder / "DeepSeek-V3-modelslim")

    def run(self, command: str) -> tuple[int, str]:
        """(status, output) of a command; what it reads is there, what it writes is not."""
        words = shlex.split(command)
        for name in ("DeepSeek-V3-w4a8", "DeepSeek-R1-w4a8", "OUT", "out", "here"):
            path, writes = self.folder / name, words[-1].endswith(name) or ("convert" in words and name in command)
            if (writes and {"convert", "pull"} & set(words)) or name in ("out", "here"):
                shutil.rmtree(path, ignore_errors=True)
            elif name in command and not (path / "npuq/manifest.json").exists():
                shutil.rmtree(path, ignore_errors=True)
                shutil.copytree(self._made, path)
        return self.shell(command)

    def shell(self, line: str) -> tuple[int, str]:
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in self._environment.items())
        done = warm.shell(f"cd {shlex.quote(str(self.folder))}; export {settings}; {line}")
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    objects = tmp_path_factory.mktemp("objects")
    server = LoopbackHub(objects).start()
    server.state = State(objects)
    server.state.users["hf_user"] = User("user")
    place = Sandbox(tmp_path_factory.mktemp("pages"), server.endpoint)
    for repo in ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"):
        server.state.put(repo, _files(place.folder / "DeepSeek-V3"))
    for repo in ("user/DeepSeek-V3-w4a8", "user/DeepSeek-R1-w4a8"):
        commit = server.state.put(repo, _files(place.folder / "made"))
        server.state.repos[repo].tags["v1"] = commit.sha
    yield place
    server.stop()


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "kind", ["convert|verify|inspect", "push|pull", "generate|chat|evaluate", "report|doctor|--version"]
)
def test_commands_run(kind: str, sandbox: Sandbox) -> None:
    commands = [
        command
        for command in RUN
        if re.match(rf"npuq (--log-file \S+ )?({kind})\b", command) or re.match(rf"npuq ({kind})$", command)
    ]
    assert commands
    failed = []
    # The same command about another release runs once: both names mean the small model here.
    for command in {command.replace("DeepSeek-R1", "DeepSeek-V3"): command for command in commands}.values():
        expected = next((status for known, (status, _) in STATUS.items() if re.fullmatch(known, command)), 0)
        status, output = sandbox.run(command)
        if status != expected:
            failed.append((command, status, output[-600:]))
    assert failed == []


def test_no_command_is_left_out() -> None:
    kinds = "convert|verify|inspect|push|pull|generate|chat|evaluate|report|doctor"
    left = [command for command in RUN if not re.match(rf"npuq (--log-file \S+ )?({kinds}|--version)", command)]
    assert left == []
