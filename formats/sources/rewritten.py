"""Weights rewritten without a change of what the model computes: W [N, K] is read as Qᵀ_out · W · diag(gain) · Q_in.

Linears that read the residual stream are rotated on their inputs (with the gain of the norm before them), linears that
write it on their outputs. An RMS norm without gain commutes with a rotation, so all folded norms become ones. Engines
load the result unchanged, without operations at run time. (QuaRot's offline part.)
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import TYPE_CHECKING

from ...deferred import torch
from ...quant.rotation import Rotation
from ...quant.stored_rows import StoredRows
from .weights import DerivedWeight, Weight, WeightSource, not_finite

if TYPE_CHECKING:
    from torch import Tensor

# Rows, and then columns, that are rotated at a time.
_PANEL = 256


@dataclass(frozen=True)
class Rewrite:
    """The rewriting of one weight, or of a bias [N], which has no inputs. Absent parts are the identity.

    gain: names of the norms whose gains multiply the columns; of two tuples, each is for one half of the columns.
    inputs: Q_in, over every `size` columns. outputs: Q_out, over every `size` rows. heads: (rows of a head, its first
    rotated row) where only the last rows of each head are rotated. ones: the weight is a folded norm's gain.
    """

    gain: tuple[tuple[str, ...], ...] = ()
    inputs: Rotation | None = None
    outputs: Rotation | None = None
    heads: tuple[int, int] | None = None
    ones: bool = False


def rewritten(source: WeightSource, rewrites: Mapping[str, Rewrite]) -> WeightSource:
    """The source with the weights that `rewrites` names rewritten; those are read as float32."""
    gains, last = _Gains(source.weights), threading.local()
    weights = {
        name: RewrittenWeight(weight, rewrites[name], gains, last) if name in rewrites else weight
        for name, weight in source.weights.items()
    }
    return replace(source, weights=weights)


class _Gains:
    """Norms' gains in float64, each read once."""

    def __init__(self, weights: Mapping[str, Weight]):
        self._weights = weights
        self._gains: dict[str, Tensor] = {}

    def product(self, norms: tuple[str, ...]) -> Tensor:
        """The product of some norms' gains."""
        product = torch.ones((), dtype=torch.float64)
        for norm in norms:
            if norm not in self._gains:
                gain = self._weights[norm].rows().to_float32()
                if not bool(torch.isfinite(gain).all()):
                    # The gain goes into many weights: the error names the norm.
                    raise not_finite(self._weights[norm])
                self._gains[norm] = gain.to(torch.float64)
            product = product * self._gains[norm]
        return product

    def stored_names(self, norms: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(chain.from_iterable(self._weights[norm].stored_names for norm in norms))


@dataclass(frozen=True, slots=True)
class RewrittenWeight(DerivedWeight):
    """A `Weight` computed from another: float32 rows."""

    change: Rewrite
    gains: _Gains
    # Per thread: name and rows of the last weight with rotated outputs, for its next chunk.
    last: threading.local

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def block_rows(self) -> int:
        return 1

    @property
    def linear(self) -> None:
        return None

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The weight's tensors, then those of the folded norms."""
        if self.change.ones:
            return ()
        return self.inner.stored_names + self.gains.stored_names(tuple(chain.from_iterable(self.change.gain)))

    @property
    def held_bytes(self) -> int:
        """Bytes of all rows as float32 where outputs are rotated, because each rotated row depends on all of them."""
        whole = 0 if self.change.outputs is None else 4 * prod(self.shape)
        return whole + self.inner.held_bytes

    def rows(self, start: int = 0, stop: int | None = None) -> StoredRows:
        stop = self.shape[0] if stop is None else stop
        if self.change.ones:
            return StoredRows(torch.ones(stop - start))
        if self.change.outputs is None:
            return StoredRows(self._inputs_changed(start, stop).to(torch.float32))
        return StoredRows(self._whole(self.change.outputs)[start:stop])

    def view(self) -> None:
        return None

    def row_bytes(self) -> None:
        return None

    def _whole(self, outputs: Rotation) -> Tensor:
        """Compute all rows in float32; only a slice of rows, then a slice of columns is in float64 at a time."""
        held: tuple[str, Tensor] | None = getattr(self.last, "whole", None)
        if held is not None and held[0] == self.name:
            return held[1]
        self.last.whole = held = None  # not two at once
        count, columns = self.shape[0], prod(self.shape[1:])
        whole = torch.empty(count, columns)
        for start in range(0, count, _PANEL):
            part = slice(start, min(start + _PANEL, count))
            whole[part] = self._inputs_changed(part.start, part.stop).view(-1, columns)
        for start in range(0, columns, _PANEL):
            panel = slice(start, start + _PANEL)
            rows = whole[:, panel].to(torch.float64).contiguous()
            whole[:, panel] = _outputs_rotated(rows, outputs, self.change.heads)
        whole = whole.view(self.shape)
        self.last.whole = (self.name, whole)
        return whole

    def _inputs_changed(self, start: int, stop: int) -> Tensor:
        """Rows in float64 with gain and input rotation."""
        rows, change = self.inner.rows(start, stop).to_float32().to(torch.float64), self.change
        if change.gain:
            rows *= torch.cat([self.gains.product(half) for half in change.gain])
        return rows if change.inputs is None else change.inputs.rows(rows)


def _outputs_rotated(rows: Tensor, outputs: Rotation, heads: tuple[int, int] | None) -> Tensor:
    if heads is None:
        return outputs.columns(rows)
    size, first = heads
    by_head = rows.view(-1, size, rows.shape[1])
    part = by_head[:, first:].reshape(-1, rows.shape[1])
    turned = outputs.columns(part).view(by_head.shape[0], size - first, rows.shape[1])
    return torch.cat([by_head[:, :first], turned], dim=1).view(rows.shape)
