"""Dtypes under the codes of safetensors: their sizes, and their names in torch and in numpy.

numpy has no bfloat16 and no FP8: arrays of those hold their bits, as unsigned integers of the same size.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .deferred import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Code → the name in torch, the name in numpy.
_NAMES: Final = {
    "BOOL": ("bool", "bool"),
    "U8": ("uint8", "uint8"),
    "I8": ("int8", "int8"),
    "F8_E4M3": ("float8_e4m3fn", "uint8"),
    "F8_E5M2": ("float8_e5m2", "uint8"),
    "F8_E8M0": ("float8_e8m0fnu", "uint8"),
    "I16": ("int16", "int16"),
    "F16": ("float16", "float16"),
    "BF16": ("bfloat16", "uint16"),
    "I32": ("int32", "int32"),
    "F32": ("float32", "float32"),
    "I64": ("int64", "int64"),
    "F64": ("float64", "float64"),
}
CODES: Final = tuple(_NAMES)
ITEM_BYTES: Final = {code: np.dtype(name).itemsize for code, (_, name) in _NAMES.items()}
# The dtypes of float weights.
FLOAT_CODES: Final = ("BF16", "F16", "F32")


def torch_name(code: str) -> str:
    """The name of a code's dtype in torch, and in a config.json."""
    return _NAMES[code][0]


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a code."""
    dtype: torch.dtype = getattr(torch, torch_name(code))
    return dtype


@cache
def code_of(dtype: torch.dtype) -> str:
    """The code of a torch dtype. KeyError for one that safetensors does not have."""
    return {torch_dtype(code): code for code in CODES}[dtype]


@cache
def array_dtype(code: str) -> np.dtype[Any]:
    """The numpy dtype of an array with a code's bits."""
    return np.dtype(_NAMES[code][1])


@cache
def array_code(dtype: np.dtype[Any]) -> str:
    """The code of a numpy dtype, as the numbers that it says. KeyError for one that safetensors does not have."""
    return {np.dtype(name): code for code, (torch_name, name) in _NAMES.items() if torch_name == name}[dtype]


def to_float32(stored: NDArray[Any], code: str) -> NDArray[np.float32]:
    """Decode an array with the bits of a float code, BF16, F16, F32 or F8_E8M0, to the same numbers in float32."""
    if code == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if code == "F8_E8M0":
        # A power of two, 2^(b − 127): float32 has the least of them as a subnormal, and 255 is no number.
        bits = np.where(stored == 0, 1 << 22, stored.astype(np.uint32) << 23).astype(np.uint32)
        return np.where(stored == 255, np.float32("nan"), bits.view(np.float32))
    if code not in FLOAT_CODES:
        raise ValueError(f"{code} has no float32")
    return stored.astype(np.float32)
