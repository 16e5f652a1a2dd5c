"""The exact scale of least squared error for a row of int4 codes.

For a row w and codes q, the best scale is A / B with A = Σ w·q and B = Σ q², and its error is Σ w² − A² / B. So the
row's optimum is the largest A² / B over all codes that rounding by some scale s can give. As s falls, each element
climbs from code m − 1 to m when |w| reaches (m − ½)·s: A grows by |w| and B by 2m − 1. Walking these breakpoints in
order visits every state: for each weight as many as there are codes. The search below finds the optimum with far fewer
visits:

- Take two scales s_hi > s_lo with states (A_hi, B_hi) and (A_lo, B_lo), and a state (A_hi + α, B_hi + β) between them.
  Every breakpoint in between has |w| = (2m − 1)/2 · s with s ≤ s_hi, so that α ≤ β·s_hi / 2; by the same argument from
  below, α ≤ (A_lo − A_hi) − (B_lo − B_hi − β)·s_lo / 2. (A_hi + α)² / (B_hi + β) is convex along each of the two lines,
  so its largest value is at an end or at their crossing: an upper bound with a slack of second order in the interval's
  width.
- Intervals with a bound below the best state seen are dropped, the others are divided once more, and the breakpoints of
  the few that remain are walked one by one.
- Scales at which the clipped part alone costs more than the best state's error are not searched.

Weights are integers here (24-bit fixed point under the row's largest), breakpoints are compared as exact integers and
A and B are exact sums: the result does not depend on the order of summation, and every implementation finds the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..deferred import torch

if TYPE_CHECKING:
    from torch import Tensor

# κ = ⌊|w| · UNIT / (2m − 1)⌋ identifies a breakpoint: half the scale in a fixed unit. Two different quotients with
# denominators up to 15 differ by more than 2 / UNIT, so κ orders them exactly, and equal ones have equal κ.
UNIT = 1 << 17
_ROW_SHIFT = 24  # magnitudes are below 2**24: `row << 24 | magnitude` orders a whole block of rows at once
_KAPPA_BITS = _ROW_SHIFT + 17

_FINE_BLOCK = 64
_SUBDIVISIONS = 8
# A look-up costs as much as rounding this many weights.
_DIRECT = 6
# Float64 rounding of A² / B is below this: an interval whose bound is this close below the best may hold the optimum.
_SLACK = 1 - 1e-12


# Breakpoints of a negative weight; a positive one has one less.
_LEVELS = 8
# The grid goes from the largest scale with a code other than 0, 2 · max|w|, in steps of _COARSE down to _TURN times the
# min-max scale, and from there, where optima lie, in steps of _FINE until clipping alone rules the rest out. The steps
# balance look-ups against the bound's slack, half the step squared, which must be small beside the relative error that
# the codes leave (about 1 %).
_COARSE, _TURN, _FINE = 1.05, 1.4, 1.01
_BLOCK_ELEMENTS, _BLOCK_ROWS = 1 << 20, 4096


def optimal_scale(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Find each row's best state: A = Σ w·q and B = Σ q², int64 [R]; its scale is A / B. Zero rows give (0, 0).

    `weights` int32 [R, K], |w| < 2**24, K ≤ 2**17. Of states with equal A² / B (in float64) the one of smallest B
    (largest scale) is taken.
    """
    rows_per_block = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(1, weights.shape[1])))
    parts = [_optimal_block(block) for block in weights.split(rows_per_block)]
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])


def _optimal_block(weights: Tensor) -> tuple[Tensor, Tensor]:
    table = _SortedRows(weights)
    best = _Best(weights.shape[0])
    live = torch.nonzero(table.largest).flatten()
    intervals = _first_grid(table, best, live).keep(best)
    intervals = _subdivide(table, best, intervals).keep(best)
    _walk(table, best, intervals)
    return best.a, best.b


class _SortedRows:
    """Sorted magnitudes of a block of rows with running sums: the state at any scale takes a few look-ups."""

    def __init__(self, weights: Tensor):
        rows, columns = weights.shape
        self.odd = torch.arange(1, 2 * _LEVELS, 2)
        magnitude = weights.abs()
        self.columns = columns
        self.largest = magnitude.amax(1).to(torch.int64) if columns else torch.zeros(rows, dtype=torch.int64)
        self.squares = (weights.to(torch.int64) ** 2).sum(1).to(torch.float64).abs()  # 2**63 wraps to its negative
        self._keys, self._sums = self._sorted(magnitude)
        # Only negative weights reach the last code: positive ones become zeros, which never pass a threshold.
        self._negative_keys, self._negative_sums = self._sorted(magnitude.where(weights < 0, 0))
        self._magnitude = magnitude.to(torch.float64) * UNIT
        self._limit = torch.where(weights < 0, float(_LEVELS), float(_LEVELS - 1))

    def _sorted(self, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        ordered = torch.from_numpy(np.sort(magnitude.numpy(), axis=1)).to(torch.int64)
        sums = torch.zeros(ordered.numel() + 1, dtype=torch.int64)
        torch.cumsum(ordered.flatten(), 0, out=sums[1:])
        rows = torch.arange(ordered.shape[0])[:, None]
        return (rows << _ROW_SHIFT | ordered).flatten(), sums

    def magnitudes(self, positions: Tensor, negative: Tensor) -> Tensor:
        keys = torch.where(negative, self._negative_keys[positions], self._keys[positions])
        return keys & ((1 << _ROW_SHIFT) - 1)

    def positions(self, rows: Tensor, kappa: Tensor) -> Tensor:
        """int64 [..., levels]: for each breakpoint order m the first sorted position at or above it."""
        # |w| · UNIT / (2m − 1) ≥ κ; the quotient is rounded up, in integers.
        threshold = -torch.div(-kappa[..., None] * self.odd, UNIT, rounding_mode="floor")
        keys = (rows[..., None] << _ROW_SHIFT) + threshold.clamp(max=(1 << _ROW_SHIFT) - 1)
        found = torch.empty_like(keys)
        found[..., :-1] = torch.searchsorted(self._keys, keys[..., :-1].contiguous())
        found[..., -1] = torch.searchsorted(self._negative_keys, keys[..., -1].contiguous())
        return found

    def states(self, rows: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """A and B, int64 [M, C], of rows [M] after every breakpoint at or above κ [M, C]."""
        if self.columns > _DIRECT * _LEVELS:
            return self._states_by_lookup(rows[:, None].expand_as(kappa), kappa)
        return self._states_by_rounding(rows, kappa)

    def _states_by_rounding(self, rows: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
        magnitude, limit = self._magnitude[rows], self._limit[rows]
        a, b = torch.empty_like(kappa), torch.empty_like(kappa)
        codes = torch.empty_like(magnitude)
        for column in range(kappa.shape[1]):
            # An odd quotient 2m − 1 is met exactly or missed by 2**-41 at least, far more than float64 rounds by.
            torch.div(magnitude, kappa[:, column, None], out=codes).add_(1).mul_(0.5).floor_()
            torch.minimum(codes, limit, out=codes)
            a[:, column] = torch.bmm(magnitude[:, None, :], codes[:, :, None]).flatten() / UNIT
            b[:, column] = torch.bmm(codes[:, None, :], codes[:, :, None]).flatten()
        return a, b

    def _states_by_lookup(self, rows: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.positions(rows, kappa)
        end = (rows + 1) * self.columns
        a = (_LEVELS - 1) * self._sums[end] - self._sums[positions[..., :-1]].sum(-1)
        a += self._negative_sums[end] - self._negative_sums[positions[..., -1]]
        return a, ((end[..., None] - positions) * self.odd).sum(-1)

    def clipped_error(self, rows: Tensor, kappa: Tensor) -> Tensor:
        """A lower bound, float64, of Σ (|w| − c·s)² over |w| > c·s with the last code c: (Σ|w| − c·s·n)² / n."""
        limit = kappa.to(torch.float64) * (2 * _LEVELS / UNIT)
        threshold = limit.ceil().clamp(max=(1 << _ROW_SHIFT) - 1).to(torch.int64)
        start = torch.searchsorted(self._keys, (rows << _ROW_SHIFT) + threshold)
        end = (rows + 1) * self.columns
        count = (end - start).to(torch.float64)
        excess = (self._sums[end] - self._sums[start]).to(torch.float64) - limit * count
        return torch.where(count > 0, excess.clamp(min=0) ** 2 / count.clamp(min=1), 0.0)


class _Best:
    """The best state of each row so far."""

    def __init__(self, rows: int):
        self.a = torch.zeros(rows, dtype=torch.int64)
        self.b = torch.zeros(rows, dtype=torch.int64)
        self.score = torch.zeros(rows, dtype=torch.float64)

    def update(self, rows: Tensor, a: Tensor, b: Tensor) -> None:
        """Offer states [M] of the given rows."""
        found = score(a, b)
        self.score.scatter_reduce_(0, rows, found, "amax")
        smallest = torch.full_like(self.b, torch.iinfo(torch.int64).max)
        current = score(self.a, self.b) == self.score
        smallest[current] = self.b[current]
        hit = found == self.score[rows]
        rows, a, b = rows[hit], a[hit], b[hit]
        smallest.scatter_reduce_(0, rows, b, "amin")
        chosen = b == smallest[rows]
        self.a[rows[chosen]] = a[chosen]
        self.b = smallest


@dataclass(frozen=True)
class _Intervals:
    """Intervals of scales (κ_lo, κ_hi], each with its row, the state at its upper end, and a bound."""

    rows: Tensor
    kappa_hi: Tensor
    kappa_lo: Tensor
    a_hi: Tensor
    b_hi: Tensor
    bound: Tensor

    def keep(self, best: _Best) -> _Intervals:
        kept = self.bound >= best.score[self.rows] * _SLACK
        return _Intervals(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


def score(a: Tensor, b: Tensor) -> Tensor:
    """A² / B in float64; 0 above the first breakpoint."""
    real = a.to(torch.float64)
    return torch.where(b > 0, real * real / b.clamp(min=1).to(torch.float64), 0.0)


def _intervals(table: _SortedRows, best: _Best, rows: Tensor, kappa: Tensor) -> _Intervals:
    """Make the intervals between consecutive columns of falling κ int64 [M, C], for rows [M], and offer their
    states."""
    each_row = rows[:, None].expand_as(kappa)
    a, b = table.states(rows, kappa)
    best.update(each_row.flatten(), a.flatten(), b.flatten())
    half = kappa.to(torch.float64) / UNIT
    bound = interval_bound(half[:, :-1], half[:, 1:], a[:, :-1], a[:, 1:], b[:, :-1], b[:, 1:])
    return _Intervals(
        each_row[:, 1:].flatten(),
        kappa[:, :-1].flatten(),
        kappa[:, 1:].flatten(),
        a[:, :-1].flatten(),
        b[:, :-1].flatten(),
        bound.flatten(),
    )


def interval_bound(half_hi: Tensor, half_lo: Tensor, a_hi: Tensor, a_lo: Tensor, b_hi: Tensor, b_lo: Tensor) -> Tensor:
    """An upper bound, float64, of A² / B over the states between two half scales, float64, with these states, int64;
    all of one shape. The module's docstring derives it."""
    alpha, beta = (a_lo - a_hi).to(torch.float64), (b_lo - b_hi).to(torch.float64)
    crossing = ((alpha - beta * half_lo) / (half_hi - half_lo).clamp(min=1e-300)).clamp(min=0).minimum(beta)
    b = b_hi.to(torch.float64) + crossing
    a = a_hi.to(torch.float64) + crossing * half_hi
    kink = torch.where(b > 0, a * a / b.clamp(min=1e-300), 0.0)
    return torch.maximum(kink, torch.maximum(score(a_hi, b_hi), score(a_lo, b_lo)))


def _first_grid(table: _SortedRows, best: _Best, rows: Tensor) -> _Intervals:
    top = table.largest[rows] * UNIT  # κ of the first breakpoint: the largest weight reaches code 1
    span = 2 * (_LEVELS - 1) / _TURN
    coarse = _COARSE ** -torch.arange(math.ceil(math.log(span, _COARSE)) + 1, dtype=torch.float64)
    kappa = (top[:, None].to(torch.float64) * coarse).to(torch.int64).clamp(min=1)
    found = [_intervals(table, best, rows, kappa)]
    steps = _FINE ** -torch.arange(_FINE_BLOCK + 1, dtype=torch.float64)
    last = kappa[:, -1]
    while rows.numel():
        found[-1] = found[-1].keep(best)
        error = table.squares[rows] - best.score[rows]
        going = (table.clipped_error(rows, last) <= error) & (last > 1)
        rows, last = rows[going], last[going]
        if rows.numel():
            kappa = (last[:, None].to(torch.float64) * steps).to(torch.int64).clamp(min=1)
            kappa[:, 0] = last
            found.append(_intervals(table, best, rows, kappa))
            last = kappa[:, -1]
    names = _Intervals.__dataclass_fields__
    return _Intervals(*(torch.cat([getattr(part, name) for part in found]) for name in names))


def _subdivide(table: _SortedRows, best: _Best, intervals: _Intervals) -> _Intervals:
    fractions = torch.arange(_SUBDIVISIONS + 1, dtype=torch.float64) / _SUBDIVISIONS
    width = (intervals.kappa_hi - intervals.kappa_lo).to(torch.float64)
    kappa = intervals.kappa_hi[:, None] - (width[:, None] * fractions).to(torch.int64)
    kappa[:, -1] = intervals.kappa_lo
    return _intervals(table, best, intervals.rows, kappa)


def _walk(table: _SortedRows, best: _Best, intervals: _Intervals) -> None:
    """Offer every state inside the intervals to `best`, breakpoint by breakpoint."""
    positions = table.positions(intervals.rows, intervals.kappa_lo)  # [M, levels]
    counts = table.positions(intervals.rows, intervals.kappa_hi) - positions
    flat = counts.flatten()
    total = int(flat.sum())
    if total == 0:
        return
    slot = torch.repeat_interleave(torch.arange(flat.numel()), flat, output_size=total)
    offset = torch.arange(total) - (flat.cumsum(0) - flat)[slot]
    interval, level = slot // _LEVELS, slot % _LEVELS
    odd = 2 * level + 1
    magnitude = table.magnitudes(positions.flatten()[slot] + offset, level == _LEVELS - 1)
    kappa = torch.div(magnitude * UNIT, odd, rounding_mode="floor")
    # One key that orders by interval, then by falling κ.
    order, index = (interval << _KAPPA_BITS | (1 << _KAPPA_BITS) - 1 - kappa).sort()
    interval, magnitude, odd = interval[index], magnitude[index], odd[index]
    first = (counts.sum(1).cumsum(0) - counts.sum(1))[interval]
    a, b = _running(magnitude, first) + intervals.a_hi[interval], _running(odd, first) + intervals.b_hi[interval]
    # Weights of equal |w| / (m − ½) climb together: only the state after the last of them belongs to a scale.
    complete = torch.ones(total, dtype=torch.bool)
    complete[:-1] = order[1:] != order[:-1]
    best.update(intervals.rows[interval][complete], a[complete], b[complete])


def _running(values: Tensor, first: Tensor) -> Tensor:
    """Inclusive running sums that start anew at `first`, the index of each element's segment."""
    sums = values.cumsum(0)
    return sums - (sums - values)[first]
