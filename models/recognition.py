"""Recognition of a model by its tensors, where config.json has a model_type that npuq does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CheckpointError, UnknownModelError
from .config import TEXT_CONFIG, ModelConfig
from .config_reader import shown
from .families import FAMILIES, is_known, unknown_type
from .family import Block, Family
from .inventory import Shaped, take_inventory


def read_as(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A config.json with the family's model_type and architecture, by which transformers and the engines choose the
    model's class, and without `auto_map`, which names code for the model_type that it had. A text model in it gets a
    type that the family has for it."""
    kept = {key: value for key, value in raw.items() if key != "auto_map"}
    text = kept.get(TEXT_CONFIG)
    if family.text_types and isinstance(text, Mapping) and not is_known(text.get("model_type")):
        kept[TEXT_CONFIG] = {**text, "model_type": family.text_types[0]}
    return {**kept, "model_type": family.model_type, "architectures": [family.architecture]}


def type_as_text(raw: Mapping[str, Any]) -> str:
    """The model_type of a config.json, for files and tables; one that is no text as a message shows it."""
    stated = raw.get("model_type")
    return stated if isinstance(stated, str) else shown(stated)


def unknown_model(raw: Mapping[str, Any], weights: Mapping[str, Shaped]) -> UnknownModelError:
    """The error for an unknown model_type. It names the families whose tables fit these weights exactly, or the first
    difference from the nearest one. Names and shapes are compared, in time linear in their number.
    """
    comparison = _Comparison(raw, weights)
    differences = {name: comparison.difference(family) for name, family in FAMILIES.items()}
    ranked = sorted(FAMILIES, key=lambda name: (*_agreement(raw, FAMILIES[name]), name))
    fitting = [name for name in ranked if differences[name] is None]
    if fitting:
        first, *others = fitting
        what = f"config.json: model_type {shown(raw.get('model_type'))} is unknown"
        alike = f" ({' and '.join(others)} would fit too; its keys agree most with {first})" if others else ""
        return UnknownModelError(f"{what}; it looks like {first}{alike}: name it with --as {first}", tuple(fitting))
    known = {name: comparison.names(family).known for name, family in FAMILIES.items()}
    # The first of equals is that whose keys agree most.
    nearest = max(ranked, key=known.__getitem__)
    if 2 * known[nearest] <= len(weights):
        why = f"of their tensors this has {known[nearest]} of {len(weights)}"
    else:
        why = f"it is no {nearest}, the nearest: {differences[nearest]}"
    return UnknownModelError(f"{unknown_type(raw.get('model_type'))}: {why}", ())


@dataclass(frozen=True)
class _Names:
    """Names of weights against those of a table: the number of known ones, and the first unknown one."""

    known: int
    stranger: str | None


class _Comparison:
    """Weights and config.json against families. What several families share is compared once."""

    def __init__(self, raw: Mapping[str, Any], weights: Mapping[str, Shaped]):
        self._raw, self._weights = raw, weights
        self._names: list[tuple[object, _Names]] = []
        self._inventories: list[tuple[object, str | None]] = []

    def names(self, family: Family) -> _Names:
        """The names of the weights against those of the family's table."""
        table = _table(family)
        for other, found in self._names:
            if other == table:
                return found
        strangers = [
            name
            for name in self._weights
            if family.find(name) is None and not family.passes_through(name) and not family.ignores(name)
        ]
        self._names.append((table, _Names(len(self._weights) - len(strangers), next(iter(strangers), None))))
        return self._names[-1][1]

    def difference(self, family: Family) -> str | None:
        """The first difference from the family; None where its table fits exactly."""
        stranger = self.names(family).stranger
        if stranger is not None:
            return f"that family has no tensor {shown(stranger)}"
        try:
            config = ModelConfig.from_dict(read_as(self._raw, family))
        except CheckpointError as error:
            return str(error)
        table = (_table(family), replace(config, model_type=""))
        for other, found in self._inventories:
            if other == table:
                return found
        self._inventories.append((table, self._inventory(config)))
        return self._inventories[-1][1]

    def _inventory(self, config: ModelConfig) -> str | None:
        try:
            inventory = take_inventory(config, _with_tied(config, self._weights))
        except CheckpointError as error:
            return str(error)
        if inventory.partial_mtp_layers:
            return f"layer {inventory.partial_mtp_layers[0]} is no whole multi-token-prediction layer"
        return None


def _table(family: Family) -> object:
    """The columns of a family that decide which names it has."""
    return (
        family.blocks,
        family.prefix,
        family.layers,
        family.experts,
        family.mtp_layers,
        family.passthrough,
        family.ignored,
    )


def _with_tied(config: ModelConfig, weights: Mapping[str, Shaped]) -> Mapping[str, Shaped]:
    """The weights with both names of a tied embedding, of which one is stored."""
    pair = {config.name(Block.TOP, part) for part in ("embedding", "head")}
    stored = pair & weights.keys()
    if not config.tie_word_embeddings or len(stored) != 1:
        return weights
    return {**weights, **dict.fromkeys(pair, weights[stored.pop()])}


def _agreement(raw: Mapping[str, Any], family: Family) -> tuple[bool, int]:
    """Sort key of families by the architecture and the defaults that config.json states; the most come first."""
    architectures = raw.get("architectures")
    named = isinstance(architectures, list) and family.architecture in architectures
    defaults: dict[str, Any] = {} if family.moe is None else dict(vars(family.moe))
    defaults["rms_norm_eps"] = family.rms_norm_eps
    nested = raw.get(TEXT_CONFIG)
    keys = nested if family.text_types and isinstance(nested, Mapping) else raw
    agreeing = sum(key in keys and keys[key] == value for key, value in defaults.items())
    reads_types = family.moe is not None and family.moe.reads_layer_types
    return not named, -agreeing - (reads_types and "mlp_layer_types" in keys)
