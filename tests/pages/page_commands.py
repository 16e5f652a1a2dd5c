"""The commands that the pages and the help of npuq show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from npuq.cli.examples import EXAMPLES

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
_BLOCK = re.compile(r"^```(bash|console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown() -> dict[str, list[str]]:
    """Each command, and the pages that show it."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for command in commands_of(page.read_text(encoding="utf-8")):
            found.setdefault(command, []).append(page.name)
    for name, examples in EXAMPLES.items():
        for command in examples:
            found.setdefault(command, []).append(f"npuq {name} --help")
    return found


def commands_of(text: str) -> Iterator[str]:
    """The commands in a page's blocks of bash, and behind `$ ` in its blocks of a console; without comments."""
    for kind, block in _BLOCK.findall(text):
        lines = block.replace("\\\n", " ").splitlines()
        if kind == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in lines:
            command = " ".join(re.sub(r"(^|\s+)# .*$", "", line).split())
            if command:
                yield command
