"""Paths that the documentation names are there: links of every page, and every path in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from npuq.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_PATH = re.compile(r"`([A-Za-z_.][\w.-]*(?:/[\w.-]+)*/?)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_named_paths_exist(name: str) -> None:
    """What looks like a path (it has a slash, or ends in .py, .c or .h) is one."""
    named = set(_PATH.findall((ROOT / name).read_text(encoding="utf-8")))
    paths = {path for path in named if "/" in path or path.endswith((".py", ".c", ".h"))}
    assert paths
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_the_page_of_models_has_every_family() -> None:
    """In both tables: what it is, and what was run."""
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    families, run = text.split("## What was run, and how")
    for part in (families.split("## Families")[1].split("\n#")[0], run):
        assert re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) == sorted(FAMILIES)


def test_the_page_of_models_has_every_source_format() -> None:
    """Each file of formats/sources/ that opening.py asks for weights."""
    tree = ast.parse((ROOT / "formats/sources/opening.py").read_text(encoding="utf-8"))
    asked = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module != "weights"
    }
    named = re.findall(r"\.\./formats/sources/(\w+)\.py", (ROOT / "docs/models.md").read_text(encoding="utf-8"))
    assert asked and set(named) == asked


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "models.md"], ids=lambda page: page.name)
def test_families_are_listed_in_one_place(page: Path) -> None:
    """Other pages name a family where they speak of it, and do not list all."""
    text = page.read_text(encoding="utf-8")
    assert any(f"`{name}`" not in text for name in FAMILIES)


def test_every_page_is_in_the_index() -> None:
    linked = _LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"} <= set(linked)
