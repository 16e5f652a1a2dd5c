"""Rotation of a model as rewrites, derived from its family's table: the activations that a weight reads and writes.

Each basis of activations has one rotation (QuaRot's offline part): the residual stream, the value heads, the query
latent. `rewritten.py` applies the rewrites.
"""

from __future__ import annotations

from ...models.config import ModelConfig
from ...models.family import Block
from ...models.inventory import Inventory
from ...models.tensors import ModelTensors, Spec
from ...quant.rotation import Rotation, rotation
from .rewritten import Rewrite


def rotated(config: ModelConfig, inventory: Inventory) -> dict[str, Rewrite]:
    """The rewrites that rotate a model. The caller has untied the head, because the final norm is folded into it."""
    rewrites = {}
    table = _Table(config)
    # A layer's experts share theirs.
    known: dict[tuple[Block | None, str, int | None], Rewrite | None] = {}
    for spec in inventory.specs.values():
        if spec.entry is None:
            continue
        key = spec.block, spec.entry.part, spec.layer
        if key not in known:
            known[key] = table.rewrite(spec)
        change = known[key]
        if change is not None:
            rewrites[spec.name] = change
    return rewrites


class _Table:
    """A family's table with the rotation of each basis."""

    def __init__(self, config: ModelConfig):
        self._config, self._family, self._sizes = config, config.family, ModelTensors(config).sizes

    def rewrite(self, spec: Spec) -> Rewrite | None:
        """The rewrite of a tensor; None for an unchanged one, and for tensors outside the table."""
        entry = spec.entry
        if entry is None:
            return None
        if entry.kind == "norm":
            return Rewrite(ones=True) if self._turns(entry.writes) else None
        if entry.kind == "lookup":  # it writes its rows
            return Rewrite(inputs=self._turns(entry.writes))
        if entry.kind == "bias":
            turned = self._turns(entry.writes)
            return None if turned is None else Rewrite(outputs=turned)
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

        A norm may read another norm's output: a multi-token-prediction layer's reads the main model's normed output.
        Without the first gain that output has another root mean square, by which the second norm divides: the fold is
        exact but for one positive factor a token.
        """
        found = self._family.norm_of(activation)
        if found is None:
            return ()
        block, norm = found
        name = self._config.name(block, norm.part, None if block is Block.TOP else layer)
        return name, *self._norms(norm.reads[0], layer)
