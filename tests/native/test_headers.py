"""Headers of the native library: each compiles alone, none includes itself, and conversion does not need inference."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

from .builds import COMPILER, ROOT, load_setup

NATIVE = ROOT / "native"
FILES = {path.relative_to(NATIVE).as_posix(): path for path in sorted(NATIVE.rglob("*.[ch]"))}
HEADERS = [name for name in FILES if name.endswith(".h")]
# What each folder may include, beside itself and npuq.h; level.c, which puts the tables together, includes all.
OTHERS = ("calibrate", "convert", "inference")
MAY_INCLUDE = {"common": set(), **{folder: {"common"} for folder in OTHERS}}


def _includes(name: str) -> list[str]:
    return re.findall(r'^#include "(.+)"$', FILES[name].read_text(encoding="utf-8"), re.MULTILINE)


def _is_in_cycle(name: str) -> bool:
    waiting, seen = _includes(name), set()
    while waiting:
        header = waiting.pop()
        if header not in seen:
            seen.add(header)
            waiting += _includes(header)
    return name in seen


@pytest.mark.parametrize("name", FILES)
def test_includes_are_written_from_the_root_and_exist(name: str) -> None:
    assert [header for header in _includes(name) if header not in FILES] == []


@pytest.mark.parametrize("name", HEADERS)
def test_no_header_includes_itself(name: str) -> None:
    assert not _is_in_cycle(name)


@pytest.mark.parametrize("name", [name for name in FILES if "/" in name and name != "common/level.c"])
def test_the_other_folders_include_the_common_one_alone(name: str) -> None:
    room = name.split("/")[0]
    others = {header.split("/")[0] for header in _includes(name)} - {room, "npuq.h"}
    assert others <= MAY_INCLUDE[room]


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_says_what_it_is_in_its_first_line_and_has_its_own_guard(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    assert re.match(r"/\* [A-Z\d].{20,}|/\* int[48] ", text)
    guard = ("NPUQ_" + name.replace("/", "_").replace(".", "_")).upper() if name != "npuq.h" else "NPUQ_H"
    assert f"#ifndef {guard}\n#define {guard}\n" in text


@pytest.mark.skipif(COMPILER is None, reason="gcc is not installed")
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_compiles_alone_at_every_level(name: str, tmp_path: Path) -> None:
    setup = load_setup()
    source = tmp_path / "alone.c"
    source.write_text(f'#include "{name}"\n#include "{name}"\n')
    for level, flags in setup.LEVELS.get(platform.machine(), {"portable": []}).items():
        options = [*setup.FLAGS, "-Werror", "-Wno-unused-function", "-Wno-psabi", f"-DNPUQ_LEVEL_NAME={level}", *flags]
        command = [str(COMPILER), *options, "-O0", "-I", str(NATIVE), "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{level}: {done.stderr}"


def test_folders_stay_small() -> None:
    for folder in {path.parent for path in FILES.values()}:
        assert len([path for path in folder.iterdir() if path.suffix in (".c", ".h")]) <= 14
