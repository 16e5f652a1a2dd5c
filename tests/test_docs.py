"""Paths that the documentation names are there: links of every page, and every path in docs/architecture.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
