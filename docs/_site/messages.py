"""The messages that the code can print, as patterns: literal text, with … for what differs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NOT_OURS = {"tests", "benchmarks", "build", "dist", "docs", "examples", "release", "setup.py"}
# Errors that a caller of the code meets, and no user of the command line.
_PYTHONS = {"ValueError", "AssertionError", "TypeError", "KeyError", "RuntimeError", "OSError", "NotImplementedError"}


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


def raised() -> dict[str, list[tuple[str, str]]]:
    """Kind of error → (message, file) of each place that raises one with a text of its own, sorted."""
    found: dict[str, set[tuple[str, str]]] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                name = ast.unparse(node.exc.func)
                text = pattern(node.exc.args[0])
                if name.endswith("Error") and name not in _PYTHONS and len(text.strip("…: ")) > 3:
                    found.setdefault(name, set()).add((text, str(path.relative_to(ROOT))))
    return {name: sorted(found[name]) for name in sorted(found)}
