"""The vocabulary of the family tables: entries, activations, and the family of both.

A table gives every tensor's part, and the activations that it reads and writes. All code that depends on a model's
structure loops over the table: the inventory of a checkpoint, the runtime's loader, the side of a weight that a
rotation multiplies, the weights that smoothing changes together, the parameters that engines fuse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

from .attention import AttentionReader, AttentionWidths
from .hyper_connections import HyperConnectionsReader
from .moe import MoeReader
from .roles import Role
from .rope_config import Ropes, read_one_rope


class Block(str, Enum):
    """A group of entries that exist together."""

    TOP = "top"  # outside the layers
    LAYER = "layer"  # the norms of a decoder layer
    ATTENTION = "attention"
    DENSE = "dense"  # the feed-forward block of a layer without experts
    ROUTER = "router"
    SHARED = "shared"  # the shared experts, stored as one block
    EXPERT = "expert"  # once for each routed expert
    MTP = "mtp"  # a multi-token-prediction layer's tensors beside those of a decoder layer

    __str__ = str.__str__


Kind = Literal["linear", "norm", "layer_norm", "lookup", "bias", "vector"]
"""linear: `[outputs, inputs]`. norm: the gain of an RMS norm, `[channels]`. layer_norm: gain or bias of a layer norm,
which subtracts a mean and so keeps no basis. lookup: one row a token id or position, `[rows, channels]`. bias: the
addend of a linear's outputs, `[outputs]`, which writes what the linear writes. vector: any other tensor of one
dimension."""


@dataclass(frozen=True)
class Activation:
    """A value that flows through a layer.

    basis: the space of its channels. A rotation applies to a whole basis: to the outputs of linears that write an
    activation of it, and to the inputs of linears that read one. An RMS norm keeps the basis. None: channels that must
    not be mixed. size: the channels of the basis, a word of `sizes`; an activation may be several bases side by side.
    """

    name: str
    basis: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Entry:
    """One tensor of a family.

    part: its function in the block, in one vocabulary for all families ("q_a", "router", …); unique in its block.
    name: the checkpoint's name, below its layer or its expert.
    shape: words of `sizes`.
    reads, writes: names of activations. Several are concatenated to a linear's inputs.
    heads: (rows of a head, its first row that writes) where only the last rows of each head write `writes`.
    when: a word of `conditions`, evaluated for each layer. optional: a word of them where the tensor may be absent even
    so; "never" holds nowhere.
    dtype: the safetensors code that the tensor keeps in every checkpoint and artifact; None: any.
    indices: the tensor's integers are indices from 0 up to this word of `sizes`, exclusive.
    fused: the first part of the parameter into which engines fuse this one.
    row_parallel: tensor-parallel ranks split the inputs, so that W4A8 keeps one scale_bias a slice.
    """

    part: str
    name: str
    role: Role
    shape: tuple[str, ...]
    kind: Kind = "linear"
    reads: tuple[str, ...] = ()
    writes: str | None = None
    heads: tuple[str, str] | None = None
    when: str = "always"
    optional: str = "never"
    dtype: str | None = None
    indices: str | None = None
    fused: str | None = None
    row_parallel: bool = False


@dataclass(frozen=True)
class Family:
    """The tensors of one model family, and the peculiarities of its config.json and checkpoints.

    architecture: the first of config.json's `architectures`, by which vLLM and SGLang choose a model's class;
    transformers chooses by model_type.
    attention, moe: read the widths of its attention and its experts from config.json. rms_norm_eps: its default.
    blocks: the entries of each block. fixed: keys of config.json with the one value that the blocks compute, which is
    also the default. layers, experts: the names' parts before a layer's number, and before an expert's
    number within its layer. mtp_layers: the part before a multi-token-prediction layer's number, which counts from 0;
    empty where these layers count on from the decoder layers, under `layers`. prefix: the common beginning of all names
    (`language_model.`).
    deepseek_keys: gives a config.json with transformers' keys those of the model's authors, where they differ.
    ropes: reads the rotary parameters. hyper_connections: reads the residual's streams; None with a plain residual.
    no_rotation, no_calibration: the reasons why a rotation, and why every method that runs the layers, are refused.
    text_types: the model_types that `text_config` of config.json may name, where the keys of the text model stand in
    that object; empty where they stand at the top.
    passthrough: globs of tensors outside the table that are copied unchanged, without a note. ignored: globs of buffers
    that every loader computes for itself; they are left out. renamed: beginnings of names that re-uploads by
    other tools give to its tensors; they are refused by name.
    """

    model_type: str
    architecture: str
    attention: AttentionReader
    moe: MoeReader | None
    activations: tuple[Activation, ...]
    blocks: dict[Block, tuple[Entry, ...]]
    fixed: Mapping[str, str | bool]
    layers: str = "model.layers."
    experts: str = "mlp.experts."
    mtp_layers: str = ""
    rms_norm_eps: float = 1e-6
    prefix: str = ""
    deepseek_keys: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    ropes: Callable[[Mapping[str, Any], AttentionWidths], Ropes] = read_one_rope
    hyper_connections: HyperConnectionsReader | None = None
    no_rotation: str = ""
    no_calibration: str = ""
    text_types: tuple[str, ...] = ()
    passthrough: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    renamed: tuple[str, ...] = ()

    def entries(self, block: Block) -> tuple[Entry, ...]:
        """The entries of a block; none of one that the family does not have."""
        return self.blocks.get(block, ())

    def entry(self, block: Block, part: str) -> Entry:
        """The entry of a part. KeyError where the family has none."""
        return self._entries[block, part]

    def top_name(self, part: str) -> str:
        """The checkpoint's name of a part outside the layers. KeyError for one that the family does not have."""
        return self.prefix + self.entry(Block.TOP, part).name

    def scope(self, decoder_layers: int, layer: int | None = None, expert: int | None = None) -> str:
        """The beginning of an entry's name, in a model of `decoder_layers`: `model.layers.3.mlp.experts.7.`."""
        if layer is None:
            return self.prefix
        within = "" if expert is None else f"{self.experts}{expert}."
        if self.mtp_layers and layer >= decoder_layers:
            return f"{self.prefix}{self.mtp_layers}{layer - decoder_layers}.{within}"
        return f"{self.prefix}{self.layers}{layer}.{within}"

    def layer_of(self, name: str, decoder_layers: int) -> int | None:
        """The layer number of a tensor's name, in a model of `decoder_layers`: `model.layers.7.mlp…` → 7, and
        `mtp.0.…` → `decoder_layers`; None outside the layers."""
        found = self._layer.match(name)
        if found is None:
            return None
        return int(found["layer"]) if found["mtp"] is None else decoder_layers + int(found["mtp"])

    def find(self, name: str) -> tuple[Block, Entry, int | None] | None:
        """The entry of a name in any layer, and the expert's number; None for a name outside the table."""
        found = self._layer.match(name)
        if found is None:
            held = name.startswith(self.prefix) and self._top.get(name[len(self.prefix) :])
            return (Block.TOP, held, None) if held else None
        rest, expert = name[found.end() :], None
        inside = self._expert.match(rest)
        if inside is not None:
            rest, expert = rest[inside.end() :], int(inside[1])
        held_in = (self._in_layer if expert is None else self._in_expert).get(rest)
        return None if held_in is None else (*held_in, expert)

    def activation(self, name: str) -> Activation:
        """The activation of that name. KeyError where the family has none."""
        return self._activations[name]

    def norm_of(self, activation: str) -> tuple[Block, Entry] | None:
        """The norm that writes an activation; None where none does."""
        return self._norms.get(activation)

    def readers(self, activation: str, *blocks: Block) -> tuple[Entry, ...]:
        """The linears of some blocks that read an activation, in the table's order."""
        return tuple(
            entry
            for block in blocks
            for entry in self.entries(block)
            if entry.kind == "linear" and activation in entry.reads
        )

    def is_stray_bias(self, name: str) -> bool:
        """True for the bias of a norm or linear that has none in the table."""
        if not name.endswith(".bias") or self.find(name) is not None:
            return False
        if self._layer.match(name) is not None:
            return True
        norms = (entry for entry in self.entries(Block.TOP) if entry.kind == "norm")
        return name in {f"{self.prefix}{entry.name.removesuffix('weight')}bias" for entry in norms}

    def passes_through(self, name: str) -> bool:
        """True for a tensor outside the table that is copied unchanged without a note."""
        return any(fnmatchcase(name, pattern) for pattern in self.passthrough)

    def ignores(self, name: str) -> bool:
        """True for a buffer that every loader computes for itself."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignored)

    def _all(self) -> Iterator[tuple[Block, Entry]]:
        for block, entries in self.blocks.items():
            for entry in entries:
                yield block, entry

    @cached_property
    def _entries(self) -> dict[tuple[Block, str], Entry]:
        return {(block, entry.part): entry for block, entry in self._all()}

    @cached_property
    def _activations(self) -> dict[str, Activation]:
        return {activation.name: activation for activation in self.activations}

    @cached_property
    def _norms(self) -> dict[str, tuple[Block, Entry]]:
        return {entry.writes: (block, entry) for block, entry in self._all() if entry.kind == "norm" and entry.writes}

    @cached_property
    def _top(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries(Block.TOP)}

    @cached_property
    def _in_layer(self) -> dict[str, tuple[Block, Entry]]:
        outside = (Block.TOP, Block.EXPERT)
        return {entry.name: (block, entry) for block, entry in self._all() if block not in outside}

    @cached_property
    def _in_expert(self) -> dict[str, tuple[Block, Entry]]:
        return {entry.name: (Block.EXPERT, entry) for entry in self.entries(Block.EXPERT)}

    @cached_property
    def _layer(self) -> re.Pattern[str]:
        number = re.escape(self.layers) + r"(?P<layer>[0-9]{1,6})"
        # Without a beginning of their own, no name is a multi-token-prediction layer's.
        own = re.escape(self.mtp_layers) + r"(?P<mtp>[0-9]{1,6})" if self.mtp_layers else r"(?P<mtp>(?!))"
        return re.compile(rf"{re.escape(self.prefix)}(?:{number}|{own})\.")

    @cached_property
    def _expert(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.experts) + r"([0-9]+)\.")
