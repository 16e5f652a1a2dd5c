"""Arguments of a step for native calls, checked once for all layers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....native.integers import int64_array
from ....native.pointers import address
from ..steps import Decode, Positions, Step


@dataclass(frozen=True)
class NativeStep:
    """Arguments of every layer's call.

    rows: addresses of cos, sin and slots. decode: lengths and block table of the decoding sequences. kept: the tensors
    behind the addresses.
    """

    step: Step
    tokens: int
    rope_dim: int
    rows: tuple[int, int, int]
    decode: tuple[object, ...]
    kept: tuple[Tensor, ...]


class StepArguments:
    """The arguments of the last step, checked once: all layers of a step share them. dtype: the compute dtype."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._last: NativeStep | None = None

    def of(self, operator: str, step: Step) -> NativeStep:
        """Arguments of a step. Raises ValueError for tensors of another size or not in the compute dtype."""
        if self._last is None or self._last.step is not step:
            self._last = _native_step(operator, step, self._dtype)
        return self._last


def _native_step(operator: str, step: Step, dtype: torch.dtype) -> NativeStep:
    rope_dim, rows, kept = row_arguments(operator, step.positions, dtype)
    tokens = step.positions.slots.shape[0]
    if step.decode is None:
        return NativeStep(step, tokens, rope_dim, rows, (), kept)
    table = step.decode.block_table.contiguous()
    decode = decode_arguments(operator, step.decode, table, tokens)
    return NativeStep(step, tokens, rope_dim, rows, decode, (*kept, table))


def row_arguments(
    operator: str, positions: Positions, dtype: torch.dtype
) -> tuple[int, tuple[int, int, int], tuple[Tensor, ...]]:
    """The width of cos and sin; their addresses and that of the slots; the tensors, which the caller keeps alive."""
    cos, sin, slots = positions.cos.contiguous(), positions.sin.contiguous(), positions.slots.contiguous()
    tokens, rope_dim = slots.shape[0], cos.shape[-1]
    rows = (
        address(cos, operator, "cos", dtype, tokens, rope_dim),
        address(sin, operator, "sin", dtype, tokens, rope_dim),
        address(slots, operator, "slots", torch.int64, tokens),
    )
    return rope_dim, rows, (cos, sin, slots)


def decode_arguments(operator: str, decode: Decode, table: Tensor, tokens: int) -> tuple[object, ...]:
    """Lengths and block table of a step's sequences. table: the contiguous block table; the caller keeps it alive."""
    sequences, width = len(decode.q_lens), table.shape[1]
    return (
        lengths(operator, "q_lens", decode.q_lens, sequences, tokens),
        lengths(operator, "kv_lens", decode.kv_lens, sequences),
        sequences,
        address(table, operator, "block_table", torch.int32, sequences, width),
        width,
    )


def lengths(
    operator: str, name: str, values: Sequence[int], sequences: int, total: int | None = None
) -> ctypes.Array[ctypes.c_int64]:
    """Array of a length for every sequence; cumulative ones end at `total`. Raises ValueError otherwise."""
    if len(values) != sequences or (total is not None and (values[-1] if values else 0) != total):
        rows = "" if total is None else f" and {total} rows"
        raise ValueError(f"{operator}: {name} {list(values)[:8]} do not fit {sequences} sequences{rows}")
    return int64_array(values, operator, name)
