"""Addresses of tensors and arrays for the native kernels, checked against the dtype and the shape of the call.

A kernel gets no tensors: the sizes in its call bound its reads and writes. So every address in a call or a struct comes
from here, checked against those sizes. The kernels themselves check indices into tensors (`native/common/checks.h`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..deferred import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_CACHE_LINE = 64


def address(x: Tensor, operator: str, name: str, dtype: torch.dtype, *shape: int) -> int:
    """The address of a contiguous CPU tensor.

    Raises ValueError that names operator and argument for a tensor of another dtype or shape.
    """
    if x.dtype is not dtype or x.shape != shape or not x.is_contiguous() or not x.is_cpu:
        raise _unlike(x, operator, name, f"a contiguous {_form(dtype, shape)}")
    return x.data_ptr()


def rows_address(x: Tensor, operator: str, name: str, dtype: torch.dtype, *shape: int) -> int:
    """The address of a tensor with contiguous rows along its last dimension and any stride between rows; errors as of
    `address`."""
    if (
        x.dtype is not dtype
        or x.shape != shape
        or (x.stride()[-1] != 1 and shape[-1] > 1 and x.numel())
        or not x.is_cpu
    ):
        raise _unlike(x, operator, name, f"a {_form(dtype, shape)} with contiguous rows")
    return x.data_ptr()


def strided_address(x: Tensor, operator: str, name: str, dtype: torch.dtype, *shape: int) -> int:
    """The address of a tensor with any strides, which are part of the call; errors as of `address`."""
    if x.dtype is not dtype or x.shape != shape or not x.is_cpu:
        raise _unlike(x, operator, name, f"a {_form(dtype, shape)}")
    return x.data_ptr()


def array_address(x: NDArray[Any], operator: str, name: str, dtype: type[np.generic], *shape: int) -> int:
    """The address of a contiguous numpy array; errors as of `address`."""
    if x.dtype != dtype or x.shape != shape or not x.flags.c_contiguous:
        raise ValueError(
            f"{operator}: {name} is {x.dtype} {list(x.shape)} with strides {list(x.strides)}; the native kernel takes "
            f"a contiguous {np.dtype(dtype)} {list(shape)}"
        )
    return int(x.ctypes.data)


def begins_a_cache_line(x: Tensor) -> bool:
    """True for a tensor whose first element begins a cache line of 64 bytes."""
    return x.data_ptr() % _CACHE_LINE == 0


def output(dtype: torch.dtype, *shape: int) -> tuple[Tensor, int]:
    """Make a tensor for a kernel to fill; returns it and its address."""
    x = torch.empty(*shape, dtype=dtype)  # a tuple of sizes takes torch twice as long
    return x, x.data_ptr()


def _unlike(x: Tensor, operator: str, name: str, wanted: str) -> ValueError:
    found = f"{_form(x.dtype, x.shape)} on {x.device} with strides {list(x.stride())}"
    return ValueError(f"{operator}: {name} is {found}; the native kernel takes {wanted} on the CPU")


def _form(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
