"""Puts torch_npu and the stand-in libraries into a cache folder of the checkout, and runs Python with them.

torch_npu never enters the environment itself: torch loads it on import, and without CANN `import torch` would fail.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .cpu_torch.wheel import install_cpu_torch
from .standins import build_standins

TORCH_NPU = "2.13.0"
ENDS = ("2.10.0.post7", "2.14.0")
"""The oldest and the newest torch_npu of the rig, beside the one whose torch is the environment's."""
RIG_FOLDER = Path(__file__).resolve().parent.parent
ROOT = RIG_FOLDER.parent.parent
CACHE = ROOT / ".venv-ascend"


def prepare(version: str = TORCH_NPU) -> dict[str, str]:
    """Install and build what is missing; the environment variables for a subprocess that imports torch_npu.

    torch is the environment's where that is a CPU build of the release, else one made for the rig.
    """
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    packages, cann = CACHE / f"torch_npu-{version}-{python}", CACHE / f"cann-{version}-{python}"
    own_torch = CACHE / f"torch-{release(version)}-{python}"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"lock-{version}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers may arrive together
        if torch.__version__ == f"{release(version)}+cpu":
            torch_folder = Path(torch.__file__).parent
        else:
            torch_folder = own_torch / "torch"
            if not torch_folder.is_dir():
                install_cpu_torch(release(version), own_torch)
        if not (packages / "torch_npu").is_dir():
            install(version, packages)
        if not (cann / "done").exists():
            build_standins(packages / "torch_npu", torch_folder, cann)
            (cann / "done").touch()
    paths = [*([own_torch] if torch_folder.parent == own_torch else []), packages, RIG_FOLDER]
    return {
        # torch must not try to load the backend by itself: it would do so in processes without the stand-ins too.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(cann), os.environ.get("LD_LIBRARY_PATH", "")])),
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, RIG_FOLDER.parent / "checkpoints"])),
        "OMP_NUM_THREADS": "1",
        # The second process of a release that was unpacked here starts in half the time. What pip installs is compiled.
        "PYTHONDONTWRITEBYTECODE": "",
    }


def release(version: str) -> str:
    """The release of torch that a torch_npu is built for: that of "2.10.0.post7" is 2.10.0."""
    return ".".join(version.split(".")[:3])


def install(version: str, target: Path) -> None:
    """`pip install --no-deps` into `target`, through a neighbour folder so that an interrupted one is not mistaken."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*command, "--target", str(partial), f"torch_npu=={version}"], check=True)
    partial.rename(target)


def run_python(
    *args: str, environment: dict[str, str] | None = None, timeout: float = 1800
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
