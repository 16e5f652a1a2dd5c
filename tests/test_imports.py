"""Which rooms may import which: the arrows between packages point one way, those of lazy imports too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What every room may import. Of these, each may import those before it.
FLOOR = ("errors", "units", "choices", "progress", "inputs", "deferred", "dtypes", "parallel")
# Room → the other rooms that it may import.
ALLOWED: dict[str, set[str]] = {
    "quant": set(),
    "models": set(),
    "native": {"quant"},
    "formats": {"models", "quant", "native"},
    "recipes": {"formats", "models", "quant"},
    "engines": {"recipes", "formats", "models"},
    # A name on a hub is resolved when a model is loaded.
    "runtime": {"hub", "formats", "models", "native", "quant"},
    "convert": {"runtime", "engines", "recipes", "formats", "models", "native", "quant"},
    # An evaluation's record is the runtime's.
    "verification": {"runtime", "engines", "recipes", "formats", "models", "native", "quant"},
    "hub": {"formats"},
    "serve": {"runtime"},
    "report": {"verification", "formats", "models"},
    "cli": {
        "serve",
        "convert",
        "verification",
        "report",
        "hub",
        "runtime",
        "engines",
        "recipes",
        "formats",
        "models",
        "native",
    },
}
# The package itself: its `__init__`, which imports what it offers when that is asked for, and its version.
PACKAGE = "npuq"
# Arrows that are wrong still: (file, room). Delete a line when its arrow is turned.
EXCEPTIONS: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Import:
    """One import of a module of ours: the file it stands in, and the room or module at the root that it names."""

    file: str
    line: int
    room: str
    target: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.room} imports {self.target}"


def production_files() -> Iterator[Path]:
    for folder in [ROOT, *(path.parent for path in ROOT.glob("*/__init__.py"))]:
        files = folder.glob("*.py") if folder == ROOT else folder.rglob("*.py")
        yield from (path for path in files if path.name != "setup.py" and path.relative_to(ROOT).parts[0] != "tests")


def imports_of(path: Path, text: str) -> Iterator[Import]:
    """Every import in a file, wherever it stands, of something of ours outside the file's own room."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package, room = list(parts[:-1]), PACKAGE if parts[0].startswith("__") else parts[0]
    for node in ast.walk(ast.parse(text)):
        targets: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            targets = [base[0]] if base else [_at_root(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            inner = node.module.split(".")[1:]
            targets = inner[:1] or [_at_root(alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            targets = [name[1] if len(name) > 1 else PACKAGE for name in names if name[0] == PACKAGE]
        for target in targets:
            if target != room:
                yield Import(str(path.relative_to(ROOT)), node.lineno, room, target)


def _at_root(name: str) -> str:
    """`from .. import errors` names a module or room; `from .. import __version__` the package."""
    return name if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists() else PACKAGE


def is_allowed(found: Import) -> bool:
    if found.room == PACKAGE or found.target == PACKAGE:
        return True
    if found.room in FLOOR:
        return found.target in FLOOR[: FLOOR.index(found.room)]
    return found.target in FLOOR or found.target in ALLOWED[found.room]


def wrong_arrows(files: dict[Path, str]) -> list[str]:
    found = [each for path, text in files.items() for each in imports_of(path, text)]
    return [str(each) for each in found if not is_allowed(each) and (each.file, each.target) not in EXCEPTIONS]


@pytest.fixture(scope="module")
def files() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in production_files()}


def test_every_arrow_points_down(files: dict[Path, str]) -> None:
    assert wrong_arrows(files) == []


def test_every_room_has_a_line_in_the_table(files: dict[Path, str]) -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in files if path.parent != ROOT}
    modules = {path.stem for path in files if path.parent == ROOT and not path.stem.startswith("__")}
    assert rooms | modules == ALLOWED.keys() | set(FLOOR)


def test_the_table_has_no_circle() -> None:
    """Every room can be put below those that import it."""
    left = {room: set(below) for room, below in ALLOWED.items()}
    while left:
        lowest = {room for room, below in left.items() if not below & left.keys()}
        assert lowest, f"a circle among {sorted(left)}"
        for room in lowest:
            del left[room]


def test_exceptions_are_still_needed(files: dict[Path, str]) -> None:
    arrows = {(each.file, each.target) for path, text in files.items() for each in imports_of(path, text)}
    assert arrows >= EXCEPTIONS


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("formats/checkpoint.py", "from ..convert.write.journal import Journal"),
        ("engines/requirements.py", "from ..convert import convert_checkpoint"),
        ("verification/verdict.py", "def lazily():\n    from ..convert.plan.plan import Plan"),
        ("quant/scales.py", "from ..formats.schemes import Scheme"),
        ("models/config.py", "from .. import formats"),
        ("runtime/engine.py", "import npuq.convert.conversion"),
        ("inputs/files.py", "from npuq.parallel import pool"),
        ("convert/write/journal.py", "if TYPE_CHECKING:\n    from ...verification.verdict import Verdict"),
    ],
)
def test_an_arrow_that_is_turned_round_is_found(file: str, line: str, files: dict[Path, str]) -> None:
    path = ROOT / file
    assert len(wrong_arrows({path: f"{files[path]}\n\n{line}\n"})) == 1
