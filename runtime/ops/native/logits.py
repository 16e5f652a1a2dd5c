"""Logits whose tokens are drawn by a native kernel. It gives the tokens of `sampling/draw.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ....native.binding import Draw, Pool
from ....native.pointers import address
from ...sampling.noise import Noise
from ...sampling.params import SamplingParams
from ...sampling.rows import Floats, HostRow, LogitRow

_MOST_LOGITS: Final = 1 << 22
"""The widest row of the kernel, in which sums of likelihoods are exact."""


class NativeRow(HostRow):
    """A row of logits, float32 `[vocab]` on the CPU. See `LogitRow`."""

    def __init__(self, logits: Tensor, pool: Pool):
        super().__init__(logits.numpy())
        self._tensor, self._pool = logits, pool

    def total(self, temperature: float) -> float:
        if not 0 < self.size <= _MOST_LOGITS:
            return super().total(temperature)
        found = ctypes.c_double()
        logits = address(self._tensor, "likelihood_sum", "logits", torch.float32, self.size)
        self._pool.call("likelihood_sum", logits, self.size, temperature, ctypes.byref(found))
        return found.value

    def draw(self, params: SamplingParams, noise: Noise, position: int) -> int:
        if not 0 < self.size <= _MOST_LOGITS:
            return super().draw(params, noise, position)
        token = ctypes.c_int64()
        wanted = Draw(
            params.temperature,
            params.top_p,
            params.min_p,
            min(params.top_k, self.size),
            noise.seed % 2**64,
            noise.choice,
            position,
        )
        logits = address(self._tensor, "draw_token", "logits", torch.float32, self.size)
        self._pool.call("draw_token", logits, self.size, ctypes.byref(wanted), ctypes.byref(token))
        return token.value

    def with_logits(self, logits: Floats) -> LogitRow:
        return NativeRow(torch.from_numpy(logits), self._pool)


def native_rows(logits: Tensor, pool: Pool) -> Sequence[LogitRow]:
    """Rows of logits `[S, vocab]` of any dtype on the CPU."""
    return [NativeRow(row, pool) for row in logits.to("cpu", torch.float32).contiguous()]
