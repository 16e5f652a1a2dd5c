"""Completion by the shell, as docs/command-line.md sets it up: bash completes, zsh and fish get their scripts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/command-line.md"
PROGRAM = "import sys; from npuq.cli.main import main; sys.argv[0] = 'npuq'; main()"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH on which `npuq` is this one."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "npuq").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m npuq "$@"\n')
    (folder / "npuq").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def completed(words: str, path: str) -> list[str]:
    """What bash offers for the line, whose last word is begun."""
    setup = re.search(r"^eval .*bash_source.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert setup is not None
    script = (
        f"{setup[0]}\n"
        f'COMP_WORDS=({words}); [[ "{words}" == *" " ]] && COMP_WORDS+=("")\n'
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n"
        '_npuq_completion npuq; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=120
    )
    assert done.stderr == "" or "compopt" in done.stderr  # outside a completion bash has no options for it
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("npuq ge", ["generate"]),
        ("npuq convert --me", ["--method"]),
        ("npuq convert --method r", ["rotate", "rotate+smooth+gptq"]),
        ("npuq verify x --as qwen3", ["qwen3_moe"]),
        ("npuq push x user/y --hub m", ["modelscope"]),
    ],
)
def test_bash_completes(words: str, offered: list[str], path: str) -> None:
    assert completed(words, path) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells(shell: str) -> None:
    assert f"_NPUQ_COMPLETE={shell}_source npuq" in PAGE.read_text(encoding="utf-8")
    environment = {**os.environ, "_NPUQ_COMPLETE": f"{shell}_source"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and f"_NPUQ_COMPLETE={shell}_complete" in done.stdout and done.stderr == ""
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True, timeout=60)
