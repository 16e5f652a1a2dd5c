"""A whole number that its C type cannot hold is refused before the call: ctypes would cut off its high bits."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from npuq.native import binding as native
from npuq.native import library
from npuq.native.integers import RANGES, Structure, checked, int64_array
from npuq.runtime.attention.pools import Pool
from npuq.runtime.ops import Decode, Gating
from npuq.runtime.ops.native import NativeOps

from .cases import LEVELS

needs_library = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")
# What becomes 1 in 32 and in 64 bits.
WRAPPING = (1 << 64) + 1
INTEGERS = [
    (name, index) for name, kinds in library._SIGNATURES.items() for index, kind in enumerate(kinds) if kind in RANGES
]
FIELDS = [(struct, name) for struct in Structure.__subclasses__() for name, kind in struct._fields_ if kind in RANGES]


def _untouched(*arguments: object) -> NoReturn:
    raise AssertionError("the library was called")


@pytest.mark.parametrize(("name", "index"), INTEGERS, ids=[f"{name} {index + 1}" for name, index in INTEGERS])
def test_every_integer_of_every_call(name: str, index: int) -> None:
    kinds = library._SIGNATURES[name]
    arguments: list[Any] = [0 if kind in RANGES else None for kind in kinds]
    least, most = RANGES[kinds[index]]
    found: Any = SimpleNamespace(**{name: _untouched})
    operator = name.removeprefix("npuq_")
    for value in (least - 1, most + 1, WRAPPING, -WRAPPING):
        arguments[index] = value
        with pytest.raises(ValueError, match=rf"^{operator}: argument {index + 1} -?\d+ does not fit \d+ bits$"):
            library.call(found, operator, *arguments)
    for value in (least, most):
        arguments[index] = value
        with pytest.raises(AssertionError):
            library.call(found, operator, *arguments)


@pytest.mark.parametrize(("struct", "name"), FIELDS, ids=[f"{struct.__name__}.{name}" for struct, name in FIELDS])
def test_every_integer_of_every_struct(struct: type[Structure], name: str) -> None:
    least, most = RANGES[dict(struct._fields_)[name]]
    for value in (least - 1, most + 1, WRAPPING):
        with pytest.raises(ValueError, match=rf"^{struct.__name__}: {name} -?\d+ does not fit"):
            struct(**{name: value})
        with pytest.raises(ValueError, match="does not fit"):
            setattr(struct(), name, value)
    assert getattr(struct(**{name: most}), name) == most


def test_every_integer_type_of_the_interface_has_a_range() -> None:
    kinds = {kind for signature in library._SIGNATURES.values() for kind in signature}
    kinds |= {kind for struct in Structure.__subclasses__() for _, kind in struct._fields_}
    simple = {kind for kind in kinds if hasattr(kind, "_type_") and isinstance(kind._type_, str)}
    assert {kind for kind in simple if kind._type_ not in "PfdzZ"} <= RANGES.keys()
    for kind, (least, most) in RANGES.items():
        assert kind(least).value == least and kind(most).value == most
        assert kind(least - 1).value != least - 1 and kind(most + 1).value != most + 1


def test_arrays() -> None:
    assert list(int64_array([1, -(1 << 63)], "attention", "q_lens")) == [1, -(1 << 63)]
    with pytest.raises(ValueError, match=r"^attention: q_lens 18446744073709551617 does not fit 64 bits$"):
        int64_array([1, WRAPPING], "attention", "q_lens")


def test_a_number_that_python_does_not_print() -> None:
    with pytest.raises(ValueError, match=r"^pool: threads of 33220 bits does not fit 32 bits$"):
        checked(10**10_000, ctypes.c_int, "pool", "threads")


@needs_library
def test_threads() -> None:
    with pytest.raises(ValueError, match="pool: threads 4294967297 does not fit 32 bits"):
        native.Pool((1 << 32) + 1)


@needs_library
def test_operators() -> None:
    ops, x = NativeOps(threads=1), torch.ones(3, 4)
    for gating in (
        Gating(2, "softmax", WRAPPING, 1),
        Gating(2, "softmax", 2, WRAPPING),
        Gating(2, "softmax", 2, 1, 1 << 32),
    ):
        with pytest.raises(ValueError, match=r"gating_top_k: .* does not fit"):
            ops.routing.moe_gating_top_k(x, None, gating)
    cache = ops.caches.new((Pool("latent", 32), Pool("rope", 16)), 4, 16)
    decode = Decode((1,), (WRAPPING,), torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"attention_paged: kv_lens .* does not fit"):
        ops.mla.fused_infer_attention_paged(torch.ones(1, 2, 32), torch.ones(1, 2, 16), cache, decode, 0.2)
