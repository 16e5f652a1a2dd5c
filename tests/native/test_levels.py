"""The instruction sets that are used, against those that Linux reports of this machine."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from npuq.native.library import levels, library, new_pool

# What Linux calls the instructions that setup.py compiles a level with, worst level first.
NEEDED = {
    "x86_64": {
        "portable": "",
        "avx2": "avx avx2 fma f16c",
        "avx512vnni": "avx avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni",
        "avx512bf16": "avx avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16",
    },
    "aarch64": {"portable": "", "neon_dotprod": "asimddp", "neon_i8mm": "asimddp i8mm"},
}
SHA256 = {"x86_64": "sse4_1 sha_ni", "aarch64": "sha2"}

pytestmark = pytest.mark.skipif(
    library() is None or sys.platform != "linux" or platform.machine() not in NEEDED,
    reason="no library, or no list of a processor's instructions here",
)


def has(instructions: str) -> bool:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(("flags", "Features")))
    return {*instructions.split()} <= {*line.partition(":")[2].split()}


def test_levels_are_those_of_the_machine() -> None:
    assert levels() == tuple(name for name, needed in NEEDED[platform.machine()].items() if has(needed))


def test_the_best_level_is_chosen() -> None:
    found = library()
    assert found is not None
    pool = new_pool(found, 1, -1)
    assert pool is not None
    try:
        chosen = found.npuq_level_name(found.npuq_pool_level(pool)).decode()
    finally:
        found.npuq_pool_destroy(pool)
    assert chosen == levels()[-1]


def test_sha256_is_hashed_by_its_instructions() -> None:
    found = library()
    assert found is not None
    assert bool(found.npuq_sha256_usable()) == has(SHA256[platform.machine()])
