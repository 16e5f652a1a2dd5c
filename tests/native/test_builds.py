"""Other builds of the library: under sanitizers, for Arm, and none at all."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from npuq.native import binding as native

from .builds import COMPILER, ROOT, SANITIZE, load_setup, sanitized_library, sanitizer_environment

ARM_COMPILER, ARM_EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
EMULATED_AVX512 = ["-include", str(Path(__file__).with_name("avx512_emulated.h"))]
needs_arm = pytest.mark.skipif(
    ARM_COMPILER is None or ARM_EMULATOR is None, reason="gcc-aarch64-linux-gnu and qemu-user are not installed"
)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="gcc is not installed")
emulates_avx512 = pytest.mark.skipif(
    platform.machine() != "x86_64" or "avx512vnni" in native.levels(),
    reason="AVX-512 is emulated by AVX2 where the processor lacks it; here the tests run it as it is",
)


def _check_program(library: Path, directory: Path, compiler: str, extra: list[str]) -> Path:
    """library_check.c with a library that was built by the same compiler."""
    program = directory / "check"
    source = str(Path(__file__).with_name("library_check.c"))
    include = ["-I", str(ROOT / "native")]
    link = [str(library), f"-Wl,-rpath,{library.parent}", "-lm"]
    subprocess.run([compiler, "-O1", *extra, *include, source, *link, "-o", str(program)], check=True)
    return program


@needs_compiler
def test_levels_agree_under_sanitizers(tmp_path: Path) -> None:
    program = _check_program(sanitized_library(), tmp_path, str(COMPILER), SANITIZE)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "agree" in done.stdout


def _kernel_tests(library: Path, names: list[str], environment: dict[str, str], examples: int) -> str:
    """Run tests beside this one again, on that library; what pytest says."""
    tests = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    program = (
        "import pathlib, sys, pytest, npuq.native.library as library\n"
        "library.LIBRARY = pathlib.Path(sys.argv[1])\n"
        "from hypothesis import settings\n"
        "settings.register_profile('few', max_examples=int(sys.argv[2]), deadline=None)\n"
        "print(*library.levels())\n"
        "sys.exit(pytest.main(['-p', 'no:cacheprovider', '--hypothesis-profile', 'few', *sys.argv[3:]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(library), str(examples), *tests],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
    return done.stdout


@needs_compiler
def test_kernel_tests_pass_under_sanitizers() -> None:
    names = [
        "products",
        "rows",
        "layers",
        "attention",
        "grouped",
        "sparse",
        "arguments",
        "convert",
        "convert_hostile",
        "calibration",
        "sha256",
        "sampling",
    ]
    _kernel_tests(sanitized_library(), names, sanitizer_environment(), 4)


@needs_compiler
@emulates_avx512
def test_kernel_tests_pass_with_avx512_emulated(tmp_path: Path) -> None:
    """What the AVX-512 level says, where the processor has no such instructions: each is two of AVX2 there."""
    setup = load_setup()
    levels = setup.LEVELS["x86_64"]
    levels["avx512vnni"] = ["-DNPUQ_LEVEL_AVX512", *levels["avx2"][1:], *EMULATED_AVX512]
    extra = ["-DNPUQ_EVERY_LEVEL", "-w", "-O2"]
    setup.build(tmp_path / "libnpuq.so", tmp_path / "objects", [str(COMPILER)], "x86_64", extra)
    names = ["products", "rows", "layers", "attention", "grouped", "sparse", "convert", "calibration"]
    said = _kernel_tests(tmp_path / "libnpuq.so", names, {}, 20)
    assert said.splitlines()[0] == "portable avx2 avx512vnni"


@needs_arm
def test_levels_agree_on_arm(tmp_path: Path) -> None:
    library = tmp_path / "libnpuq.so"
    load_setup().build(library, tmp_path / "objects", [str(ARM_COMPILER)], "aarch64", [])
    program = _check_program(library, tmp_path, str(ARM_COMPILER), [])
    done = subprocess.run(
        [str(ARM_EMULATOR), "-L", "/usr/aarch64-linux-gnu", str(program)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 levels beside portable agree\nsha256 as published\n"


def _check_tables(directory: Path, compiler: str, flags: list[str], run: list[str]) -> dict[str, int]:
    """Compile and run tables_check.c for one level; how many rows of each kind were taken by their magnitudes."""
    program, source = directory / "tables", str(Path(__file__).with_name("tables_check.c"))
    setup = load_setup()
    plain = [flag for flag in setup.FLAGS if not flag.startswith(("-W", "-O", "-f"))]
    exact = [flag for flag in setup.FLAGS if flag.startswith("-f") and flag not in ("-fPIC", "-fvisibility=hidden")]
    level = ["-DNPUQ_LEVEL_NAME=checked", *flags]
    include = ["-I", str(ROOT / "native")]
    subprocess.run(
        [compiler, *plain, *exact, "-O1", "-w", *level, *include, source, "-lm", "-o", str(program)], check=True
    )
    done = subprocess.run([*run, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}


def _usable_levels() -> dict[str, list[str]]:
    usable = native.levels() if native.library() is not None else ["portable"]
    levels = load_setup().LEVELS.get(platform.machine(), {"portable": []})
    found = {name: flags for name, flags in levels.items() if name in usable}
    if "avx2" in found and "avx512vnni" not in found:
        found["avx512 emulated"] = ["-DNPUQ_LEVEL_AVX512", *levels["avx2"][1:], *EMULATED_AVX512]
    return found


@needs_compiler
@pytest.mark.parametrize("flags", _usable_levels().values(), ids=_usable_levels())
def test_fp8_rows_by_their_magnitudes(tmp_path: Path, flags: list[str]) -> None:
    taken = _check_tables(tmp_path, str(COMPILER), [*flags, *SANITIZE], [])
    # All but some of the shortest rows, and those whose best scale is no Gaussian's.
    assert min(taken[kind] for kind in ("normal", "wide", "large")) > 130
    assert taken["thresholds"] > 4000
    assert taken["uneven"] > 100
    assert taken["outliers"] > 0


@needs_arm
def test_fp8_rows_by_their_magnitudes_on_arm(tmp_path: Path) -> None:
    flags = load_setup().LEVELS["aarch64"]["neon_dotprod"]
    run = [str(ARM_EMULATOR), "-L", "/usr/aarch64-linux-gnu"]
    assert _check_tables(tmp_path, str(ARM_COMPILER), flags, run)["normal"] > 130


def test_no_compiler_is_an_error_that_the_build_may_ignore(tmp_path: Path) -> None:
    setup = load_setup()
    with pytest.raises(setup.CompileError, match="no C compiler"):
        setup.build(tmp_path / "libnpuq.so", tmp_path, ["no-such-compiler"], platform.machine(), [])


def test_a_failed_build_leaves_no_older_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    setup, older = load_setup(), tmp_path / "libnpuq.so"
    older.write_text("of other sources")
    command = setup.BuildNative(setuptools.Distribution())
    command.build_temp, command.editable_mode = str(tmp_path), False
    command.get_ext_fullpath = lambda name: str(older)
    kept = ROOT / "native" / "libnpuq.so"
    was_there = kept.exists()
    with pytest.raises(setup.CompileError, match="no C compiler"):
        command.build_extension(setuptools.Extension("npuq.native.libnpuq", []))
    assert not older.exists()
    assert kept.exists() == was_there  # an editable install's, which this build is not for


def test_without_the_library_torch_does_the_work(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, npuq.native.library as library\n"
        "library.LIBRARY = pathlib.Path(sys.argv[1])\n"
        "from npuq.runtime.backend import *\n"
        "from npuq.formats.schemes import *\n"
        "from npuq.quant.stored_rows import StoredRows\n"
        "import torch\n"
        "rows = torch.arange(32.0).view(2, 16)\n"
        "direct = quantize_rows(rows, Scheme.W4A8, Method.MSE, row_parallel=True)\n"
        "stored = quantize_stored(StoredRows(rows), Scheme.W4A8, Method.MSE, row_parallel=True)\n"
        "assert all(torch.equal(direct.tensors[name], stored.tensors[name]) for name in direct.tensors)\n"
        "print(library.description())\n"
    )
    absent = str(tmp_path / "libnpuq.so")
    done = subprocess.run([sys.executable, "-c", program, absent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch (native kernels were not built")
