"""The text behind `--calibration builtin`: readable, mixed, and nothing in it without a stated origin."""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BUILTIN = ROOT / "convert" / "calibrate" / "builtin.jsonl"
SHARES = {"english": 0.30, "mathematics": 0.22, "code": 0.20, "chinese": 0.18, "chat": 0.08}


@pytest.fixture(scope="module")
def documents() -> list[dict[str, str]]:
    return [json.loads(line) for line in BUILTIN.read_text(encoding="utf-8").splitlines()]


def test_every_line_is_a_document_of_readable_text(documents: list[dict[str, str]]) -> None:
    for document in documents:
        assert set(document) == {"category", "source", "text"}
        text = document["text"]
        assert text.strip() and text == text.strip("\n")
        assert not re.search("[\ufffd\x00-\x08\x0b-\x1f\x7f]", text), document["source"]
    assert len({document["text"] for document in documents}) == len(documents)


def test_categories_have_their_share_everywhere_in_the_file(documents: list[dict[str, str]]) -> None:
    """Few samples take the file in strides: every quarter of it must hold every category."""
    for share in range(4):
        part = documents[len(documents) * share // 4 : len(documents) * (share + 1) // 4]
        assert {document["category"] for document in part} == set(SHARES)
    sizes = Counter[str]()
    for document in documents:
        sizes[document["category"]] += len(document["text"].encode())
    total = sum(sizes.values())
    assert 300_000 < total < 500_000
    for category, share in SHARES.items():
        assert sizes[category] / total == pytest.approx(share, abs=0.03), category


def test_every_source_has_its_licence_in_the_documentation(documents: list[dict[str, str]]) -> None:
    text = (ROOT / "docs" / "calibration-data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text.partition("## Sources")[2], re.MULTILINE)
    licences = {source.strip(): licence.strip() for source, _, licence in rows}
    for source in {document["source"] for document in documents}:
        assert licences[source].startswith(("public domain", "Apache-2.0")), source
    assert set(licences) - {"source", "---"} == {document["source"] for document in documents}


def test_nothing_of_a_publisher_s_boilerplate_and_no_addresses(documents: list[dict[str, str]]) -> None:
    for document in documents:
        found = re.findall(r"gutenberg|e-?text\b|proofread|[\w.]+@[\w-]+\.\w+", document["text"], re.IGNORECASE)
        assert not found, (document["source"], found)


def test_the_evaluation_text_is_not_in_it(documents: list[dict[str, str]]) -> None:
    def phrases(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[at : at + 8]) for at in range(len(words) - 7)}

    held_out = phrases((ROOT / "examples" / "eval.txt").read_text(encoding="utf-8"))
    for document in documents:
        assert not held_out & phrases(document["text"]), document["source"]


def test_generated_mathematics_is_the_same_for_a_seed(
    documents: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "calibration"))
    import mathematics

    made = list(islice(mathematics.problems(7), 200))
    assert made == list(islice(mathematics.problems(7), 200))
    generated = "".join(d["text"] for d in documents if d["source"] == "npuq, worked problems, generated")
    assert all(problem in generated for problem in made)
    del sys.modules["mathematics"]


def test_worked_sums_come_out(documents: list[dict[str, str]]) -> None:
    """Every `a = b * c + d` that the generator wrote (divisions, Euclid, bases) is true."""
    checked = 0
    for document in documents:
        if document["source"].startswith("npuq, worked problems"):
            for a, b, c, d in re.findall(r"^(\d+) = (\d+) \* (\d+) \+ (\d+)\b", document["text"], re.MULTILINE):
                assert int(a) == int(b) * int(c) + int(d)
                checked += 1
    assert checked > 150


def test_our_own_code_is_read_again_as_it_was(documents: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder names files of one commit by the paths that they had then, wherever they have moved since."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "calibration"))
    import build

    shown = ["git", "-C", str(ROOT), "cat-file", "-e", f"{build.COMMIT}^{{commit}}"]
    if subprocess.run(shown, capture_output=True, check=False).returncode:
        pytest.skip("not a clone with npuq's history")
    assert {d["text"] for d in documents if d["category"] == "code"} == {d.text for d in build.code()}
    del sys.modules["build"], sys.modules["mathematics"]
