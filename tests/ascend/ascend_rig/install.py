"""Puts torch_npu and the stand-in libraries into a cache folder of the checkout, and runs Python with them.

torch_npu never enters the environment itself: torch loads it on import, and without CANN `import torch` would fail.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from .standins import build_standins

TORCH_NPU = "2.13.0"
RIG_FOLDER = Path(__file__).resolve().parent.parent
ROOT = RIG_FOLDER.parent.parent
CACHE = ROOT / ".venv-ascend"


def prepare(version: str = TORCH_NPU) -> dict[str, str]:
    """Install and build what is missing; the environment variables for a subprocess that imports torch_npu."""
    tag = f"{version}-py{sys.version_info.major}{sys.version_info.minor}"
    packages, cann = CACHE / f"torch_npu-{tag}", CACHE / f"cann-{tag}"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers may arrive together
        if not (packages / "torch_npu").is_dir():
            install(version, packages)
        if not (cann / "done").exists():
            spec = find_spec("torch")
            assert spec is not None and spec.origin is not None
            build_standins(packages / "torch_npu", Path(spec.origin).parent, cann)
            (cann / "done").touch()
    return {
        # torch must not try to load the backend by itself: it would do so in processes without the stand-ins too.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(cann), os.environ.get("LD_LIBRARY_PATH", "")])),
        "PYTHONPATH": os.pathsep.join([str(packages), str(RIG_FOLDER), str(RIG_FOLDER.parent / "checkpoints")]),
        "OMP_NUM_THREADS": "1",
    }


def install(version: str, target: Path) -> None:
    """`pip install --no-deps` into `target`, through a neighbour folder so that an interrupted one is not mistaken."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*command, "--target", str(partial), f"torch_npu=={version}"], check=True)
    partial.rename(target)


def run_python(
    *args: str, environment: dict[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """`python ARGS` from the root of the checkout, with the rig's environment variables or others."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, **(prepare() if environment is None else environment)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
