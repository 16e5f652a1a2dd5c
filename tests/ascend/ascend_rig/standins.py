"""Builds libraries that stand in for CANN, so that torch_npu can be imported on a machine without an NPU.

Nothing about CANN's interface is written down here but two answers: which symbols are needed is read from the installed
wheel. They are the undefined symbols of torch_npu's own libraries that neither torch, nor Python, nor
a system library (glibc, libstdc++) defines.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

SOC_NAME = "Ascend910B1"

# Every stand-in returns 0, ACL's "success"; these two also have to answer a question when torch_npu starts.
ANSWERS = {
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned int *count) { *count = 0; return 0; }",
    "aclrtGetSocName": f'const char *aclrtGetSocName(void) {{ return "{SOC_NAME}"; }}',
}


def build_standins(torch_npu: Path, torch: Path, output: Path) -> list[Path]:
    """Compile one small library for each CANN library that torch_npu links to and this machine lacks.

    `torch_npu` and `torch` are the installed package directories. All symbols go into the first
    library: the dynamic linker searches the loaded libraries as one scope.
    """
    roots = linked_libraries(torch_npu)
    own = [*torch_npu.glob("lib/*.so*"), *torch.glob("lib/lib*torch*.so"), *torch.glob("lib/libc10*.so")]
    system = system_libraries(roots)
    present = {path.name for path in own} | set(system)
    missing = sorted({name for root in roots for name in needed(root)} - present)
    defined = {symbol for path in [*own, *system.values()] for symbol in symbols(path, "--defined-only")}
    undefined = {symbol for root in roots for symbol in symbols(root, "--undefined-only")}
    # Py… comes from the interpreter.
    wanted = sorted(symbol for symbol in undefined - defined if not symbol.startswith(("Py", "_Py")))
    output.mkdir(parents=True, exist_ok=True)
    source = output / "standins.c"
    source.write_text("".join(ANSWERS.get(name, f"int {name}(void) {{ return 0; }}") + "\n" for name in wanted))
    empty = output / "empty.c"
    empty.write_text("typedef int nothing;\n")
    built = []
    for name in missing:
        path = output / name
        # -w: gcc knows none of these functions, and need not.
        command = ["gcc", "-w", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{name}", "-o", str(path)]
        subprocess.run([*command, str(empty if built else source)], check=True)
        built.append(path)
    return built


def linked_libraries(torch_npu: Path) -> list[Path]:
    """torch_npu's extension module and those of its own libraries that are loaded with it.

    The torchair and ATB plug-ins are loaded on demand only, so what they link to is not needed.
    """
    found = [*torch_npu.glob("_C.*.so")]
    for path in found:  # grows while it is walked
        own = (torch_npu / "lib" / name for name in needed(path))
        found += [library for library in own if library.is_file() and library not in found]
    return found


def needed(path: Path) -> list[str]:
    """Names of the libraries that the ELF file at `path` links to."""
    text = subprocess.run(["readelf", "-d", str(path)], check=True, capture_output=True, text=True).stdout
    return [line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]


def system_libraries(roots: list[Path]) -> dict[str, Path]:
    """Of the libraries that `roots` link to, those that the dynamic linker finds by itself: name → file."""
    found = {}
    for root in roots:
        text = subprocess.run(["ldd", str(root)], check=True, capture_output=True, text=True).stdout
        for word in text.split():
            if word.startswith("/") and Path(word).is_file():
                found[Path(word).name] = Path(word)
    return found


def symbols(path: Path, which: str, versions: bool = False) -> list[str]:
    """Strong dynamic symbols of the ELF file at `path`: nm's `--defined-only` or `--undefined-only` ones.

    versions: as "symbol@version" where a symbol has one.
    """
    text = subprocess.run(["nm", "-D", which, str(path)], capture_output=True, text=True).stdout
    rows = [line.split() for line in text.splitlines()]
    if which == "--undefined-only":
        rows = [row for row in rows if row[0] == "U"]
    return [row[-1] if versions else row[-1].split("@")[0] for row in rows]
