"""Puts the engines' own Python code into a folder of the checkout, from PyPI, and runs Python with it.

Nothing of it enters the test environment itself: every engine gets a folder of its own, on the path of a subprocess.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
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
    "prometheus-client",
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
# What pip needs to read the metadata of a source distribution.
_SOURCE_TOOLS = ["packaging", "setuptools", "setuptools-scm", "vcs-versioning"]


@dataclass(frozen=True)
class Release:
    """One release of an engine or tool: its checks (a file beside the tests), and where its Python code is."""

    checks: str
    wheels: Sequence[str]
    source: str = ""  # a package that is published as a source distribution alone


RELEASES = {
    "vllm-ascend 0.23.0": Release("check_vllm_ascend.py", ["vllm==0.23.0", "vllm-ascend==0.23.0"]),
    "vllm-ascend 0.30.0rc2": Release("check_vllm_ascend.py", ["vllm==0.30.0"], source="vllm-ascend==0.30.0rc2"),
    "sglang 0.5.23": Release("check_sglang.py", ["sglang==0.5.23"]),
    "msmodelslim 26.1.0": Release("check_msmodelslim.py", ["msmodelslim==26.1.0"]),
    "compressed-tensors 0.18.0": Release("check_compressed_tensors.py", ["compressed-tensors==0.18.0"]),
    "compressed-tensors 0.20.1": Release("check_compressed_tensors.py", ["compressed-tensors==0.20.1"]),
}


def prepare(name: str) -> str:
    """Install what the release needs (a key of RELEASES); the value of PYTHONPATH for a subprocess that imports it."""
    release = RELEASES[name]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    code = CACHE / f"{name.replace(' ', '-')}-{python}"
    # A folder of its own for every list: a checkout that has an older one gets what is new.
    shared = CACHE / f"shared-{sha256(' '.join(_SHARED).encode()).hexdigest()[:8]}-{python}"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers may arrive together
        if not shared.is_dir():
            _fill(shared, lambda folder: _pip("install", "--target", folder, *_SHARED))
        if not code.is_dir():
            _fill(code, lambda folder: _unpack(release, folder))
    return os.pathsep.join(map(str, (HERE.parent, code, shared)))


def _fill(target: Path, how) -> None:
    """Through a neighbour folder, so that an interrupted installation is not mistaken for a finished one."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    how(partial)
    partial.rename(target)


def _unpack(release: Release, folder: Path) -> None:
    """The Python code of the packages. Their compiled libraries are for GPUs and NPUs, and 95 % of the size."""
    download = folder / "download"
    _pip("download", "--only-binary", ":all:", "--dest", download, *release.wheels)
    for wheel in download.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if ".so" not in Path(name).suffixes])
    shutil.rmtree(download)
    if release.source:
        _unpack_source(release.source, folder)


def _unpack_source(requirement: str, folder: Path) -> None:
    """The package of a source distribution, and the file in it that a build would write for an Atlas A2."""
    package = requirement.partition("==")[0].replace("-", "_")
    tools, download = folder / "tools", folder / "download"
    _pip("install", "--target", tools, *_SOURCE_TOOLS)
    # pip runs setup.py for the metadata of what it downloads; nothing is compiled.
    build = {"PYTHONPATH": str(tools), "COMPILE_CUSTOM_KERNELS": "0", "SOC_VERSION": "ascend910b1"}
    _pip(
        "download",
        "--no-build-isolation",
        "--pre",
        "--no-binary",
        ":all:",
        "--dest",
        download,
        requirement,
        environment=build,
    )
    (source,) = download.iterdir()
    with tarfile.open(source) as archive:
        for member in archive:
            _, _, name = member.name.partition("/")
            if member.isfile() and name.startswith(f"{package}/"):
                archive.extract(member.replace(name=name), folder, filter="data")
    (folder / package / "_build_info.py").write_text("__device_type__ = 'A2'\n")
    shutil.rmtree(tools)
    shutil.rmtree(download)


def _pip(command: str, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
    base = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*base, *map(str, arguments)], check=True, env={**os.environ, **(environment or {})})


def run_checks(name: str, artifacts: Path, timeout: float = 1800) -> subprocess.CompletedProcess[str]:
    """pytest on the checks of a release (a key of RELEASES), in a subprocess that has its code, torch_npu and the
    stand-ins for CANN."""
    sys.path.insert(0, str(RIG))
    try:
        from ascend_rig.install import prepare as prepare_rig
    finally:
        sys.path.remove(str(RIG))
    path = prepare(name)
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
        str(HERE.parent / RELEASES[name].checks),
        "--artifacts",
        str(artifacts),
        "--release",
        name,
    ]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
