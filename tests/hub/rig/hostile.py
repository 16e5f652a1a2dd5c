"""What could be a path, a hash or a size and must not be one; and whether anything outside was touched for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from audit import watched
from loopback import LoopbackHub
from loopback_state import regular
from support import REPO

from npuq.cli.main import main
from npuq.errors import NpuqError
from npuq.hub.transfer.retry import Backoff

Entry = Callable[[Path], object]


MARK = "npuq-hostile"  # in every path that a hostile value means


QUICK = Backoff(attempts=2, first_seconds=0.001, most_seconds=0.001)


HERE = object()


BIG = b"EVIL" * (5 << 18)


SIZES = [-1, 2**63, 10**50, 1e400, float("nan"), 1.5, "1", True, None, [1]]


_TARGETS = itertools.count()


def paths(victim: Path) -> list[Any]:
    """What could be a path and must not be one."""
    climbing = "../" * 30 + str(victim / MARK).lstrip("/")
    return [
        climbing,
        f"a/{climbing}",
        str(victim / MARK),
        f"../{MARK}",
        f"..\\{MARK}",
        f"C:\\{MARK}",
        f"a/../../{MARK}",
        f"./{MARK}",
        f"{MARK}/",
        f"{MARK}//x",
        f"{MARK}\0",
        f"\x1b[31m{MARK}",
        f"{MARK}\n",
        f"{MARK}\u202etxt",
        "\ud800",
        MARK * 40,
        "/".join([MARK] * 100),
        "",
        ".",
        "..",
        None,
        7,
        ["a"],
        {"a": 1},
    ]


def hashes(victim: Path) -> list[Any]:
    return [*paths(victim), "0" * 63, "0" * 65, "A" * 64, "0" * 40 + "\n", "١" * 64]


def run_all(entries: dict[str, Entry], allowed: Path, victim: Path) -> None:
    """Run every entry point; see what is raised, and which paths are touched."""
    mine = victim / f"{MARK}.npuq-part"
    mine.write_bytes(b"the user's own")
    for name, run in entries.items():
        target = allowed / f"target-{next(_TARGETS)}"
        with watched() as watch:
            try:
                run(target)
            except NpuqError as error:
                check_line(str(error))
        assert not watch.outside(allowed), name
        assert not watch.read_outside(MARK, allowed), name
    assert mine.read_bytes() == b"the user's own"
    assert [path.name for path in victim.iterdir()] == [mine.name]


def check_line(text: str) -> None:
    assert text.isprintable(), repr(text)
    assert len(text) < 1000, text


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`npuq …` in this process, where the audit hook sees it."""
    monkeypatch.setattr("sys.argv", ["npuq", *map(str, arguments)])
    with suppress(SystemExit):
        main()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    for line in (*printed.err.splitlines(), *printed.out.splitlines()):
        check_line(line)


def changed(route: str, change: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    """A hub that answers as `change` has it, where the request contains the regular expression."""
    import re

    return lambda request, answer: change(answer) if re.search(route, request) else answer


def with_end(value: Any, end: str) -> Any:
    return value + end if isinstance(value, str) else value


def put(item: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    outer, _, inner = place.partition(".")
    if not inner:
        return {**item, outer: value}
    return {**item, outer: {**item[outer], inner: value}} if outer in item else item


def place(hub: LoopbackHub, name: str, content: str, others: dict[str, bytes]) -> None:
    """Commit a file and ordinary files beside it, whatever their names are."""
    repo = hub.state.repos[REPO]
    files = dict(repo.commit("main").files)
    repo.add_commit(
        "main",
        "placed",
        {**files, name: regular(content.encode()), **{key: regular(value) for key, value in others.items()}},
    )
