"""Function-preserving rewrites: a checkpoint read as if its residual stream had been rotated, its norms folded away.

Every weight W [N, K] becomes Qᵀ_out · W · diag(gain) · Q_in, as its place in the model demands: what reads the residual
stream is rotated on its inputs (the gain is that of the norm before it), what writes to it on its outputs. An RMS norm
without gain commutes with a rotation, so all norms that were folded become ones. Nothing is left to do when the model
runs: engines load the result unchanged. (QuaRot's offline part; the value heads and the q_a latent have rotations of
their own.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
from torch import Tensor

from ..formats.checkpoint import Checkpoint
from ..formats.dialects import StoredRows, WeightSource
from ..formats.safetensors import DTYPES
from ..models.architecture import Role
from ..models.config import ModelConfig
from ..models.inventory import Inventory
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
    # What the architecture does not know is copied as it is, even under a name that other models have.
    known = {name for name, spec in inventory.specs.items() if spec.role is not Role.OTHER}
    return {name: change for name, change in _rewrites(config, inventory) if name in known}


def _rewrites(config: ModelConfig, inventory: Inventory) -> Iterator[tuple[str, Rewrite]]:
    stream = rotation(config.hidden_size)
    norm = "model.norm.weight"
    yield "model.embed_tokens.weight", Rewrite(inputs=stream)
    yield "lm_head.weight", Rewrite(gain=((norm,),), inputs=stream)
    yield norm, Rewrite(ones=True)
    for layer in (*range(config.num_hidden_layers), *inventory.mtp_layers):
        prefix = f"model.layers.{layer}."
        yield from _attention(config, prefix)
        yield from _feed_forward(config, inventory, prefix, layer)
    for layer in inventory.mtp_layers:
        yield from _mtp(f"model.layers.{layer}.", norm, stream)


def _attention(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Rewrite]]:
    stream, values = rotation(config.hidden_size), rotation(config.v_head_dim)
    norm, attention = f"{prefix}input_layernorm.weight", f"{prefix}self_attn."
    reads = Rewrite(gain=((norm,),), inputs=stream)
    yield norm, Rewrite(ones=True)
    yield f"{attention}q_proj.weight", reads
    yield f"{attention}kv_a_proj_with_mqa.weight", reads
    if config.q_lora_rank is not None:
        latent, q_norm = rotation(config.q_lora_rank), f"{attention}q_a_layernorm.weight"
        yield f"{attention}q_a_proj.weight", Rewrite(gain=((norm,),), inputs=stream, outputs=latent)
        yield q_norm, Rewrite(ones=True)
        yield f"{attention}q_b_proj.weight", Rewrite(gain=((q_norm,),), inputs=latent)
    head = (config.qk_nope_head_dim + config.v_head_dim, config.qk_nope_head_dim)
    yield f"{attention}kv_b_proj.weight", Rewrite(outputs=values, heads=head)
    yield f"{attention}o_proj.weight", Rewrite(inputs=values, outputs=stream)


def _feed_forward(config: ModelConfig, inventory: Inventory, prefix: str, layer: int) -> Iterator[tuple[str, Rewrite]]:
    stream, norm = rotation(config.hidden_size), f"{prefix}post_attention_layernorm.weight"
    reads, writes = Rewrite(gain=((norm,),), inputs=stream), Rewrite(outputs=stream)
    yield norm, Rewrite(ones=True)
    blocks = [f"{prefix}mlp."]
    if config.is_moe_layer(layer):
        yield f"{prefix}mlp.gate.weight", reads
        experts = range(config.n_routed_experts)
        blocks = [f"{prefix}mlp.shared_experts.", *(f"{prefix}mlp.experts.{expert}." for expert in experts)]
    for block in blocks:
        yield f"{block}gate_proj.weight", reads
        yield f"{block}up_proj.weight", reads
        yield f"{block}down_proj.weight", writes


def _mtp(prefix: str, final_norm: str, stream: Rotation) -> Iterator[tuple[str, Rewrite]]:
    """A multi-token-prediction layer reads the embedding and the main model's normed output, both rotated by now.

    That output has lost the final norm's gain, which goes into eh_proj after hnorm's: exact but for one positive factor
    a token on that half, since hnorm measures a vector without the gain.
    """
    embedding_norm, hidden_norm, head_norm = (
        f"{prefix}{name}.weight" for name in ("enorm", "hnorm", "shared_head.norm")
    )
    for norm in (embedding_norm, hidden_norm, head_norm):
        yield norm, Rewrite(ones=True)
    gain = ((embedding_norm,), (hidden_norm, final_norm))
    yield f"{prefix}eh_proj.weight", Rewrite(gain=gain, inputs=stream, outputs=stream)
    yield f"{prefix}embed_tokens.weight", Rewrite(inputs=stream)
    yield f"{prefix}shared_head.head.weight", Rewrite(gain=((head_norm,),), inputs=stream)


def _outputs_rotated(rows: Tensor, change: Rewrite) -> Tensor:
    assert change.outputs is not None
    if change.heads is None:
        return change.outputs.columns(rows)
    size, first = change.heads
    by_head = rows.view(-1, size, rows.shape[1])
    part = by_head[:, first:].reshape(-1, rows.shape[1])
    turned = change.outputs.columns(part).view(by_head.shape[0], size - first, rows.shape[1])
    return torch.cat([by_head[:, :first], turned], dim=1).view(rows.shape)
