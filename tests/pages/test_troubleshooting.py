"""The page of troubleshooting has messages that the code really has, and speaks of every kind of error."""

from __future__ import annotations

import re

import pytest
from messages import ROOT, sources, texts_of

from npuq import errors

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
OURS = PAGE.split("\n## Engines\n")[0]
ENTRIES = re.findall(r"^\| `([^`]+)` \|", OURS, re.MULTILINE)


@pytest.fixture(scope="module")
def texts() -> dict[str, set[str]]:
    """Text → the errors named in the file that has it."""
    found: dict[str, set[str]] = {}
    for path in sources():
        named = set(re.findall(r"\b\w+Error\b", path.read_text(encoding="utf-8")))
        for text in texts_of(path):
            found.setdefault(text, set()).update(named)
    return found


def parts_are_in(entry: str, text: str) -> bool:
    """True where the literal parts of an entry stand in the text, in their order."""
    place = 0
    for part in filter(None, (part.strip() for part in entry.split("…"))):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_every_message_of_the_page_is_one_of_the_code(texts: dict[str, set[str]]) -> None:
    assert len(ENTRIES) > 40
    assert [entry for entry in ENTRIES if not any(parts_are_in(entry, text) for text in texts)] == []


def test_an_entry_that_the_code_does_not_have_is_told(texts: dict[str, set[str]]) -> None:
    assert not any(parts_are_in("…: no such file or folder at …", text) for text in texts)


def test_every_kind_of_error_has_an_entry(texts: dict[str, set[str]]) -> None:
    kinds = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.NpuqError)
    }
    told = set().union(*(names for text, names in texts.items() if any(parts_are_in(entry, text) for entry in ENTRIES)))
    assert kinds - told - {"NpuqError"} == set()


def test_links_lead_to_headings() -> None:
    """Of all pages: a link into a page names a heading of it."""
    missing = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
            other = page if not target else page.parent / target
            if (
                "://" not in target
                and other.suffix == ".md"
                and anchor not in anchors(other.read_text(encoding="utf-8"))
            ):
                missing.append((page.name, target, anchor))
    assert missing == []


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}
