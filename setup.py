"""Builds the optional native library beside the Python that loads it; everything else is in pyproject.toml.

The library is plain C behind a plain C interface, loaded with ctypes: it links neither Python nor torch, so one build
serves every version of both. `native/common/level.c` is compiled once for each instruction set. Without a compiler the
install succeeds and torch does the work; `npuq --version` says which.

With NPUQ_TARGET (`aarch64-linux-gnu.2.17`) the library is built for that processor and glibc by the `ziglang` package,
and must succeed; `release/wheels.sh` makes the released wheels so.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
LIBRARY = "libnpuq.so"
# No contraction into fused multiply-adds: the conversion's floats must be the same on every machine. No errno or
# trapping floats: neither is looked at, and both keep loops from being vectorized.
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math", "-Wall", "-Wextra", "-pthread"]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
LEVELS = {
    "x86_64": {
        "portable": [],
        "avx2": ["-DNPUQ_LEVEL_AVX2", *AVX2],
        "avx512vnni": ["-DNPUQ_LEVEL_AVX512", *AVX512],
        "avx512bf16": ["-DNPUQ_LEVEL_AVX512", "-DNPUQ_LEVEL_BF16", *AVX512, "-mavx512vbmi", "-mavx512bf16"],
    },
    "aarch64": {
        "portable": [],
        "neon_dotprod": ["-DNPUQ_LEVEL_NEON", "-march=armv8.2-a+dotprod"],
        "neon_i8mm": ["-DNPUQ_LEVEL_NEON", "-DNPUQ_LEVEL_I8MM", "-march=armv8.2-a+dotprod+i8mm"],
    },
}

# A released wheel's processor and glibc; empty: this machine's.
TARGET = os.environ.get("NPUQ_TARGET", "")

# Beside the levels: instructions for one purpose, detected at run time too.
UNITS = {"sha256": {"x86_64": ["-msse4.1", "-msha"], "aarch64": ["-march=armv8-a+crypto"]}}


def zig_compiler(target: str) -> list[str]:
    """The compiler of the `ziglang` package for a target such as `aarch64-linux-gnu.2.17`. CompileError without it."""
    if not re.fullmatch(r"(x86_64|aarch64)-linux-gnu\.2\.[0-9]+", target):
        raise CompileError(f"NPUQ_TARGET {target!r}: give x86_64 or aarch64, as in aarch64-linux-gnu.2.17")
    if importlib.util.find_spec("ziglang") is None:
        raise CompileError("NPUQ_TARGET needs the package ziglang; npuq[release] brings it")
    return [sys.executable, "-m", "ziglang", "cc", "-target", target]


def spelled_for_zig(flags: list[str]) -> list[str]:
    """The same flags for zig, whose `-mcpu` takes the place of gcc's `-march` on Arm."""
    march = re.compile(r"-march=armv8(\.2)?-a((?:\+[a-z0-9]+)*)")
    return [march.sub(lambda it: f"-mcpu=generic+v8{'_2' if it[1] else ''}a{it[2]}", flag) for flag in flags]


# Levels that a compiler may be too old for: gcc before 10 has no bf16.
NEWER = {"avx512bf16": "-mavx512bf16"}


def knows(compiler: list[str], flag: str) -> bool:
    """False if the compiler refuses a flag."""
    with suppress(OSError):  # no compiler: the first unit will say so
        return subprocess.run([*compiler, flag, "-E", "-x", "c", os.devnull], capture_output=True).returncode == 0
    return True


def build(target: Path, objects: Path, compiler: list[str], machine: str, extra: list[str]) -> None:
    """Compile and link the library. Raises CompileError with the compiler's words."""
    source = ROOT / "native"
    levels = dict(LEVELS.get(machine, {"portable": []}))
    missing = [level for level in NEWER.keys() & levels if not knows([*compiler, *extra], NEWER[level])]
    extra = [*extra, *(f"-DNPUQ_WITHOUT_{level.upper()}" for level in missing)]
    units: list[tuple[Path, str, list[str]]] = [
        (path, path.stem, UNITS.get(path.stem, {}).get(machine, []))
        for path in sorted(source.rglob("*.c"))
        if path.name != "level.c"
    ]
    for level, flags in levels.items():
        if level in missing:
            continue
        units.append((source / "common" / "level.c", f"level_{level}", [f"-DNPUQ_LEVEL_NAME={level}", *flags]))
    objects.mkdir(parents=True, exist_ok=True)

    def compile_unit(unit: tuple[Path, str, list[str]]) -> str:
        path, name, flags = unit
        output = str(objects / f"{name}.o")
        if "ziglang" in compiler:
            flags = spelled_for_zig(flags)
        run([*compiler, *FLAGS, *flags, *extra, "-I", str(source), "-c", str(path), "-o", output])
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_unit, units))
    target.parent.mkdir(parents=True, exist_ok=True)
    run([*compiler, *extra, "-shared", "-pthread", *compiled, "-lm", "-o", str(target)])


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"no C compiler ({command[0]}): {error}") from None
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stderr}")


class BuildNative(build_ext):
    """Builds an `Extension` as a plain shared library: its own name, its own flags for each unit."""

    def build_extension(self, ext: Extension) -> None:
        compiler, extra = shlex.split(os.environ.get("CC", "cc")), shlex.split(os.environ.get("CFLAGS", ""))
        target = Path(self.get_ext_fullpath(ext.name))
        # If the build fails, the install continues without a library: not with an earlier build of other sources.
        target.unlink(missing_ok=True)
        if self.editable_mode:
            (ROOT / "native" / LIBRARY).unlink(missing_ok=True)
        machine = platform.machine()
        if TARGET:
            compiler, machine = zig_compiler(TARGET), TARGET.partition("-")[0]
        build(target, Path(self.build_temp), compiler, machine, extra)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)


class BuildPackage(build_py):
    """Leaves setup.py out of the package, because the repository root is the package."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if found[:2] != ("npuq", "setup")]


class PlatformWheel(bdist_wheel):
    """Tags the wheel for a platform and any Python, as the library is."""

    def get_tag(self) -> tuple[str, str, str]:
        if not TARGET:
            return "py3", "none", super().get_tag()[2]
        machine, glibc = TARGET.partition("-")[0], TARGET.rpartition("gnu.")[2]
        return "py3", "none", f"manylinux_{glibc.replace('.', '_')}_{machine}"


if __name__ == "__main__":
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "native").rglob("*.[ch]"))
    extension = Extension(
        "npuq.native.libnpuq",
        sources=[file for file in files if file.endswith(".c")],
        depends=[file for file in files if file.endswith(".h")],
        optional=not TARGET,
    )
    commands = {"build_ext": BuildNative, "build_py": BuildPackage, "bdist_wheel": PlatformWheel}
    setup(ext_modules=[extension], cmdclass=commands)
