"""The int8 scale search: a scale for each row near the optimum, and never worse than the iterative search's.

For codes q of a row w, A = Σ w·q and B = Σ q², the best scale is A / B, and its error is Σ w² − A² / B. Three steps
visit scales; the result is the best visited state (A, B).

1. A grid: from the min-max scale downwards, until clipping costs more than lucky rounding can win back, and upwards,
   until coarser codes do. Rounding errors at two scales are alike while w / s moves by a fraction of a code, so a step
   moves weights of the row's root mean square by GRID_STEP codes.
2. At a fixed scale s the least error E(s) = Σ w² − 2·s·A + s²·B has the slope 2·(s·B − A): both come with the state.
   The cubic through the values and slopes of two neighbours says where between them E is least: the deepest such
   valley is visited, REFINEMENTS times over.
3. The iterative search of other tools (start from min-max, s ← A / B, requantize, keep the best, at most PEER_ROUNDS
   rounds; msmodelslim calls it ssz) is followed as long as it could still find a better state.

Why step 3 makes the result no worse than that search's, on any row: T(s) = A / B never falls as s grows, because a
threshold passed at s adds s / 2 a unit of B to A, and A / B ≥ s / 2. So the search goes one way, and never past a
scale from which T points back. Where it goes down, T(s) < s, and every threshold passed there raises A² / B: of two
states on its way the later one is better. Upwards the argument is the same. So it is enough to be as far as the search
after each of its rounds. A round here goes to T(s), or farther, over states that are ruled out: between two scales
s_hi > s_lo no state has a larger A² / B than `interval_bound`. Both ways are tried, from a little (DOUBT) beside
min-max. A way ends only where T points back by more than any rounding could turn it, so the claim holds for every
rounding of w / s in that search. Only the fixed point limits it: half a unit h in each of K weights changes a squared
error E by 2·√(E·K)·h.

Weights are integers for A and B (24-bit fixed point), scales float64, codes round(w · float32(1 / s)). The native
kernel does the same operations in the same order, and finds the same state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..deferred import torch
from .optimal_scale import interval_bound, score
from .rounding import code_sums, fixed_norm, rounded

if TYPE_CHECKING:
    from torch import Tensor

GRID_STEP = 0.3
MOST_STEP = 0.05
# The error of rounding n weights varies by 0.9 / √n of itself; the best of all scales is lucky.
LUCK = 8.0
HIGHEST = 2.0
LOWEST = 1 / 128
MOST_DOWN = 160
MOST_GRID = 400
REFINEMENTS = 4
# No visit between neighbours nearer than this part of a grid step.
NARROWEST = 0.125
PEER_ROUNDS = 50
MOST_NODES = MOST_GRID + REFINEMENTS + 4 * PEER_ROUNDS
# A leap of 2 · √((error here − best error) / Σ w²) · s can just be ruled out where A / B = s.
LEAP = 1.8
# The relative distance of scales that no rounding of w / s confuses.
DOUBT = 1e-6

_BLOCK_ELEMENTS = 1 << 18
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class FixedRows:
    """Rows float32 [R, K], none of them zeros, and the same in fixed point: int32 [R, K], rows · 2**shift."""

    rows: Tensor
    fixed: Tensor
    shift: Tensor


def int8_scale(weights: FixedRows) -> tuple[Tensor, Tensor]:
    """Search each row's best state: A = Σ w·q and B = Σ q², int64 [R]; its scale is A / B in the fixed unit.

    Of states with equal A² / B (in float64) the one of smallest B (largest scale) is taken.
    """
    rows, columns = weights.rows.shape
    block = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(1, columns)))
    found = [torch.zeros(rows, dtype=torch.int64) for _ in range(2)]
    for start in range(0, rows, block):
        part = slice(start, start + block)
        search = _Search(FixedRows(*(getattr(weights, name)[part] for name in weights.__dataclass_fields__)))
        search.visit_grid()
        search.refine_grid()
        search.follow_iteration(-1)
        search.follow_iteration(1)
        found[0][part], found[1][part] = search.best_a, search.best_b
    return found[0], found[1]


@dataclass
class _Nodes:
    """Scales, their errors and the errors' slopes, float64, and the sums of their codes, int64; all of one shape."""

    scale: Tensor
    error: Tensor
    slope: Tensor
    a: Tensor
    b: Tensor

    @staticmethod
    def none(rows: int, columns: int) -> _Nodes:
        """Empty nodes, with infinite scales."""
        real = [torch.full((rows, columns), float("inf"), dtype=torch.float64) for _ in range(3)]
        return _Nodes(*real, *(torch.zeros(rows, columns, dtype=torch.int64) for _ in range(2)))

    def __getitem__(self, index: Tensor | tuple[Tensor | slice, Tensor | slice]) -> _Nodes:
        return _Nodes(*(value[index] for value in vars(self).values()))

    def __setitem__(self, index: Tensor | tuple[Tensor, Tensor], nodes: _Nodes) -> None:
        for name, value in vars(nodes).items():
            getattr(self, name)[index] = value

    def ahead(self, sign: int) -> Tensor:
        """The distance upwards (1) or downwards (−1) to the best scale for each node's codes: the iterative search's
        step."""
        return (self.a.to(torch.float64) / self.b.to(torch.float64) - self.scale) * sign


class _Search:
    """The search of a block of rows; each step works on the rows that are not finished."""

    def __init__(self, weights: FixedRows):
        self.weights = weights
        rows, self.columns = weights.rows.shape
        self.norm = fixed_norm(weights.fixed)
        self.minmax = weights.fixed.abs().amax(1).to(torch.float64) / 127
        self.step = (GRID_STEP * self.minmax / (self.norm / self.columns).sqrt()).clamp(max=MOST_STEP)
        self.best_a, self.best_b = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        self.best = torch.zeros(rows, dtype=torch.float64)
        self.nodes = _Nodes.none(rows, MOST_NODES)
        self.count = torch.zeros(rows, dtype=torch.int64)

    def best_error(self, rows: Tensor) -> Tensor:
        return self.norm[rows] - self.best[rows]

    def visit(self, rows: Tensor, scale: Tensor) -> _Nodes:
        """Evaluate rows [M] at scales [M]."""
        inverse = torch.ldexp(1.0 / scale, self.weights.shift[rows]).to(torch.float32)
        a, b = code_sums(self.weights.fixed[rows], rounded(self.weights.rows[rows], inverse, 8))
        real_a, real_b = a.to(torch.float64), b.to(torch.float64)
        error = self.norm[rows] - 2 * scale * real_a + scale * scale * real_b
        found = _Nodes(scale, error, 2 * (scale * real_b - real_a), a, b)
        value = score(a, b)
        better = (value > self.best[rows]) | ((value == self.best[rows]) & (b < self.best_b[rows]))
        hit = rows[better]
        self.best_a[hit], self.best_b[hit], self.best[hit] = a[better], b[better], value[better]
        self.nodes[rows, self.count[rows]] = found
        self.count[rows] += 1
        return found

    def visit_grid(self) -> None:
        """Visit a grid, from min-max downwards until clipping costs too much, and upwards until coarser codes do."""
        n = float(self.columns)
        spread = min(1.0, LUCK / math.sqrt(n))
        every = torch.arange(len(self.minmax))
        rows, scale = every, self.minmax * (1 - DOUBT)
        self.visit(rows, scale)
        self.visit(rows, self.minmax * (1 + DOUBT))
        while True:
            going = (self.count[rows] < MOST_DOWN) & (scale > LOWEST * self.minmax[rows])
            rows, scale = rows[going], scale[going] / (1 + self.step[rows[going]])
            if not rows.numel():
                break
            excess = self.visit(rows, scale).error - self.best_error(rows)
            going = excess <= spread * n * scale * scale / 12
            rows, scale = rows[going], scale[going]
        rows, scale = every, self.minmax * (1 + self.step)
        while True:
            coarse = (1 - spread) * n * scale * scale / 12 > self.best_error(rows)
            going = (self.count[rows] < MOST_GRID) & (scale <= HIGHEST * self.minmax[rows]) & ~coarse
            rows, scale = rows[going], scale[going]
            if not rows.numel():
                break
            self.visit(rows, scale)
            scale = scale * (1 + self.step[rows])

    def refine_grid(self) -> None:
        """Visit the deepest valley expected between two neighbouring nodes, REFINEMENTS times."""
        rows = torch.arange(len(self.minmax))
        for _ in range(REFINEMENTS):
            seen = self.nodes[rows, slice(0, int(self.count.max()))]
            order = seen.scale.argsort(1)
            seen = _Nodes(*(value.gather(1, order) for value in vars(seen).values()))
            error, scale = _valleys(seen, NARROWEST * self.step[rows] * self.minmax[rows])
            least = error.amin(1)
            # The first of equals, by rising scale.
            first = (error == least[:, None]).to(torch.int8).cumsum(1).eq(0).sum(1)
            going = torch.isfinite(least)
            rows, first, scale = rows[going], first[going], scale[going]
            if not rows.numel():
                break
            self.visit(rows, scale.gather(1, first[:, None])[:, 0])

    def follow_iteration(self, sign: int) -> None:
        """Follow the iterative search from beside min-max, up (1) or down (−1), until it cannot find a better state
        than the best node."""
        rows = torch.arange(len(self.minmax))
        here = self.nodes[rows, torch.full_like(rows, 0 if sign < 0 else 1)]
        rounds = torch.zeros_like(rows)
        while rows.numel():
            going = (here.ahead(sign) > -DOUBT / 2 * here.scale) & (rounds < PEER_ROUNDS)
            rows, here, rounds = rows[going], here[going], rounds[going]
            neighbour = self._neighbour(rows, here, sign)
            skipped = self._ruled_out(rows, here, neighbour)
            rounds[~skipped] += 1
            step = torch.maximum(here.ahead(sign), DOUBT * here.scale)
            more = (here.error - self.best_error(rows)).clamp(min=0)
            leap = LEAP * (more / self.norm[rows]).sqrt() * here.scale
            leaping = ~skipped & (leap > step) & (leap < (neighbour.scale - here.scale) * sign)
            tried = torch.nonzero(leaping).flatten()
            there = self.visit(rows[tried], here.scale[tried] + sign * leap[tried])
            covered = self._ruled_out(rows[tried], here[tried], there)
            moved = skipped.clone()
            moved[tried[covered]] = True
            neighbour[tried[covered]] = there[covered]
            neighbour[~moved] = self.visit(rows[~moved], (here.scale + sign * step)[~moved])
            here = neighbour

    def _neighbour(self, rows: Tensor, here: _Nodes, sign: int) -> _Nodes:
        """The nearest node ahead; a node of infinite scale where there is none."""
        seen = self.nodes[rows, slice(0, int(self.count.max()))]
        way = seen.scale * sign
        nearest, index = way.where(way > (here.scale * sign)[:, None], float("inf")).min(1)
        found = _Nodes(*(value.gather(1, index[:, None])[:, 0] for value in vars(seen).values()))
        found.scale = nearest * sign
        return found

    def _ruled_out(self, rows: Tensor, x: _Nodes, y: _Nodes) -> Tensor:
        """True where every state between two nodes has at least the best error seen."""
        above = x.scale > y.scale
        lo_scale, hi_scale = torch.minimum(x.scale, y.scale), torch.maximum(x.scale, y.scale)
        bound = interval_bound(
            hi_scale / 2 * (1 + DOUBT),
            lo_scale / 2 * (1 - DOUBT),
            x.a.where(above, y.a),
            y.a.where(above, x.a),
            x.b.where(above, y.b),
            y.b.where(above, x.b),
        )
        return torch.isfinite(x.scale) & torch.isfinite(y.scale) & (bound <= self.best[rows])


def _valleys(nodes: _Nodes, narrowest: Tensor) -> tuple[Tensor, Tensor]:
    """The valleys of nodes [M, C] by rising scale: the least error of the cubic through each two neighbours' errors and
    slopes, float64 [M, C − 1], and its scale; an infinite error without a valley, or between too near neighbours."""
    every = slice(None)
    left, right = nodes[every, slice(None, -1)], nodes[every, slice(1, None)]
    width, rise = right.scale - left.scale, right.error - left.error
    m1, m2 = left.slope * width, right.slope * width
    c2, c3 = 3 * rise - 2 * m1 - m2, m1 + m2 - 2 * rise
    t = -m1 / (c2 + (c2 * c2 - 3 * c3 * m1).clamp(min=0).sqrt())
    error = left.error + t * (m1 + t * (c2 + t * c3))
    found = torch.isfinite(right.scale) & (left.slope < 0) & (right.slope > 0) & (width >= narrowest[:, None])
    return error.where(found & (t > 0) & (t < 1), float("inf")), left.scale + t * width
