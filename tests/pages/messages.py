"""The messages that the code can print, as patterns: literal text, with … for what differs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NOT_OURS = {"tests", "benchmarks", "build", "dist", "examples", "release", "site", "setup.py"}


def sources() -> list[Path]:
    """The package's Python files."""
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return [ROOT / path for path in found if path.parts[0] not in _NOT_OURS and not path.parts[0].startswith(".")]


def texts_of(path: Path) -> Iterator[str]:
    """The texts of a file, joined where Python joins them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
            text = pattern(node)
            if text.strip("… "):
                yield text


def pattern(node: ast.AST) -> str:
    """The literal parts of an expression of text; … for each other part."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(each) if isinstance(each, ast.Constant) else "…" for each in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pattern(node.left) + pattern(node.right)
    return "…"
