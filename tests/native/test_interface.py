"""The Python binding against npuq.h: structs field by field as the C compiler lays them out, prototypes, constants."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from npuq.native import binding, calibration, library, quantization
from npuq.native.integers import Structure

from .builds import COMPILER, ROOT

HEADER = (ROOT / "native" / "npuq.h").read_text(encoding="utf-8")
CODE = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)
STRUCTS = {
    "npuq_part": library.Part,
    "npuq_weights": library.Weights,
    "npuq_pages": library.Pages,
    "npuq_latent_cache": library.LatentCache,
    "npuq_strided": library.Strided,
    "npuq_heads": library.Heads,
    "npuq_mla": library.MlaBlock,
    "npuq_kv_cache": library.KvCache,
    "npuq_gqa": library.GqaBlock,
    "npuq_moe": library.MoeBlock,
    "npuq_source": library.Source,
    "npuq_draw": library.Draw,
    "npuq_sha256": library.Sha256,
}
CONSTANTS = {
    "NPUQ_ABI_VERSION": library._ABI_VERSION,
    "NPUQ_OK": 0,
    "NPUQ_NO_MEMORY": quantization.NO_MEMORY,
    "NPUQ_NOT_FINITE": quantization.NOT_FINITE,
    "NPUQ_BAD_SIZE": quantization.BAD_SIZE,
    "NPUQ_BAD_INDEX": quantization.BAD_INDEX,
    "NPUQ_MOST_COLUMNS": binding.MOST_COLUMNS,
    "NPUQ_MOST_BIAS_COLUMNS": binding.MOST_BIAS_COLUMNS,
    "NPUQ_LANES": calibration.LANES,
    "NPUQ_F32": binding.DTYPES[torch.float32],
    "NPUQ_BF16": binding.DTYPES[torch.bfloat16],
    "NPUQ_F16": binding.DTYPES[torch.float16],
    "NPUQ_F8E4M3": binding.DTYPES[torch.float8_e4m3fn],
    "NPUQ_I8": binding.DTYPES[torch.int8],
    "NPUQ_I4": binding.INT4,
    "NPUQ_U4": binding.DTYPES[torch.uint8],
    "NPUQ_NZ": binding.LAYOUTS["nz"],
    "NPUQ_ND": binding.LAYOUTS["nd"],
}


def _struct_bodies() -> dict[str, str]:
    return {name: body for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", CODE, re.DOTALL)}


def _fields(body: str) -> list[str]:
    """Names in a struct's declarations, of which one may have several: `const float *scale; int64_t a, b[3];`."""
    return [
        re.sub(r"\[.*\]", "", part).split()[-1].lstrip("*")
        for declaration in body.split(";")
        for part in declaration.split(",")
        if part.strip()
    ]


def _run(directory: Path, lines: list[str]) -> list[list[str]]:
    """What a C program of these statements prints, line by line and word by word."""
    source, program = directory / "layout.c", directory / "layout"
    body = "\n".join(lines)
    source.write_text(f'#include <stdio.h>\n#include "npuq.h"\nint main(void) {{\n{body}\nreturn 0;\n}}\n')
    command = [str(COMPILER), "-Wall", "-Werror", "-I", str(ROOT / "native"), str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def _plain(kind: str) -> object:
    """The ctypes class of a C type as prototypes write it."""
    kind = kind.replace("const ", "").strip()
    if "*" in kind:
        return ctypes.c_void_p
    return {
        "int": ctypes.c_int,
        "int32_t": ctypes.c_int32,
        "int64_t": ctypes.c_int64,
        "float": ctypes.c_float,
        "double": ctypes.c_double,
    }[kind]


def _prototypes() -> dict[str, tuple[object, ...]]:
    """Argument types of the functions that return a status."""
    found = {}
    for name, arguments in re.findall(r"NPUQ_API int (\w+)\(([^)]*)\);", CODE):
        kinds = [re.sub(r"\w+(\[\d*\])?$", r"\1", " ".join(one.split())) for one in arguments.split(",")]
        found[name] = tuple(_plain(kind) for kind in kinds if kind.strip() not in ("", "void"))
    return found


def test_every_struct_is_compared() -> None:
    assert _struct_bodies().keys() == STRUCTS.keys()
    assert set(Structure.__subclasses__()) == set(STRUCTS.values())
    for name, body in _struct_bodies().items():
        assert _fields(body) == [field[0] for field in STRUCTS[name]._fields_], name


@pytest.mark.skipif(COMPILER is None, reason="gcc is not installed")
def test_structs_lie_in_memory_as_the_binding_says(tmp_path: Path) -> None:
    lines, expected = [], []
    for name, struct in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append([name, str(ctypes.sizeof(struct))])
        for field in struct._fields_:
            where = getattr(struct, field[0])
            size = f"sizeof((({name} *)0)->{field[0]})"
            lines.append(f'printf("{name}.{field[0]} %zu %zu\\n", offsetof({name}, {field[0]}), {size});')
            expected.append([f"{name}.{field[0]}", str(where.offset), str(where.size)])
    assert _run(tmp_path, lines) == expected


@pytest.mark.skipif(COMPILER is None, reason="gcc is not installed")
def test_constants_have_the_same_values(tmp_path: Path) -> None:
    printed = _run(tmp_path, [f'printf("{name} %ld\\n", (long){name});' for name in CONSTANTS])
    assert {name: int(value) for name, value in printed} == CONSTANTS


def test_every_constant_is_compared() -> None:
    enums = re.findall(r"\b(NPUQ_[A-Z0-9_]+) =", CODE)
    macros = re.findall(r"#define (NPUQ_\w+) \d", CODE)
    assert {*enums, *macros} == CONSTANTS.keys()


def test_prototypes_are_those_of_the_binding() -> None:
    prototypes = _prototypes()
    for name, kinds in library._SIGNATURES.items():
        assert prototypes[name] == kinds, name
    looked_up = {"npuq_abi_version", "npuq_level_count", "npuq_level_usable", "npuq_pool_level", "npuq_sha256_usable"}
    assert prototypes.keys() - looked_up == library._SIGNATURES.keys()
