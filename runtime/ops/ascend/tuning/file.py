"""The file of all tunings of a user: `tuning.json` in npuq's folder of the user's cache directory.

It is written by `npuq doctor --tune` and read when the ascend backend starts. What was measured holds for one kind of
chip with one CANN and one torch_npu: those are the key.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .....errors import BackendError
from .....inputs.json_text import read_object
from .grouped_matmul import Expectation, MatmulShape, Tuning, power_of_two

SCHEMA = 1
MOST_BYTES = 1 << 20
MOST_DEVICES = 64
MOST_CHOICES = 4096
MOST_TEXT = 100
MOST_EXPERTS = 1024  # of the operator
MOST_SIZE = 1 << 24


@dataclass(frozen=True)
class Device:
    """Device that a measurement holds for: the driver's name of the chip, CANN's version and torch_npu's."""

    name: str
    cann: str
    torch_npu: str


def tuned_device(torch_npu: ModuleType, device: torch.device) -> Device:
    """The key of an NPU of this machine."""
    npu = torch_npu.npu
    return Device(npu.get_device_name(device), str(npu.utils.get_cann_version()), torch_npu.__version__)


def tuning_path(environment: Mapping[str, str] = os.environ) -> Path:
    """The file: below XDG_CACHE_HOME, which is ~/.cache unless set to an absolute path.

    Raises BackendError where neither is known, as in a container whose user has no entry and no HOME.
    """
    base = Path(environment.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise BackendError("no home directory is known: set HOME or XDG_CACHE_HOME") from error
    return base / "npuq" / "tuning.json"


def read_tuning(path: Path, device: Device) -> Tuning:
    """The tuning of a device; an empty one without a file, or where the file has none for it.

    Raises BackendError for a file that this version of npuq would not have written.
    """
    return read_tunings(path).get(device, Tuning()) if _exists(path) else Tuning()


def read_tunings(path: Path) -> dict[Device, Tuning]:
    """All tunings of a file. Raises BackendError as `read_tuning` does."""
    content = read_object(path, BackendError, MOST_BYTES)
    read = _Reader(path)
    if content.get("schema") != SCHEMA or type(content.get("schema")) is not int:
        raise read.refused(f"schema is not {SCHEMA}")
    tunings = {}
    for entry in read.objects(content, "tunings", MOST_DEVICES):
        device = Device(*(read.text(entry, key) for key in ("device", "cann", "torch_npu")))
        tunings[device] = Tuning(dict(read.choice(each) for each in read.objects(entry, "choices", MOST_CHOICES)))
    return tunings


def write_tuning(path: Path, device: Device, tuning: Tuning) -> None:
    """Add a device's choices to the file; those of the same shapes are replaced, a file that is refused is too.

    Raises BackendError where the file cannot be written. It then is as it was.
    """
    try:
        tunings = read_tunings(path) if _exists(path) else {}
    except BackendError:
        tunings = {}
    earlier = tunings.pop(device, Tuning()).chosen
    tunings[device] = Tuning({**earlier, **tuning.chosen})
    kept = list(tunings.items())[-MOST_DEVICES:]
    text = json.dumps({"schema": SCHEMA, "tunings": [_entry(*each) for each in kept]}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BackendError(f"{path}: the tuning cannot be written: {error.strerror}") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that this user may not enter
        return False


def _entry(device: Device, tuning: Tuning) -> dict[str, Any]:
    choices = [{**vars(shape), "expect": each.value} for shape, each in list(tuning.chosen.items())[-MOST_CHOICES:]]
    return {"device": device.name, "cann": device.cann, "torch_npu": device.torch_npu, "choices": choices}


class _Reader:
    """Typed access to the objects of one file."""

    def __init__(self, path: Path):
        self._path = path

    def refused(self, why: str) -> BackendError:
        return BackendError(f"{self._path}: {why}; delete it, or run `npuq doctor --tune` again")

    def objects(self, holder: dict[str, Any], key: str, most: int) -> list[dict[str, Any]]:
        found = holder.get(key)
        if not isinstance(found, list) or len(found) > most or not all(isinstance(each, dict) for each in found):
            raise self.refused(f"{key} is no list of at most {most} objects")
        return found

    def text(self, holder: dict[str, Any], key: str) -> str:
        found = holder.get(key)
        if not isinstance(found, str) or len(found) > MOST_TEXT:
            raise self.refused(f"{key} is no text of at most {MOST_TEXT} characters")
        return found

    def size(self, holder: dict[str, Any], key: str, most: int = MOST_SIZE) -> int:
        found = holder.get(key)
        if type(found) is not int or not 0 < found <= most:
            raise self.refused(f"{key} is no whole number from 1 to {most}")
        return found

    def choice(self, holder: dict[str, Any]) -> tuple[MatmulShape, Expectation]:
        shape = MatmulShape(
            bits=self.size(holder, "bits", 8),
            experts=self.size(holder, "experts", MOST_EXPERTS),
            inputs=self.size(holder, "inputs"),
            outputs=self.size(holder, "outputs"),
            rows=self.size(holder, "rows"),
        )
        expect = holder.get("expect")
        if shape.bits not in (4, 8) or shape.rows != power_of_two(shape.rows):
            raise self.refused("a shape is not of 4 or 8 bits, or its rows are no power of two")
        if not isinstance(expect, str) or expect not in [each.value for each in Expectation]:
            raise self.refused(f"expect is none of {', '.join(each.value for each in Expectation)}")
        return shape, Expectation(expect)
