"""A family's table unrolled for one config: every tensor with its name, role and shape.

The names are generated, not parsed: checking a checkpoint is one dictionary lookup a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from .config import ModelConfig
from .family import Block, Entry
from .roles import Role


@dataclass(frozen=True)
class Spec:
    """One tensor of a checkpoint. `entry` is its line of the family's table in `block`; None outside the table."""

    name: str
    role: Role
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None
    block: Block | None = None
    entry: Entry | None = None
    optional: bool = False  # a checkpoint may leave it out
    indices: int | None = None  # its integers are from 0 to this number, exclusive

    @property
    def row_parallel(self) -> bool:
        """True where tensor-parallel ranks split its inputs."""
        return self.entry is not None and self.entry.row_parallel

    @property
    def kept_dtype(self) -> str | None:
        """The safetensors code that the tensor keeps in every artifact; None: the source's."""
        return None if self.entry is None else self.entry.dtype

    @property
    def module(self) -> str:
        """The last part of its module's name: `kv_b_proj` of `model.layers.3.self_attn.kv_b_proj.weight`."""
        return self.name.split(".")[-2] if "." in self.name else self.name


class ModelTensors:
    """The tensors of a model of one config, by part."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.family = config.family
        self.sizes = sizes(config)
        self._layer_sizes: dict[int, dict[str, int]] = {}

    def spec(self, block: Block, part: str, layer: int | None = None, expert: int | None = None) -> Spec:
        """The tensor of a part, also of one that this layer lacks. KeyError for a part outside the family's table."""
        return self._spec(block, self.family.entry(block, part), layer, expert)

    def has(self, block: Block, part: str, layer: int | None = None) -> bool:
        """True where the family has the part, and this config's layer too."""
        entries = [entry for entry in self.family.entries(block) if entry.part == part]
        return any(entry.when in conditions(self.config, layer) for entry in entries)

    def sizes_at(self, layer: int) -> dict[str, int]:
        """The words of `Entry.shape` as numbers, with those that are a layer's own."""
        if layer not in self._layer_sizes:
            own = self.config.attention.layer_sizes(layer)
            self._layer_sizes[layer] = {**self.sizes, **own} if own else self.sizes
        return self._layer_sizes[layer]

    def unroll(self, mtp_layers: Iterable[int], *, main: bool = True) -> Iterator[Spec]:
        """Yield every tensor; without `main` the MTP layers' alone."""
        if main:
            for entry in self.family.entries(Block.TOP):
                yield self._spec(Block.TOP, entry, None, None)
        for layer in chain(range(self.config.num_hidden_layers) if main else (), mtp_layers):
            yield from self._layer(layer)

    def _layer(self, layer: int) -> Iterator[Spec]:
        holds = conditions(self.config, layer)
        for block, entries in self.family.blocks.items():
            if block is Block.TOP:
                continue
            present = [entry for entry in entries if entry.when in holds]
            experts = range(self.config.n_routed_experts) if block is Block.EXPERT and present else (None,)
            for expert in experts:
                for entry in present:
                    yield self._spec(block, entry, layer, expert)

    def _spec(self, block: Block, entry: Entry, layer: int | None, expert: int | None) -> Spec:
        mtp = layer is not None and layer >= self.config.num_hidden_layers
        numbers = self.sizes if layer is None else self.sizes_at(layer)
        shape = tuple([numbers[word] for word in entry.shape])
        optional = entry.optional != "never" and entry.optional in conditions(self.config, layer)
        name = self.family.scope(self.config.num_hidden_layers, layer, expert) + entry.name
        role = entry.role.in_mtp if mtp else entry.role
        indices = None if entry.indices is None else numbers[entry.indices]
        return Spec(name, role, shape, layer, expert, block, entry, optional, indices)


def expected_specs(config: ModelConfig, mtp_layers: Iterable[int]) -> dict[str, Spec]:
    """Every tensor of a model of this config by name: the names that a loader looks up."""
    return {spec.name: spec for spec in ModelTensors(config).unroll(mtp_layers)}


def conditions(config: ModelConfig, layer: int | None) -> frozenset[str]:
    """The words of `Entry.when` that hold for a layer; outside the layers "always" alone."""
    if layer is None:
        return frozenset({"always"})
    moe = config.moe_at(layer)
    words = {
        "always": True,
        "mtp": layer >= config.num_hidden_layers,
        "dense": moe is None,
        "moe": moe is not None,
        **config.attention.conditions(layer),
        **({} if moe is None else moe.conditions(layer)),
    }
    return frozenset(word for word, holds in words.items() if holds)


def sizes(config: ModelConfig) -> dict[str, int]:
    """The words of `Entry.shape` as numbers."""
    return {
        "hidden": config.hidden_size,
        "two_hidden": 2 * config.hidden_size,
        "vocab": config.vocab_size,
        "intermediate": config.intermediate_size,
        **config.attention.sizes(),
        **({} if config.moe is None else config.moe.sizes()),
        **({} if config.hyper_connections is None else config.hyper_connections.sizes(config.hidden_size)),
    }
