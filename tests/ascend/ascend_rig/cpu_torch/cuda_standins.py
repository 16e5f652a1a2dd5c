"""Builds libraries that stand in for CUDA's in an unpacked torch.

torch's own libraries link to them, whatever they run on. Which symbols are needed is read from those. A stand-in does
nothing: no kernel is registered, and no allocator, so that torch finds no CUDA.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

from ..standins import needed, symbols, system_libraries

CUDA_LIBRARY = re.compile(r"lib(torch_cuda|torch_nvshmem|c10_cuda|caffe2_nvrtc|cu[a-zA-Z]+|nv[a-zA-Z]+|nccl)\b.*\.so")

_HEAD = """
extern void *_ZTVN10__cxxabiv117__class_type_infoE[];
static void nothing(void) {}
"""
# Functions whose results torch uses when it is imported.
_ANSWERS = {
    # c10d::get_gil_checker() returns a reference to a pointer, which torch sets.
    "_ZN4c10d15get_gil_checkerEv": "static void *checker; void *NAME(void) { return &checker; }",
    # c10d::ProcessGroupNCCL::Options::Options(bool): a default argument, kept as an object with a type.
    "_ZN4c10d16ProcessGroupNCCL7OptionsC1Eb": (
        "static struct { void **table; const char *name; } options ="
        ' {_ZTVN10__cxxabiv117__class_type_infoE + 2, "N4c10d16ProcessGroupNCCL7OptionsE"};'
        "static void *options_table[34] = {0, &options, [2 ... 33] = nothing};"
        "void NAME(void **self) { *self = options_table + 2; }"
    ),
    # c10::cuda::CUDACachingAllocator::allocator, a variable.
    "_ZN3c104cuda20CUDACachingAllocator9allocatorE": "void *NAME;",
}


def build_cuda_standins(torch: Path) -> list[Path]:
    """Compile into torch/lib one small library for each CUDA library that torch's own link to; none for a CPU build."""
    libraries = [path for path in (torch / "lib").iterdir() if ".so" in path.name]
    roots = [*libraries, *torch.glob("_C.*.so")]
    names = sorted({name for root in roots for name in needed(root) if CUDA_LIBRARY.match(name)})
    if not names:
        return []
    system = [path for name, path in system_libraries(libraries).items() if not CUDA_LIBRARY.match(name)]
    defined = {name for path in [*libraries, *system] for name in symbols(path, "--defined-only")}
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    for name in {name for root in roots for name in symbols(root, "--undefined-only", versions=True)}:
        symbol, _, version = name.partition("@")
        if symbol not in defined and not symbol.startswith(("Py", "_Py")):
            # CUDA's own libraries give their symbols a version, their file name. The others are torch's.
            wanted[version or "libtorch_cuda.so"].add(symbol)
    return [compile_library(torch / "lib" / name, wanted[name], versioned=name != "libtorch_cuda.so") for name in names]


def compile_library(path: Path, wanted: set[str], versioned: bool) -> Path:
    source, versions = path.with_suffix(".c"), path.with_suffix(".map")
    source.write_text("\n".join([_HEAD, *map(definition, sorted(wanted))]))
    versions.write_text(f"{path.name} {{ global: *; }};\n" if versioned else "{ global: *; };\n")
    command = ["gcc", "-w", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{path.name}", f"-Wl,--version-script={versions}"]
    subprocess.run([*command, "-o", str(path), str(source), "-lstdc++"], check=True)
    source.unlink()
    versions.unlink()
    return path


def definition(symbol: str) -> str:
    """C for a symbol: a type_info, an empty table of virtual functions, or a function that returns 0."""
    if symbol in _ANSWERS:
        return _ANSWERS[symbol].replace("NAME", symbol)
    if symbol.startswith("_ZTI"):
        value = f'{{_ZTVN10__cxxabiv117__class_type_infoE + 2, "{symbol[4:]}"}}'
        return f"struct {{ void **table; const char *name; }} {symbol} = {value};"
    if symbol.startswith("_ZTV"):
        return f"void *{symbol}[64];"
    return f"int {symbol}(void) {{ return 0; }}"
