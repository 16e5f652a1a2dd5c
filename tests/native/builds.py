"""Builds of the native library that tests make, with other flags than an install."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("gcc")
# -O3 takes a minute more, -g half of one.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"]


def load_setup() -> ModuleType:
    """setup.py, which knows how the library is built."""
    spec = importlib.util.spec_from_file_location("npuq_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitized_library() -> Path:
    """libnpuq.so with AddressSanitizer and UBSan, built once for these sources; processes that want it wait."""
    sources = [ROOT / "setup.py", *sorted((ROOT / "native").rglob("*.[ch]"))]
    digest = hashlib.sha256(repr([SANITIZE, COMPILER]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = ROOT / "build" / f"sanitized-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libnpuq.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = folder / "partial.so"
            load_setup().build(partial, folder / "objects", [str(COMPILER)], platform.machine(), SANITIZE)
            partial.rename(library)
    return library


def sanitizer_environment() -> dict[str, str]:
    """What a Python that loads it needs. Python and torch keep memory to their end: leaks are not looked for."""
    found = subprocess.run([str(COMPILER), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
