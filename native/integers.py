"""Integer arguments of C functions: a value out of the C type's range is refused, where ctypes would truncate it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from ctypes import c_int, c_int32, c_int64, c_uint32, c_uint64
from operator import itemgetter
from typing import Any, Final

RANGES: Final[dict[type[Any], tuple[int, int]]] = {
    c_int: (-(1 << 31), (1 << 31) - 1),
    c_int32: (-(1 << 31), (1 << 31) - 1),
    c_int64: (-(1 << 63), (1 << 63) - 1),
    c_uint32: (0, (1 << 32) - 1),
    c_uint64: (0, (1 << 64) - 1),
}
"""The least and the greatest value of each C type."""
_PACKED: Final[dict[type[Any], str]] = {
    c_int: "i",
    c_int32: "i",
    c_int64: "q",
    c_uint32: "I",
    c_uint64: "Q",
}  # with "=" of fixed sizes


def checked(value: int, kind: type, operator: str, name: str) -> int:
    """Return the value. Raises ValueError that names operator and argument for a value out of the C type's range."""
    least, most = RANGES[kind]
    if not least <= value <= most:
        raise ValueError(f"{operator}: {name} {_shown(value)} does not fit {8 * ctypes.sizeof(kind)} bits")
    return value


def int64_array(values: Iterable[int], operator: str, name: str) -> ctypes.Array[c_int64]:
    """Make an int64 array of whole numbers. Raises ValueError for one out of range."""
    numbers = [checked(value, c_int64, operator, name) for value in values]
    return (c_int64 * len(numbers))(*numbers)


class CallCheck:
    """Checks the integers of a function's calls by packing them all at once, which takes less time than comparisons."""

    def __init__(self, kinds: Sequence[type]):
        self._kinds = kinds
        places = [index for index, kind in enumerate(kinds) if kind in RANGES]
        if len(places) == 1:  # itemgetter of one item returns no tuple
            places *= 2
        self._pick = itemgetter(*places) if places else lambda arguments: ()
        self._pack = struct.Struct("=" + "".join(_PACKED[kinds[index]] for index in places)).pack

    def check(self, operator: str, arguments: Sequence[object]) -> None:
        """Raise ValueError that names operator and argument for an integer out of its C type's range."""
        try:
            self._pack(*self._pick(arguments))
        except struct.error:
            for index, (value, kind) in enumerate(zip(arguments, self._kinds, strict=True)):
                if kind in RANGES and isinstance(value, int):
                    checked(value, kind, operator, f"argument {index + 1}")


class Structure(ctypes.Structure):
    """A C struct whose integer fields raise ValueError for values out of range."""

    _integers_: dict[str, type]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._integers_ = {name: kind for name, kind in cls.__dict__["_fields_"] if kind in RANGES}

    def __setattr__(self, name: str, value: Any) -> None:
        kind = self._integers_.get(name)
        if kind is not None:
            checked(value, kind, type(self).__name__, name)
        super().__setattr__(name, value)


def _shown(value: int) -> str:
    # Python refuses to print integers of thousands of digits.
    return str(value) if value.bit_length() <= 128 else f"of {value.bit_length()} bits"
