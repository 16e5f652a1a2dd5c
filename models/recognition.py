"""Recognition of a model by its tensors, where config.json has a model_type that npuq does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import CheckpointError, UnknownModelError
from .config import ModelConfig
from .config_reader import shown
from .families import FAMILIES, unknown_type
from .family import Block, Family
from .inventory import Shaped, take_inventory


def read_as(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A config.json with the family's model_type and architecture, by which transformers and the engines choose the
    model's class, and without `auto_map`, which names code for the model_type that it had."""
    kept = {key: value for key, value in raw.items() if key != "auto_map"}
    return {**kept, "model_type": family.model_type, "architectures": [family.architecture]}


def unknown_model(raw: Mapping[str, Any], weights: Mapping[str, Shaped]) -> UnknownModelError:
    """The error for an unknown model_type. It names the families whose tables fit these weights exactly, or the first
    difference from the nearest one. Names and shapes are compared, in time linear in their number.
    """
    differences = {name: difference(raw, family, weights) for name, family in FAMILIES.items()}
    fitting = [name for name in _by_agreement(raw) if differences[name] is None]
    if fitting:
        first, *others = fitting
        alike = f" ({' and '.join(others)} would fit too; its keys agree most with {first})" if others else ""
        what = f"config.json: model_type {shown(raw.get('model_type'))} is unknown"
        return UnknownModelError(f"{what}; it looks like {first}{alike}: convert with --as {first}", tuple(fitting))
    known = {name: sum(_is_known(family, tensor) for tensor in weights) for name, family in FAMILIES.items()}
    # The first of equals is that whose keys agree most.
    nearest = max(_by_agreement(raw), key=known.__getitem__)
    if 2 * known[nearest] < len(weights):
        why = f"of their tensors this has {known[nearest]} of {len(weights)}"
    else:
        why = f"it is no {nearest}, the nearest: {differences[nearest]}"
    return UnknownModelError(f"{unknown_type(raw.get('model_type'))}: {why}", ())


def difference(raw: Mapping[str, Any], family: Family, weights: Mapping[str, Shaped]) -> str | None:
    """The first difference of weights and config.json from a family; None where its table fits exactly."""
    stranger = next((name for name in weights if not _is_known(family, name)), None)
    if stranger is not None:
        return f"that family has no tensor {shown(stranger)}"
    try:
        config = ModelConfig.from_dict(read_as(raw, family))
        inventory = take_inventory(config, _with_tied(raw, family, weights))
    except CheckpointError as error:
        return str(error)
    if inventory.partial_mtp_layers:
        return f"layer {inventory.partial_mtp_layers[0]} is no whole multi-token-prediction layer"
    return None


def _is_known(family: Family, name: str) -> bool:
    return family.find(name) is not None or family.passes_through(name) or family.ignores(name)


def _with_tied(raw: Mapping[str, Any], family: Family, weights: Mapping[str, Shaped]) -> Mapping[str, Shaped]:
    """The weights with both names of a tied embedding, of which one is stored."""
    pair = {family.name(Block.TOP, part) for part in ("embedding", "head")}
    stored = pair & weights.keys()
    if raw.get("tie_word_embeddings") is not True or len(stored) != 1:
        return weights
    return {**weights, **dict.fromkeys(pair, weights[stored.pop()])}


def _by_agreement(raw: Mapping[str, Any]) -> list[str]:
    """The families' names, those first whose architecture and defaults config.json states."""
    return sorted(FAMILIES, key=lambda name: (*_agreement(raw, FAMILIES[name]), name))


def _agreement(raw: Mapping[str, Any], family: Family) -> tuple[bool, int]:
    architectures = raw.get("architectures")
    named = isinstance(architectures, list) and family.architecture in architectures
    defaults = (
        {} if family.moe is None else {field.name: getattr(family.moe, field.name) for field in fields(family.moe)}
    )
    defaults["rms_norm_eps"] = family.rms_norm_eps
    agreeing = sum(key in raw and raw[key] == value for key, value in defaults.items())
    reads_types = family.moe is not None and family.moe.reads_layer_types
    return not named, -agreeing - (reads_types and "mlp_layer_types" in raw)
