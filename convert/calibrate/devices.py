"""The device of a walk's matrix work: the processor's kernels, or torch on an accelerator."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from ...deferred import torch
from ...errors import ConversionError

if TYPE_CHECKING:
    from ...quant.arithmetic import Arithmetic


class Device(str, Enum):
    """Where products, Hessians, their factors and codes are computed. Attention's scores and norms stay on the CPU."""

    CPU = "cpu"
    CUDA = "cuda"
    NPU = "npu"


def arithmetic_on(device: Device) -> Arithmetic:
    """The arithmetic of a device. Raises ConversionError where torch finds no such device, BackendError
    where torch_npu is missing or does not start."""
    from ...native.calibration import calibration_arithmetic
    from ...quant.arithmetic import TorchArithmetic
    from ...runtime.ops.ascend.support import import_torch_npu

    if device is Device.CPU:
        return calibration_arithmetic()
    if device is Device.NPU:
        import_torch_npu()  # registers the device with torch
    module = getattr(torch, device.value, None)
    if module is None or not module.is_available():
        raise ConversionError(
            f"--device {device.value}: torch finds no such device here; leave the option out for the CPU"
        )
    return TorchArithmetic(device.value)
