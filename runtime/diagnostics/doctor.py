"""Diagnosis of this machine: versions, CANN, driver, devices, operators, and a model's fit to an NPU.

A machine without an NPU is a finding, not an error.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import BackendError
from ...inputs.files import read_bytes
from ...inputs.printable import error_line
from .model_fit import ModelFit, fit, message_of

DRIVER_VERSION_FILES = ("/usr/local/Ascend/driver/version.info",)
_MOST_VERSION_BYTES = 1 << 16


@dataclass(frozen=True)
class Device:
    """One NPU. Memory in bytes. problem: why npuq cannot run on it, or None."""

    index: int
    name: str
    family: str | None
    total_memory_bytes: int
    free_memory_bytes: int
    problem: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Findings about this machine.

    kernels: description of the CPU's native library. ready: the ascend backend can be used; if not, `problem` says why.
    operators: schemas by name, None for an operator that the installed torch_npu lacks; empty without torch_npu.
    """

    npuq: str
    python: str
    platform: str
    kernels: str
    torch: str | None
    torch_npu: str | None
    cann: str | None
    driver: str | None
    ready: bool
    problem: str | None
    devices: tuple[Device, ...] = ()
    operators: dict[str, str | None] = field(default_factory=dict)
    model: ModelFit | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def cann_version_files(environment: Mapping[str, str]) -> list[str]:
    """Files that may tell the version of CANN's toolkit, the likeliest first.

    `ASCEND_HOME_PATH` is what CANN's set_env.sh exports. The default folder is `Ascend/cann` since CANN 8.5, and
    `Ascend/ascend-toolkit/latest` before.
    """
    own = environment.get("HOME", "")
    homes = [environment.get("ASCEND_HOME_PATH", ""), "/usr/local/Ascend/cann", own and f"{own}/Ascend/cann"]
    homes += ["/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/latest"]
    files = (f"{platform.machine()}-linux/ascend_toolkit_install.info", "version.cfg", "compiler/version.info")
    return [f"{home}/{file}" for home in homes if home for file in files]


def examine(model: Path | None = None, family: str | None = None) -> Diagnosis:
    """Examine this machine, and with `model` the fit of that directory, of unknown model_type read as of `family`."""
    from ... import __version__
    from ...native.library import description

    torch_npu, problem = _torch_npu()
    devices: tuple[Device, ...] = ()
    if torch_npu is not None:
        try:
            devices = _devices(torch_npu)
        except RuntimeError as error:  # a driver that does not answer
            problem = f"torch_npu cannot count the NPUs: {error_line(error)}"
    if problem is None and not devices:
        problem = "no NPU is visible: check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES"
    usable = [device for device in devices if device.problem is None]
    if problem is None and not usable:
        problem = devices[0].problem
    return Diagnosis(
        npuq=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        kernels=description(),
        torch=_version("torch"),
        torch_npu=_version("torch_npu"),
        cann=_first_version(cann_version_files(os.environ)),
        driver=_first_version(DRIVER_VERSION_FILES),
        ready=problem is None,
        problem=problem,
        devices=devices,
        operators={} if torch_npu is None else _operators(),
        model=None if model is None else fit(model, [device.total_memory_bytes for device in usable], family),
    )


def _torch_npu() -> tuple[ModuleType | None, str | None]:
    """(torch_npu, None), or (None, the reason why it cannot be used)."""
    from ..ops.ascend.support import check_installation, import_torch_npu
    from .trial_import import trial_import

    try:
        trial_import("torch_npu", check_installation())
        return import_torch_npu(), None
    except BackendError as error:
        return None, str(error)


def npu_memories() -> list[int]:
    """Bytes of memory of each NPU of this machine that npuq can run on."""
    torch_npu, _ = _torch_npu()
    try:
        found = () if torch_npu is None else _devices(torch_npu)
    except RuntimeError:
        found = ()
    return [device.total_memory_bytes for device in found if device.problem is None]


def _devices(torch_npu: ModuleType) -> tuple[Device, ...]:
    return tuple(_device(torch_npu, index) for index in range(torch_npu.npu.device_count()))


def _device(torch_npu: ModuleType, index: int) -> Device:
    from ..ops.ascend.support import require_soc, soc_of

    try:
        name = str(torch_npu.npu.get_device_name(index))
        free, total = torch_npu.npu.mem_get_info(index)
    except RuntimeError as error:  # a device that another process holds, or that is faulty
        return Device(index, "unknown", None, 0, 0, error_line(error))
    try:
        family = soc_of(name).family
    except BackendError:
        family = None
    return Device(index, name, family, total, free, message_of(require_soc, name))


def _operators() -> dict[str, str | None]:
    """Schemas of all operators that the backend calls, by name."""
    import torch

    from ..ops.ascend.support import OPERATORS

    found: dict[str, str | None] = {}
    for name in OPERATORS:
        packet = getattr(torch.ops.npu, name, None)
        found[name] = None if packet is None else str(packet.default._schema)
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_version(files: Iterable[str]) -> str | None:
    """First version number in the first of the files that exists."""
    for path in map(Path, files):
        try:
            there = path.is_file()
        except OSError:  # no name of a file, or below a folder that this user may not enter
            continue
        if there:
            try:
                text = read_bytes(path, BackendError, _MOST_VERSION_BYTES).decode(errors="replace")
            except BackendError:
                return "unknown"
            match = re.search(r"(?im)^[^#\n]*version[^=:\n]*[=:]\s*\[?[^0-9\n]*([0-9][\w.]*)", text)
            return match[1] if match else "unknown"
    return None
