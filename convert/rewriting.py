"""Function-preserving rewrites: a checkpoint read as if its residual stream had been rotated, its norms folded away.

Every weight W [N, K] becomes Qᵀ_out · W · diag(gain) · Q_in, as its place in the model demands: what reads the residual
stream is rotated on its inputs (the gain is that of the norm before it), what writes to it on its outputs. An RMS norm
without gain commutes with a rotation, so all norms that were folded become ones. Nothing is left to do when the model
runs: engines load the result unchanged. (QuaRot's offline part; the value heads and the q_a latent have rotations of
their own.)
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
from torch import Tensor

from ..formats.checkpoint import Checkpoint
from ..formats.dialects import StoredRows, WeightSource
from ..formats.safetensors import DTYPES
from ..models.config import ModelConfig
from ..models.family import Block
from ..models.inventory import Inventory
from ..models.tensors import ModelTensors, Spec
from ..quant.rotation import Rotation, rotation
from .write.chunks import not_finite

# Rows, and then columns, of a weight that are rotated at a time.
_PANEL = 256


@dataclass(frozen=True)
class Rewrite:
    """What becomes of one weight. Absent parts are the identity.

    gain: names of the norms whose gains multiply the columns, for each half of them where there are two. inputs: Q_in,
    over every `size` columns. outputs: Q_out, over every `size` rows; `heads` (rows of a head, and the first of them
    that is rotated) where only a part of each head's rows is. ones: the weight is a norm's that has been folded.
    """

    gain: tuple[tuple[str, ...], ...] = ()
    inputs: Rotation | None = None
    outputs: Rotation | None = None
    heads: tuple[int, int] | None = None
    ones: bool = False


class RewrittenSource(WeightSource):
    """A checkpoint whose weights are read rewritten: float32 rows from `stored_rows`, rounded once by `rows_float`."""

    def __init__(self, checkpoint: Checkpoint, rewrites: Mapping[str, Rewrite]):
        super().__init__(checkpoint)
        self.rewrites = rewrites
        self.block_rows = 1
        self._gains: dict[str, Tensor] = {}
        self._held = threading.local()

    def is_computed(self, name: str) -> bool:
        """As `WeightSource.is_computed`: rewritten ones are."""
        return name in self.rewrites

    def stored_rows(self, name: str, start: int = 0, stop: int | None = None) -> StoredRows:
        change = self.rewrites.get(name)
        stop = self._find(name).shape[0] if stop is None else stop
        if change is None:
            return super().stored_rows(name, start, stop)
        if change.ones:
            return StoredRows(torch.ones(stop - start))
        if change.outputs is None:
            return StoredRows(self._inputs_changed(name, change, start, stop).to(torch.float32))
        return StoredRows(self._whole(name, change)[start:stop])

    def rows_float(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self.rewrites:
            return super().rows_float(name, start, stop)
        return self.rows_float32(name, start, stop).to(DTYPES[self.float_code(name)])

    def stored_names(self, name: str) -> tuple[str, ...]:
        """As `WeightSource.stored_names`: the norms whose gains went in are among them."""
        change = self.rewrites.get(name, Rewrite())
        names = () if change.ones else (name, *chain.from_iterable(change.gain))
        return tuple(chain.from_iterable(map(super().stored_names, names)))

    @property
    def held_bytes(self) -> int:
        """What each thread that reads holds beside the rows it was given: the largest weight with rotated outputs."""
        outputs = (self.weights.get(name) for name, change in self.rewrites.items() if change.outputs is not None)
        return max((4 * prod(weight.shape) for weight in outputs if weight is not None), default=0)

    def _whole(self, name: str, change: Rewrite) -> Tensor:
        """All rows float32, since every output depends on all; the last one is held for a thread's next chunk.

        In float64 there are only some rows, then only some columns of it.
        """
        held: tuple[str, Tensor] | None = getattr(self._held, "last", None)
        if held is not None and held[0] == name:
            return held[1]
        self._held.last = held = None  # not two at once
        count, columns = self._find(name).shape
        whole = torch.empty(count, columns)
        for start in range(0, count, _PANEL):
            part = slice(start, min(start + _PANEL, count))
            whole[part] = self._inputs_changed(name, change, part.start, part.stop)
        for start in range(0, columns, _PANEL):
            panel = slice(start, start + _PANEL)
            whole[:, panel] = _outputs_rotated(whole[:, panel].to(torch.float64).contiguous(), change)
        self._held.last = (name, whole)
        return whole

    def _inputs_changed(self, name: str, change: Rewrite, start: int, stop: int) -> Tensor:
        """float64 rows with gain and input rotation."""
        rows = super().stored_rows(name, start, stop).to_float32().to(torch.float64)
        if change.gain:
            rows *= torch.cat([self._gain(half) for half in change.gain])
        return rows if change.inputs is None else change.inputs.rows(rows)

    def _gain(self, norms: tuple[str, ...]) -> Tensor:
        """The product of some norms' gains, float64."""
        product = torch.ones((), dtype=torch.float64)
        for norm in norms:
            if norm not in self._gains:
                gain = super().stored_rows(norm).to_float32()
                if not bool(torch.isfinite(gain).all()):
                    # It goes into many weights, none of which should be blamed.
                    raise not_finite(norm, self)
                self._gains[norm] = gain.to(torch.float64)
            product = product * self._gains[norm]
        return product


def rotated(config: ModelConfig, inventory: Inventory) -> dict[str, Rewrite]:
    """The rewrites that rotate a model. A tied head is a weight of its own by now: the final norm is folded into it."""
    rewrites = {}
    table = _Table(config)
    for spec in inventory.specs.values():
        change = table.rewrite(spec)
        if change is not None:
            rewrites[spec.name] = change
    return rewrites


class _Table:
    """A family's table as rotations see it."""

    def __init__(self, config: ModelConfig):
        self._family, self._sizes = config.family, ModelTensors(config).sizes

    def rewrite(self, spec: Spec) -> Rewrite | None:
        """What becomes of a tensor; None where it stays as it is, as does all that the table does not know."""
        entry = spec.entry
        if entry is None:
            return None
        if entry.kind == "norm":
            return Rewrite(ones=True) if self._turns(entry.writes) else None
        if entry.kind == "lookup":  # its rows are what it writes
            return Rewrite(inputs=self._turns(entry.writes))
        if entry.kind != "linear":
            return None
        (basis,) = {self._family.activation(name).basis for name in entry.reads}
        inputs, outputs = self._turns(entry.reads[0]), self._turns(entry.writes)
        if inputs is None and outputs is None:
            return None
        gain = () if basis is None else tuple(self._norms(name, spec.layer) for name in entry.reads)
        heads = None if entry.heads is None else (self._sizes[entry.heads[0]], self._sizes[entry.heads[1]])
        return Rewrite(gain if any(gain) else (), inputs, outputs, heads)

    def _turns(self, name: str | None) -> Rotation | None:
        """The rotation of an activation's basis."""
        activation = None if name is None else self._family.activation(name)
        if activation is None or activation.basis is None or activation.size is None:
            return None
        return rotation(self._sizes[activation.size])

    def _norms(self, activation: str, layer: int | None) -> tuple[str, ...]:
        """The norms that are folded into the readers of an activation, the last first.

        A norm may read what another one wrote: that of a multi-token-prediction layer reads the main model's normed
        output. Without its gain that output is another vector, and the second norm measures it: the fold is exact but
        for one positive factor a token.
        """
        found = self._family.norm_of(activation)
        if found is None:
            return ()
        block, norm = found
        name = self._family.name(block, norm.part, None if block is Block.TOP else layer)
        return name, *self._norms(norm.reads[0], layer)


def _outputs_rotated(rows: Tensor, change: Rewrite) -> Tensor:
    assert change.outputs is not None
    if change.heads is None:
        return change.outputs.columns(rows)
    size, first = change.heads
    by_head = rows.view(-1, size, rows.shape[1])
    part = by_head[:, first:].reshape(-1, rows.shape[1])
    turned = change.outputs.columns(part).view(by_head.shape[0], size - first, rows.shape[1])
    return torch.cat([by_head[:, :first], turned], dim=1).view(rows.shape)
