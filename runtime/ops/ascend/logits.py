"""Logits that stay on the NPU: the best of each row go to the host, in one copy for all rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...sampling.draw import draw
from ...sampling.noise import Noise
from ...sampling.params import SamplingParams
from ...sampling.rows import Floats, HostRow, Ids, LogitRow

COUNTS = (64, 1024, 8192)
"""How many of the best are copied: a greedy token takes one, sampling by top-p 1,024 and at times 8,192."""
MOST_TEMPERATURES = 4
"""Temperatures for which all rows are summed at once. A row with a further one is summed alone, so that a step whose
rows all differ does not sum every row for each of them."""


class DeviceRows:
    """The rows of a step on the device. logits: `[S, vocab]`. What one row asks for is copied for all."""

    def __init__(self, logits: Tensor):
        self.logits = logits
        # No caches that refer to this object: the device's memory is free when the step's last row is.
        self._bests: dict[int, tuple[Floats, Ids]] = {}
        self._totals: dict[float, Tensor] = {}

    def best(self, count: int) -> tuple[Floats, Ids]:
        """The best logits and their tokens `[S, count]`, highest first and equal ones by id.

        Of equal logits on the last places the device takes any. The first is NaN if any logit is no number.
        """
        if count not in self._bests:
            self._bests[count] = self._copied(count)
        return self._bests[count]

    def total(self, index: int, temperature: float) -> float:
        """Σ exp((logit - highest) / temperature) of one row."""
        if temperature not in self._totals and len(self._totals) < MOST_TEMPERATURES:
            self._totals[temperature] = _totals(self.logits, temperature)
        if temperature in self._totals:
            return float(self._totals[temperature][index])
        return float(_totals(self.logits[index], temperature))

    def _copied(self, count: int) -> tuple[Floats, Ids]:
        values, ids = self.logits.topk(count, dim=-1)
        # A sum of zeros, unless a logit is no number: where that ranks among the best differs by device.
        check = (self.logits.float() * 0).sum(-1, keepdim=True)
        numbers = torch.cat([values.float(), check, ids.to(torch.int32).view(torch.float32)], dim=1)
        copied = numbers.to("cpu").numpy()
        found, tokens = copied[:, :count], copied[:, count + 1 :].view(np.int32).astype(np.int64)
        order = np.lexsort((tokens, -found), axis=-1)
        found, tokens = (np.take_along_axis(each, order, axis=-1) for each in (found, tokens))
        found[~np.isfinite(copied[:, count]), 0] = np.nan
        return found, tokens


def _totals(logits: Tensor, temperature: float) -> Tensor:
    limits = torch.finfo(torch.float32)
    divisor = min(max(temperature, limits.tiny), limits.max)
    wide = logits.float()
    return ((wide - wide.amax(-1, keepdim=True)) / divisor).exp().sum(-1).to("cpu")


class DeviceRow:
    """One of them. See `LogitRow`."""

    def __init__(self, rows: DeviceRows, index: int):
        self._rows, self._index = rows, index

    @property
    def size(self) -> int:
        return self._rows.logits.shape[1]

    def best(self, count: int) -> tuple[Floats, Ids]:
        held = next((min(held, self.size) for held in COUNTS if min(count, self.size) <= held), None)
        if held is None:
            return self._host.best(count)
        values, ids = self._rows.best(held)
        return values[self._index, :count], ids[self._index, :count]

    def at(self, ids: Ids) -> Floats:
        places = torch.from_numpy(np.ascontiguousarray(ids)).to(self._rows.logits.device)
        chosen: Floats = self._rows.logits[self._index].index_select(0, places).to("cpu", torch.float32).numpy()
        return chosen

    def total(self, temperature: float) -> float:
        return self._rows.total(self._index, temperature)

    def whole(self) -> Floats:
        return self._host.whole()

    def draw(self, params: SamplingParams, noise: Noise, position: int) -> int:
        return draw(self, params, noise, position)

    def with_logits(self, logits: Floats) -> LogitRow:
        return HostRow(logits)

    @cached_property
    def _host(self) -> HostRow:
        return HostRow(self._rows.logits[self._index].to("cpu", torch.float32).numpy())


def device_rows(logits: Tensor) -> Sequence[LogitRow]:
    """Rows of logits `[S, vocab]` on the device."""
    rows = DeviceRows(logits)
    return [DeviceRow(rows, index) for index in range(logits.shape[0])]
