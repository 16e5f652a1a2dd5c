"""Puts the engines' own Python code into a folder of the checkout, from PyPI, and runs Python with it.

Nothing of it enters the test environment itself: every engine gets a folder of its own, on the path of a subprocess.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
RIG = ROOT / "tests" / "ascend"
CACHE = ROOT / ".venv-engines"

# Installed whole. The small libraries are those that the engines' modules import when they are loaded themselves.
_SHARED = [
    "aiohappyeyeballs",
    "aiohttp",
    "aiosignal",
    "annotated-types",
    "anyio",
    "attrs",
    "blake3",
    "bracex",
    "cachetools",
    "cbor2",
    "certifi",
    "charset-normalizer",
    "cloudpickle",
    "compressed-tensors==0.18.0",
    "dill",
    "diskcache",
    "distro",
    "einops",
    "fastapi",
    "frozenlist",
    "gguf",
    "h11",
    "httpcore",
    "httpx<1",
    "idna",
    "jiter",
    "loguru",
    "msgspec",
    "multidict",
    "openai==2.8.0",
    "orjson",
    "partial_json_parser",
    "pillow",
    "propcache",
    "psutil",
    "py-cpuinfo",
    "pybase64",
    "pydantic",
    "pydantic-core",
    "pygtrie",
    "pyzmq",
    "requests",
    "scipy",
    "sentencepiece",
    "setproctitle",
    "sniffio",
    "starlette",
    "tiktoken",
    "typing-inspection",
    "urllib3",
    "uvloop",
    "wcmatch",
    "xxhash",
    "yarl",
]
VERSIONS = {
    "vllm-ascend": ["vllm==0.23.0", "vllm-ascend==0.23.0"],
    "sglang": ["sglang==0.5.23"],
    "msmodelslim": ["msmodelslim==26.1.0"],
    "compressed-tensors": ["compressed-tensors==0.18.0"],
}


def prepare(engine: str) -> str:
    """Install what `engine` needs; the value of PYTHONPATH for a subprocess that imports it."""
    wheels = VERSIONS[engine]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    code = CACHE / f"{'-'.join(wheels).replace('==', '-')}-{python}"
    shared = CACHE / f"shared-{python}"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers may arrive together
        if not shared.is_dir():
            _fill(shared, lambda folder: _pip("install", "--target", folder, *_SHARED))
        if not code.is_dir():
            _fill(code, lambda folder: _unpack(wheels, folder))
    return os.pathsep.join(map(str, (HERE.parent, code, shared)))


def _fill(target: Path, how) -> None:
    """Through a neighbour folder, so that an interrupted installation is not mistaken for a finished one."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    how(partial)
    partial.rename(target)


def _unpack(wheels: list[str], folder: Path) -> None:
    """The Python code of the wheels. Their compiled libraries are for GPUs and NPUs, and 95 % of the size."""
    download = folder / "download"
    _pip("download", "--only-binary", ":all:", "--dest", download, *wheels)
    for wheel in download.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if ".so" not in Path(name).suffixes])
    shutil.rmtree(download)


def _pip(command: str, *arguments: str | Path) -> None:
    base = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*base, *map(str, arguments)], check=True)


def run_checks(engine: str, checks: Path, artifacts: Path, timeout: float = 1800) -> subprocess.CompletedProcess[str]:
    """pytest on a file of checks, in a subprocess that has the engine, torch_npu and the stand-ins for CANN."""
    sys.path.insert(0, str(RIG))
    try:
        from ascend_rig.install import prepare as prepare_rig
    finally:
        sys.path.remove(str(RIG))
    path = prepare(engine)
    environment = {**os.environ, **prepare_rig()}
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], path])
    plugins = ["-p", "engine_rig.plugin", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *plugins,
        "-o",
        "python_files=check_*.py",
        "--show-capture=no",
        "-W",
        "ignore",
        str(checks),
        "--artifacts",
        str(artifacts),
    ]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
