"""Keeps two sets of operators on the same side of rounding ties.

Activations are rounded to int8 many times a layer. Where a quotient lies within float32 rounding of a tie, two correct
sets may choose neighbouring codes, and on models this small one such code moves a logit by a percent. So the codes of
one run are recorded and the other run, after checking that its own differ by at most one code in few places, goes on
with the recorded ones: what is left is the difference that the operators really make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from npuq.runtime.ops import Ops, Quantized

MOST_TIES = 2e-3
SCALE_TOLERANCE = 1e-4


class Tape:
    """Quantized activations in the order in which a run makes them.

    Rows of zeros (padded heads) do not count, and neither do the same rows quantized once more, for another linear.
    """

    def __init__(self) -> None:
        self._recorded: list[Quantized] = []
        self._last: Quantized | None = None  # before the exchange
        self._next = 0
        self.ties = 0
        self.codes = 0

    def record(self, ops: Ops) -> Ops:
        """Make `ops` record."""

        def keep(ours: Quantized) -> Quantized:
            if not self._again(ours):
                self._recorded.append(_without_zeros(ours))
            return ours

        return _hook(ops, keep)

    def replay(self, ops: Ops) -> Ops:
        """Make `ops` check against what was recorded, and go on with that."""

        def exchange(whole: Quantized) -> Quantized:
            self._next += not self._again(whole)
            theirs, ours = self._recorded[self._next - 1], _without_zeros(whole)
            assert ours.codes.shape == theirs.codes.shape, f"quantization {self._next}: {tuple(ours.codes.shape)}"
            torch.testing.assert_close(ours.scale, theirs.scale, rtol=SCALE_TOLERANCE, atol=0)
            off = (ours.codes.int() - theirs.codes.int()).abs()
            assert off.max() <= 1, f"quantization {self._next}: codes differ by {off.max()}"
            self.ties += int(off.sum())
            self.codes += off.numel()
            codes, scale = whole.codes.clone(), whole.scale.clone()
            codes[whole.scale > 0], scale[whole.scale > 0] = theirs.codes, theirs.scale
            return Quantized(codes, scale)

        return _hook(ops, exchange)

    def _again(self, rows: Quantized) -> bool:
        last, self._last = self._last, rows
        return last is not None and all(map(torch.equal, last, rows))

    def check_end(self) -> None:
        """The runs quantized equally often, and chose differently only as rarely as ties happen."""
        assert self._next == len(self._recorded), f"{len(self._recorded)} quantizations recorded, {self._next} replayed"
        assert self.ties <= MOST_TIES * self.codes, f"{self.ties} of {self.codes} codes differ"


def _without_zeros(rows: Quantized) -> Quantized:
    return Quantized(rows.codes[rows.scale > 0], rows.scale[rows.scale > 0])


def _hook(ops: Ops, exchange: Callable[[Quantized], Quantized]) -> Ops:
    """Pass everything that `ops` quantizes through `exchange`."""
    for part, name in (
        (ops.norms, "dynamic_quant"),
        (ops.norms, "dequant_swiglu_quant"),
        (ops.routing, "moe_init_routing"),
        (ops.mla, "norm"),
        (ops.gqa, "norm"),
    ):
        original = getattr(part, name)

        def method(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            result = _original(*args, **kwargs)
            if isinstance(result, Quantized):
                return exchange(result)
            if isinstance(result[0], Quantized):
                return (exchange(result[0]), *result[1:])
            return result

        setattr(part, name, method)
    return ops
