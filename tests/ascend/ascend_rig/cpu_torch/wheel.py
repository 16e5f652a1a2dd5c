"""Downloads torch's wheel and unpacks it as a CPU build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from .cuda_standins import CUDA_LIBRARY, build_cuda_standins

# Nothing here is used by a program that runs on the CPU. torch_shm_manager must exist.
UNUSED = re.compile(r"torch/(include|test|share)/|torch/bin/(?!torch_shm_manager)|torchgen/|functorch/|.*\.pyi$")


def install_cpu_torch(release: str, target: Path) -> None:
    """Unpack torch into `target`, through a neighbour folder so that an interrupted one is not mistaken."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*command, "--dest", str(partial), f"torch=={release}"], check=True)
    (wheel,) = partial.glob("torch-*.whl")
    unpack(wheel, partial)
    wheel.unlink()
    if build_cuda_standins(partial / "torch"):
        say_cpu(partial / "torch")
    partial.rename(target)


def unpack(wheel: Path, target: Path) -> None:
    """Extract what runs on the CPU."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not UNUSED.match(name) and not CUDA_LIBRARY.match(Path(name).name):
                archive.extract(name, target)


def say_cpu(torch: Path) -> None:
    """Answer as a CPU build does where Python asks how torch was built."""
    edit(torch / "version.py", r"\+cu\d+'", "+cpu'")
    edit(torch / "version.py", r"(?m)^(cuda\b.*= )'.*'$", r"\1None")
    edit(torch / "backends" / "cuda" / "__init__.py", r"return torch\._C\._has_cuda\b", "return False")


def edit(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"))
    assert count == 1, f"{path}: {pattern} is there {count} times"
    path.write_text(text, encoding="utf-8")
