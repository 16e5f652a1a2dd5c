"""Heads of multi-token-prediction layers that ship none of their own, and draft with the main model's.

Rotation needs them. It folds the gain of the norm before a head into the head's columns, because a gain does not
commute with a rotation. The shared head takes the main model's final gain; the draft's gain would have no place to go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

from ...models.config import ModelConfig
from ...models.family import Block
from .weights import DerivedWeight, Weight, WeightSource

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class SharedWeight(DerivedWeight):
    """A `Weight` read a second time under another name."""

    name: str


def missing_heads(source: WeightSource, config: ModelConfig) -> list[str]:
    """The names of the heads that multi-token-prediction layers of a checkpoint do without."""
    weights, family = source.weights, config.family
    if family.top_name("head") not in weights:
        return []
    heads = (config.name(Block.MTP, "head", layer) for layer in _draft_layers(source, config))
    return [head for head in heads if head not in weights]


def with_heads(source: WeightSource, config: ModelConfig) -> WeightSource:
    """The source with the main model's head in place of every missing one, each behind its layer's last tensor."""
    heads = {config.layer_of(name): name for name in missing_heads(source, config)}
    if not heads:
        return source
    main = source.weights[config.name(Block.TOP, "head")]
    last = {config.layer_of(name): name for name in source.weights}
    weights: dict[str, Weight] = {}
    for name, weight in source.weights.items():
        weights[name] = weight
        layer = config.layer_of(name)
        if layer in heads and last[layer] == name:
            weights[heads[layer]] = SharedWeight(main, heads[layer])
    return replace(source, weights=weights)


def _draft_layers(source: WeightSource, config: ModelConfig) -> Iterator[int]:
    """The multi-token-prediction layers, which have no gap between them."""
    if not config.family.entries(Block.MTP):
        return
    for layer in count(config.num_hidden_layers):
        if config.name(Block.MTP, "hidden_norm", layer) not in source.weights:
            return
        yield layer
