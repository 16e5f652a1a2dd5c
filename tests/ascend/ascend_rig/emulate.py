"""Registers reference semantics for `torch.ops.npu.*` on CPU tensors, and checks every call made to them.

A call passes three gates: torch_npu's real schema (the dispatcher), the operator's own refusals (what the documentation
refuses), and torch_npu's shape and dtype rules (the same call on meta tensors must give what the semantics gave).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# ScalarType numbers, as an `int?` dtype argument of a schema arrives in an implementation.
SCALAR_TYPES = {1: torch.int8, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


class RefusedError(Exception):
    """The device, its documentation or torch_npu's own rules would refuse this call."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RefusedError(message)


@dataclass
class Rules:
    """How the emulation behaves.

    wide: float32 stands where the device computes in bf16, so that only the order of operations can differ.
    half_cube: the W4A8 cube results pass through fp16, as the device's do.
    refuses_fused_experts: the fused matmul of gate and up refuses the scale words of int4 weights.
    paired_scales: `npu_kv_rmsnorm_rope_cache` writes both caches in int8 or none, as torch_npu's page says.
    family: the chips whose documented limits hold, where A2 and A3 differ.
    """

    wide: bool = False
    half_cube: bool = False
    refuses_fused_experts: bool = False
    paired_scales: bool = False
    family: str = "A2"
    calls: Counter[str] = field(default_factory=Counter)
    arguments: dict[str, set[str]] = field(default_factory=dict)
    positional: Counter[str] = field(default_factory=Counter)

    @property
    def floats(self) -> tuple[torch.dtype, ...]:
        """Dtypes that the operators document for activations."""
        return (torch.bfloat16, torch.float16, torch.float32) if self.wide else (torch.bfloat16, torch.float16)


rules = Rules()

_semantics: dict[str, Callable[..., Any]] = {}
_without_meta = {"npu_format_cast", "get_npu_format"}


@contextmanager
def use_rules(**changes: Any) -> Iterator[Rules]:
    """Change the rules for a while, and count calls afresh."""
    saved = dict(vars(rules))
    vars(rules).update(calls=Counter(), arguments={}, positional=Counter(), **changes)
    try:
        yield rules
    finally:
        vars(rules).update(saved)


def semantics(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: `function` is what `torch.ops.npu.<its name>` computes. It takes only arguments that it covers."""
    _semantics[function.__name__] = function
    return function


def covered() -> list[str]:
    """Names of the operators that have semantics here."""
    return sorted(_semantics)


def register() -> torch.library.Library:
    """Register all semantics for CPU tensors; they last as long as the returned library."""
    library = torch.library.Library("npu", "IMPL")
    for name, function in _semantics.items():
        library.impl(name, _checked(name, function), "CPU")
    return library


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    operator = getattr(torch.ops.npu, name).default
    arguments = operator._schema.arguments
    takes = set(inspect.signature(function).parameters)
    unknown = takes - {argument.name for argument in arguments}
    if unknown:
        raise TypeError(f"{name} has no arguments {sorted(unknown)} in the installed torch_npu")

    promises: dict[Any, Any] = {}  # results on the meta device

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        for argument in arguments:
            if argument.name not in takes and argument.name in given:
                value = given[argument.name]
                require(_is_default(value, argument), f"{name}: {argument.name}={value!r} is not emulated")
        promised = None
        if name not in _without_meta:
            signature = _signature(args), _signature(kwargs)
            promised = promises.get(signature)
            if promised is None:  # torch_npu's rules are slow, and see shapes and dtypes alone
                promised = promises[signature] = operator(*_to_meta(args), **_to_meta(kwargs))
        result = function(**{key: value for key, value in given.items() if key in takes})
        if name not in _without_meta:
            found, promised = _shapes(result), _shapes(promised)
            require(found == promised, f"{name}: the semantics return {found}, torch_npu's shape rules {promised}")
        rules.calls[name] += 1
        return result

    return call


def _is_default(value: Any, argument: Any) -> bool:
    default = argument.default_value if argument.has_default_value() else None
    if isinstance(value, Tensor):
        return False
    return bool(value == default) or (value is None and default is None)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, dict):
        return {key: _to_meta(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_meta(item) for item in value)
    return value


def _signature(value: Any) -> Any:
    """What `_to_meta` keeps of arguments, as a key."""
    if isinstance(value, Tensor):
        return Tensor, value.shape, value.stride(), value.dtype
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *map(_signature, value)
    return type(value), value


def _shapes(result: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    tensors = [result] if isinstance(result, Tensor) else list(result or ())
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def dtype_of(number: int | None, default: torch.dtype) -> torch.dtype:
    """The dtype behind an `int?` dtype argument."""
    return default if number is None else SCALAR_TYPES[number]


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    """What an output that the device leaves unwritten looks like: NaN, or 111 where there is no NaN."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 111, dtype=dtype)
