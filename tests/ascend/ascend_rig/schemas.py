"""Operator schemas of torch_npu wheels, read without importing them, and whether the runtime's calls fit."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch

LIBRARY = "torch_npu/lib/libtorch_npu.so"


class Call(TypedDict):
    """How the runtime calls an operator: how many arguments by position, the names of all that it gives, and of those
    that may be None."""

    positional: int
    arguments: list[str]
    none: list[str]


def wheel_version(wheel: Path) -> str:
    """ "2.13.0" of torch_npu-2.13.0-cp311-….whl."""
    return wheel.name.split("-")[1]


def schemas_of_wheel(wheel: Path, operators: Iterable[str]) -> dict[str, str]:
    """The schema strings that the library registers its operators with; an operator that is not there is left out."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(LIBRARY)
    found = {}
    for operator in operators:
        match = re.search(rb"\0(?:npu::)?(" + operator.encode() + rb"\([^\0]*\) -> [^\0]*)\0", library)
        if match is not None:
            found[operator] = normal(match[1].decode())
    return found


def installed_schema(operator: str) -> str:
    """The schema in the torch_npu that is imported."""
    return normal(str(getattr(torch.ops.npu, operator).default._schema))


def normal(text: str) -> str:
    """One spelling of a schema, as torch itself prints it."""
    name = text.removeprefix("npu::")
    return str(torch._C.parse_schema(f"npu::{name}")).removeprefix("npu::")


def misfits(call: Call, ours: str, theirs: str | None) -> list[str]:
    """What is wrong with calling `theirs` as the runtime, written against `ours`, does; empty where it fits."""
    if theirs is None:
        return ["is missing"]
    known = {argument.name: argument for argument in arguments(ours)}
    offered = {argument.name: argument for argument in arguments(theirs)}
    problems = []
    for name in call["arguments"]:
        if name not in offered:
            problems.append(f"has no argument {name}")
        elif str(offered[name].type) != str(known[name].type) and (
            name in call["none"] or str(known[name].type) != f"Optional[{offered[name].type}]"
        ):
            problems.append(f"{name} is {offered[name].type}, not {known[name].type}")
    order, offered_order = [list(names)[: call["positional"]] for names in (known, offered)]
    if order != offered_order:
        problems.append(f"positional arguments are {', '.join(offered_order)}")
    needed = [name for name, argument in offered.items() if not has_default(argument)]
    problems += [f"needs {name}" for name in needed if name not in call["arguments"]]
    returned, expected = (len(torch._C.parse_schema(f"npu::{text}").returns) for text in (theirs, ours))
    if returned != expected:
        problems.append(f"returns {returned} values, not {expected}")
    return problems


def arguments(schema: str) -> list[Any]:
    parsed: Any = torch._C.parse_schema(f"npu::{schema}")
    return list(parsed.arguments)


def has_default(argument: Any) -> bool:
    return bool(argument.has_default_value())


def fit_table(calls: Mapping[str, Call], versions: Mapping[str, Mapping[str, str]], ours: str) -> dict[str, list[str]]:
    """For each version the misfits of all calls, as lines."""
    return {
        version: [
            f"{operator} {problem}"
            for operator, call in sorted(calls.items())
            for problem in misfits(call, versions[ours][operator], schemas.get(operator))
        ]
        for version, schemas in versions.items()
    }
