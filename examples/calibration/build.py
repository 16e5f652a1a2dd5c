"""Builds convert/calibrate/builtin.jsonl, the text behind `--calibration builtin`; the same bytes every time.

    python examples/calibration/build.py PACKAGES [-o convert/calibrate/builtin.jsonl]

PACKAGES is a directory with the published archives of `ARCHIVES` (docs/calibration-data.md says where each comes from
and why its text may be shipped). Our own code and documentation are read from this repository at a fixed commit (by the
paths of that commit, some of which have moved since), our own writing from written/, and the worked mathematics is
generated. Documents of the categories take turns, so that every part of the file is as mixed as the whole of it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mathematics import problems

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COMMIT = "a505f1b"
DOCUMENT_BYTES = 5_000
AUSTEN, OPTICKS, CANTERBURY, CHINESE = "austen", "opticks", "canterbury", "chinese"
ARCHIVES = {
    AUSTEN: ("r-cran-janeaustenr_1.0.0-1_all.deb", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"),
    OPTICKS: ("golang-1.19-src_1.19.8-2_all.deb", "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a"),
    CANTERBURY: ("brotli-1.2.1.tar.gz", "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de"),
    CHINESE: ("chinese-poetry-2.0.1.tgz", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86"),
}


@dataclass(frozen=True)
class Document:
    category: str
    source: str
    text: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "convert" / "calibrate" / "builtin.jsonl")
    arguments = parser.parse_args()
    archives = {name: _archive(arguments.packages, *ARCHIVES[name]) for name in ARCHIVES}
    found = [*english(archives), *code(), *mathematics(), *chinese(archives[CHINESE]), *chat()]
    documents = _take_turns(_unique(found))
    lines = [json.dumps(vars(document), ensure_ascii=False) for document in documents]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for category in sorted({document.category for document in documents}):
        sizes = [len(document.text.encode()) for document in documents if document.category == category]
        print(f"{category:12} {len(sizes):4} documents {sum(sizes):8,} bytes", file=sys.stderr)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes", file=sys.stderr)


def english(archives: dict[str, bytes]) -> Iterator[Document]:
    for title, text in _austen_novels(_member(archives[AUSTEN], "data/Rdata.rdb")):
        yield from _excerpt("english", f"Jane Austen, {title}", _reflow(text), 9_000)
    canterbury = archives[CANTERBURY]
    alice = _after(_member(canterbury, "testdata/alice29.txt").decode(), "CHAPTER II\n")
    yield from _excerpt("english", "Lewis Carroll, Alice's Adventures in Wonderland", _reflow(alice), 13_000)
    play = _after(_member(canterbury, "testdata/asyoulik.txt").decode(), "ACT II\n")
    yield from _excerpt("english", "William Shakespeare, As You Like It", _verse(play), 7_000)
    opticks = _after(_member(archives[OPTICKS], "Isaac.Newton-Opticks.txt").decode(), "_PROP._ II. THEOR. II.\n")
    yield from _excerpt("english", "Isaac Newton, Opticks", _reflow(opticks.replace("_", "")), 14_000)
    for path in ("README.md", "docs/artifact.md", "docs/hub.md", "docs/ascend.md", "benchmarks/README.md"):
        yield from _excerpt("english", "npuq, documentation", _committed(path), 7_000)


def code() -> Iterator[Document]:
    for path, size in {
        "quant/optimal_scale.py": 12_000,
        "convert/journal.py": 6_000,
        "convert/shards.py": 6_000,
        "runtime/scheduler.py": 8_000,
        "runtime/block_manager.py": 5_000,
        "runtime/tokenizer.py": 5_000,
        "hub/window.py": 6_000,
        "cli/convert.py": 5_000,
        "tests/quant/test_int4.py": 4_000,
        "native/npuq.h": 4_000,
        "tests/run.sh": 3_000,
        "tests/environment.sh": 3_000,
        "pyproject.toml": 4_000,
        "native/attention.c": 6_000,
        "native/convert.c": 6_000,
        "native/level.c": 6_000,
        "native/levels.c": 6_000,
    }.items():
        yield from _excerpt("code", "npuq, source code", _committed(path), size)
    for text in _written("code.txt"):
        yield Document("code", "npuq, written for this set", text)


def mathematics() -> Iterator[Document]:
    stream = problems(seed=7)
    for _ in range(15):
        text = next(stream)
        while len(text.encode()) < DOCUMENT_BYTES:
            text += "\n\n" + next(stream)
        yield Document("mathematics", "npuq, worked problems, generated", text)
    for text in _written("mathematics.txt"):
        yield Document("mathematics", "npuq, written for this set", text)


def chinese(archive: bytes) -> Iterator[Document]:
    def book(path: str) -> object:
        return json.loads(_member(archive, f"dist/{path}.json"))

    for chapters, source, size in (
        (_chapters(book("lunyu/lunyu")), "论语", 9_000),
        (_chapters(book("sishuwujing/mengzi"))[0].split("\n"), "孟子", 8_000),
        (_chapters(book("mengxue/guwenguanzhi")), "古文观止", 18_000),
        (_chapters(book("mengxue/youxueqionglin")), "幼学琼林", 6_000),
        ([item["content"] for item in book("youmengying/youmengying")], "幽梦影", 5_000),  # type: ignore[attr-defined]
        (_chapters(book("mengxue/tangshisanbaishou")), "唐诗三百首", 10_000),
    ):
        yield from _excerpt("chinese", source, "\n\n".join(chapters), size)
    for text in _written("chinese.txt"):
        yield Document("chinese", "npuq, written for this set", text)


def chat() -> Iterator[Document]:
    for name in ("chat.txt", "chat_chinese.txt"):
        for text in _written(name):
            yield Document("chat", "npuq, written for this set", text)
    stream = problems(seed=8)
    for _ in range(12):
        turns = (next(stream).partition("\n") for _ in range(4))
        text = "\n\n".join(f"User: {question}\n\nAssistant: {answer}" for question, _, answer in turns)
        yield Document("chat", "npuq, worked problems, generated", text)


def _chapters(node: object) -> list[str]:
    """Every titled list of paragraphs below a node, its title and author first; editors' notes in brackets dropped."""
    if isinstance(node, list):
        return [text for child in node for text in _chapters(child)]
    if not isinstance(node, dict):
        return []
    if isinstance(paragraphs := node.get("paragraphs"), list) and all(isinstance(p, str) for p in paragraphs):
        author = str(node.get("author") or "").strip()
        head = f"《{node['chapter']}》" + (f" {author}" if author else "")
        body = "\n".join(re.sub(r"[（(][^（）()]*一作[^（）()]*[）)]", "", p) for p in paragraphs)
        return [f"{head}\n{body}"]
    return _chapters(node.get("content"))


def _austen_novels(database: bytes) -> Iterator[tuple[str, str]]:
    """The lines of each novel out of an R lazy-load database: zlib streams of serialized character vectors, each led by
    four bytes of length; a string is the flag word 0x00?00009, its length (big-endian), its bytes."""
    position = 0
    while position < len(database):
        stream = zlib.decompressobj()
        data = stream.decompress(database[position + 4 :])
        position = len(database) - len(stream.unused_data)
        lines, at = [], data.index(b"\x00\x00\x00\x10", 14) + 8
        while at + 8 <= len(data) and data[at + 3] == 9:
            size = int.from_bytes(data[at + 4 : at + 8], "big")
            lines.append(data[at + 8 : at + 8 + size].decode())
            at += 8 + size
        title = next(line for line in lines if line).title().replace(" And ", " and ")
        chapters = [number for number, line in enumerate(lines) if re.match(r"chapter", line, re.IGNORECASE)]
        yield title, "\n".join(lines[chapters[min(9, len(chapters) - 1)] :])


def _excerpt(category: str, source: str, text: str, size: int) -> Iterator[Document]:
    """Whole paragraphs from the beginning of a text, up to `size` bytes, in documents of about DOCUMENT_BYTES."""
    piece, used, taken = "", 0, 0
    for paragraph in re.split(r"\n{2,}", text.strip("\n")):
        grown = len(paragraph.encode()) + 2
        if taken + grown > size:
            break
        taken += grown
        if piece and used + grown > DOCUMENT_BYTES * 1.2:
            yield Document(category, source, piece)
            piece, used = "", 0
        piece += ("\n\n" if piece else "") + paragraph
        used += grown
    if piece:
        yield Document(category, source, piece)


def _reflow(text: str) -> str:
    """Paragraphs on one line each: the hard line ends of old e-texts are not part of the prose."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r", ""))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def _verse(text: str) -> str:
    lines = [line.rstrip().replace("\t", "  ") for line in text.replace("\r", "").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _after(text: str, mark: str) -> str:
    _, found, rest = text.replace("\r", "").partition(mark)
    if not found:
        raise SystemExit(f"no {mark!r} in a source text: is it another edition?")
    return rest


def _written(name: str) -> list[str]:
    return [part.strip("\n") for part in (HERE / "written" / name).read_text(encoding="utf-8").split("%%%%")]


def _unique(documents: list[Document]) -> list[Document]:
    return list({document.text: document for document in documents}.values())


def _take_turns(documents: list[Document]) -> list[Document]:
    """Categories spread evenly over the file: each document's place is its share of the bytes of its category."""
    placed: list[tuple[float, str, Document]] = []
    for category in sorted({document.category for document in documents}):
        mine = [document for document in documents if document.category == category]
        mine.sort(key=lambda document: hashlib.sha256(document.text.encode()).digest())
        total, before = sum(len(document.text) for document in mine), 0
        for document in mine:
            placed.append(((before + len(document.text) / 2) / total, category, document))
            before += len(document.text)
    return [document for _, _, document in sorted(placed, key=lambda item: item[:2])]


def _archive(folder: Path, name: str, sha256: str) -> bytes:
    path = folder / name
    if not path.is_file():
        raise SystemExit(f"{path}: missing; docs/calibration-data.md says where it comes from")
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise SystemExit(f"{path}: SHA-256 {found}, expected {sha256}")
    return data


def _member(archive: bytes, ending: str) -> bytes:
    """One file of a tar archive, or of the tar archive inside a Debian package."""
    if archive.startswith(b"!<arch>"):
        command = ["dpkg-deb", "--fsys-tarfile", "/dev/stdin"]
        archive = subprocess.run(command, input=archive, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.name.endswith(ending) and (file := tar.extractfile(member)) is not None:
                return file.read()
    raise SystemExit(f"no {ending} in the archive")


def _committed(path: str) -> str:
    """A file of this repository as it was in COMMIT, by the path that it had then."""
    command = ["git", "-C", str(ROOT), "show", f"{COMMIT}:{path}"]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode()


if __name__ == "__main__":
    main()
