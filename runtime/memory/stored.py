"""How a model's tensors are stored, by part: all that the memory of a rank depends on, and none of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from ...dtypes import FLOAT_CODES, ITEM_BYTES
from ...formats.schemes import Scheme
from ...formats.sources.weights import Weight
from ...models.config import ModelConfig
from ...models.family import Block, Entry
from ...models.inventory import take_inventory
from ...models.tensors import ModelTensors, Spec


class Stored(NamedTuple):
    """How one tensor is stored. itemsize: bytes of a value of a FLOAT tensor. mapped: it can be used where it lies in
    its file; other float tensors (FP8, int4 in groups) are decoded into the compute dtype when they are loaded."""

    scheme: Scheme
    itemsize: int
    mapped: bool


NOTHING: Final = Stored(Scheme.FLOAT, 0, True)


@dataclass(frozen=True)
class Part:
    """The tensors of one part of a model that are stored alike. count: over all layers and experts."""

    block: Block
    entry: Entry
    shape: tuple[int, ...]
    stored: Stored
    count: int


@dataclass(frozen=True)
class StoredModel:
    """The tensors that generation loads, by part: not those of multi-token-prediction layers."""

    config: ModelConfig
    parts: tuple[Part, ...]

    @property
    def expert_scheme(self) -> Scheme | None:
        """W4A8 where any layer has W4A8 experts, else the experts' scheme; None without experts."""
        found = {part.stored.scheme for part in self.parts if part.block is Block.EXPERT}
        return Scheme.W4A8 if Scheme.W4A8 in found else next(iter(found), None)


def stored_model(config: ModelConfig, weights: Mapping[str, Weight]) -> StoredModel:
    """Find the parts of a checkpoint or artifact by its headers, in time linear in the number of its tensors.

    Raises CheckpointError where tensors and config contradict each other.
    """
    take_inventory(config, weights)
    return model_of_forms(config, lambda name: form_of(weights[name]))


def model_of_forms(config: ModelConfig, form: Callable[[str], Stored]) -> StoredModel:
    """Find the parts of a model whose tensors have the forms of `form`, by name."""
    return _by_part(config, lambda spec: form(spec.name))


def model_of_schemes(config: ModelConfig, scheme_of: Callable[[Spec], Scheme]) -> StoredModel:
    """Find the parts of a model without files: quantized tensors have the scheme of `scheme_of`, others its dtype."""

    def stored(spec: Spec) -> Stored:
        kept = spec.kept_dtype
        return Stored(scheme_of(spec), ITEM_BYTES[kept or config.dtype_code], True)

    return _by_part(config, stored)


def form_of(weight: Weight) -> Stored:
    """How a weight of a checkpoint is stored."""
    if weight.linear is not None:
        return Stored(weight.linear.scheme, 0, True)
    mapped = weight.dtype in FLOAT_CODES
    return Stored(Scheme.FLOAT, ITEM_BYTES[weight.dtype] if mapped else 0, mapped)


def _by_part(config: ModelConfig, stored: Callable[[Spec], Stored]) -> StoredModel:
    counts: Counter[tuple[Block, str, tuple[int, ...], Stored]] = Counter()
    for block, spec in _loaded(config):
        assert spec.entry is not None
        counts[block, spec.entry.part, spec.shape, stored(spec)] += 1
    family = config.family
    return StoredModel(
        config,
        tuple(
            Part(block, family.entry(block, part), shape, form, count)
            for (block, part, shape, form), count in counts.items()
        ),
    )


def _loaded(config: ModelConfig) -> Iterator[tuple[Block, Spec]]:
    """The tensors that the runtime loads; it has no use for those that a checkpoint may leave out."""
    for spec in ModelTensors(config).unroll(()):
        if spec.block is not None and not spec.optional:
            yield spec.block, spec
