"""Addresses of tensors for the native kernels, given only where a tensor is what the kernel takes it for.

A kernel knows no tensors: it reads and writes as far as the sizes in its call say. So each address in a call or in a
struct comes from here, with the dtype and the shape that the call says. Indices within tensors the kernels check
themselves (`native/common/checks.h`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def address(x: Tensor, operator: str, name: str, dtype: torch.dtype, *shape: int) -> int:
    """Where a contiguous tensor on the CPU begins.

    Raises ValueError that names operator and argument for a tensor that has not this dtype and this shape.
    """
    if x.dtype is not dtype or x.shape != shape or not x.is_contiguous() or not x.is_cpu:
        raise _unlike(x, operator, name, f"a contiguous {_form(dtype, shape)}")
    return x.data_ptr()


def rows_address(x: Tensor, operator: str, name: str, dtype: torch.dtype, *shape: int) -> int:
    """As `address`, of a tensor whose rows along the last dimension are contiguous and may lie apart."""
    if (
        x.dtype is not dtype
        or x.shape != shape
        or (x.stride()[-1] != 1 and shape[-1] > 1 and x.numel())
        or not x.is_cpu
    ):
        raise _unlike(x, operator, name, f"a {_form(dtype, shape)} with contiguous rows")
    return x.data_ptr()


def output(dtype: torch.dtype, *shape: int) -> tuple[Tensor, int]:
    """A new tensor for a kernel to fill, and its address."""
    x = torch.empty(*shape, dtype=dtype)  # torch takes a tuple of sizes twice as long to read
    return x, x.data_ptr()


def _unlike(x: Tensor, operator: str, name: str, wanted: str) -> ValueError:
    found = f"{_form(x.dtype, x.shape)} on {x.device} with strides {list(x.stride())}"
    return ValueError(f"{operator}: {name} is {found}; the native kernel takes {wanted} on the CPU")


def _form(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
