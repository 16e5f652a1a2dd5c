"""Agreement of version, changelog and tag."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("release_check", ROOT / "release" / "check.py")
assert _spec is not None
assert _spec.loader is not None
check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check)


@pytest.mark.parametrize(
    ("version", "heading", "tags", "said"),
    [
        ("0.2.0.dev0", "0.2.0 (unreleased)", [], None),
        ("0.2.0", "0.2.0 (1 December 2026)", ["v0.2.0"], None),
        ("0.2.0", "0.2.0 (1 December 2026)", [], None),
        ("0.2.0", "0.2.0 (unreleased)", [], r"says \(unreleased\)"),
        ("0.2.0.dev0", "0.2.0 (1 December 2026)", [], r"says \(1 December 2026\)"),
        ("0.3.0", "0.2.0 (1 December 2026)", [], "begins with 0.2.0"),
        ("0.2.0", "0.2.0 (1 December 2026)", ["v0.2.1"], "tag v0.2.1"),
    ],
)
def test_contradictions(tmp_path: Path, version: str, heading: str, tags: list[str], said: str | None) -> None:
    (tmp_path / "__init__.py").write_text(f'"""npuq."""\n\n__version__ = "{version}"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n- Something.\n\n## 0.1.0 (2025)\n")
    found = check.problems(tmp_path, tags)
    if said is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.search(said, found[0])


def test_this_checkout_agrees() -> None:
    assert check.problems(ROOT, []) == []
