"""A checkpoint's tensors compared with its family's table: the role of each, and every contradiction between
config.json and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ..errors import CheckpointError
from .block_draft import draft_key
from .config import ModelConfig
from .family import Block, Family
from .roles import Role
from .tensors import ModelTensors, Spec, conditions


class Shaped(Protocol):
    """A tensor's shape."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Inventory:
    """Every tensor of a checkpoint with its role, in checkpoint order, and the tensors left out with the reason."""

    specs: dict[str, Spec]
    mtp_layers: tuple[int, ...]
    absent_mtp_layers: tuple[int, ...]  # the config counts them, the checkpoint leaves them out
    unknown: tuple[str, ...]  # copied unchanged, with the role `other`
    dropped: tuple[str, ...]  # recomputable buffers, not copied
    partial_mtp_layers: tuple[int, ...] = ()  # behind a gap, or neither counted nor whole: left out


def take_inventory(config: ModelConfig, weights: Mapping[str, Shaped]) -> Inventory:
    """Match a checkpoint's tensors against its family's table, in time linear in their number.

    Raises CheckpointError for a missing tensor, a tensor that this config excludes, a shape that disagrees with the
    config, and a bias outside the table. Layers from `num_hidden_layers` on are multi-token-prediction layers: a
    checkpoint has a counted one whole or not at all.
    """
    family = config.family
    _refuse_renamed(family, weights)
    check_unbiased(family, weights)
    present = {layer for name in weights if (layer := config.layer_of(name)) is not None}
    first_mtp = config.num_hidden_layers
    counted = range(first_mtp, first_mtp + config.num_nextn_predict_layers)
    mtp, partial = _mtp_layers(config, weights, sorted(layer for layer in present if layer >= first_mtp))

    if partial:
        weights = {name: weight for name, weight in weights.items() if config.layer_of(name) not in partial}
    expected = _expected(config, mtp, weights)
    specs, unknown, dropped = {}, [], []
    for name, weight in weights.items():
        spec = expected.get(name)
        if spec is not None:
            specs[name] = spec
        elif family.ignores(name):
            dropped.append(name)
        else:
            if not family.passes_through(name):
                unknown.append(name)
            specs[name] = Spec(name, Role.OTHER, tuple(weight.shape), config.layer_of(name))
    absent = tuple(layer for layer in counted if layer not in present)
    return Inventory(specs, mtp, absent, tuple(unknown), tuple(dropped), partial)


def check_unbiased(family: Family, names: Iterable[str]) -> None:
    """Raise CheckpointError for a bias of a norm or linear outside the family's table: no loader adds it.

    Asymmetric smoothing before quantization leaves such biases.
    """
    for name in filter(family.is_stray_bias, names):
        raise CheckpointError(
            f"tensor {name!r}: npuq and the engines compute without biases; smooth symmetrically and quantize again"
        )


def _refuse_renamed(family: Family, names: Iterable[str]) -> None:
    found = next((name for name in names if name.startswith(family.renamed)), None) if family.renamed else None
    if found is not None:
        raise CheckpointError(
            f"tensor {found!r}: a tool has renamed the tensors of this re-upload; convert the authors' own release"
        )


def _mtp_layers(
    config: ModelConfig, weights: Mapping[str, Shaped], layers: Iterable[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers behind the decoder's: the kept ones, and the ones left out.

    A layer is kept that follows the last kept one and is counted by the config or whole. CheckpointError for a layer
    without any tensor of a multi-token-prediction layer.
    """
    first, tensors = config.num_hidden_layers, ModelTensors(config)
    kept: list[int] = []
    partial: list[int] = []
    for layer in layers:
        own = [config.name(Block.MTP, entry.part, layer) for entry in tensors.family.entries(Block.MTP)]
        # Names of their own tell such layers. Of a draft of several, some have nothing beside a decoder layer.
        if not tensors.family.mtp_layers and not any(name in weights for name in own):
            why = f"{own[0]!r} is missing" if own else "this family has none"
            raise CheckpointError(
                f"config.json has num_hidden_layers {first}, but the checkpoint has layer {layer}, which is no "
                f"multi-token-prediction layer ({why}); config and weights are not of one model"
            )
        next_one = layer == first + len(kept)
        counted = layer < first + config.num_nextn_predict_layers
        whole = counted or all(
            spec.optional or (spec.name in weights and spec.shape == tuple(weights[spec.name].shape))
            for spec in tensors.unroll((layer,), main=False)
        )
        (kept if next_one and whole else partial).append(layer)
    return tuple(kept), tuple(partial)


def _expected(config: ModelConfig, mtp_layers: tuple[int, ...], weights: Mapping[str, Shaped]) -> dict[str, Spec]:
    """Every tensor of a model of this config. CheckpointError when the checkpoint contradicts it."""
    expected, missing = {}, []
    for spec in ModelTensors(config).unroll(mtp_layers):
        expected[spec.name] = spec
        if not spec.optional and spec.name not in weights:
            missing.append(spec.name)
            # A config may claim any number of layers: give up once more tensors are missing than exist.
            if len(missing) > len(weights):
                break
    else:
        _refuse_contradictions(config, expected, weights)
    if missing:
        several = len(missing) > 1
        more = f" and {len(missing) - 1} more are" if several else " is"
        raise CheckpointError(
            f"tensor {missing[0]!r}{more} missing, but config.json calls for {'them' if several else 'it'} in a "
            f"{config.model_type}; the checkpoint is incomplete, or of another model: fetch it again"
        )
    _check_shapes(expected, weights)
    return expected


def _check_shapes(expected: Mapping[str, Spec], weights: Mapping[str, Shaped]) -> None:
    for name, weight in weights.items():
        spec = expected.get(name)
        if spec is not None and spec.shape != tuple(weight.shape):
            raise CheckpointError(
                f"tensor {name!r} has shape {list(weight.shape)}, but config.json implies {list(spec.shape)}; "
                "config and weights are not of one model"
            )


def _refuse_contradictions(config: ModelConfig, expected: Mapping[str, Spec], weights: Mapping[str, Shaped]) -> None:
    """Raise CheckpointError for a tensor of the family's table that this config excludes: transformers would skip it,
    engines would compute without it or not start."""
    for name, weight in weights.items():
        # A tensor without values contradicts nothing: transformers saves one for a part of size 0.
        key = None if name in expected or 0 in weight.shape else _deciding_key(config, name)
        if key is not None:
            raise CheckpointError(
                f"tensor {name!r} is there, but config.json has {key}, with which no model has it; "
                "config and weights are not of one model"
            )


def _deciding_key(config: ModelConfig, name: str) -> str | None:
    """The key of config.json that excludes a tensor of the family's table; None for any other tensor."""
    layer, found = config.layer_of(name), config.family.find(name)
    if layer is None or found is None:
        return None
    _, entry, expert = found
    if entry.when in conditions(config, layer):
        return None if expert is None else f"n_routed_experts {config.n_routed_experts}"
    if entry.when == "mtp":
        return f"num_hidden_layers {config.num_hidden_layers}"
    drafted = draft_key(config.block_draft, entry.when)
    if drafted is not None:
        return _value(*drafted, layer)
    for part in (config.attention, config.moe_at(layer)):
        if part is not None and entry.when in part.KEYS:
            key = part.KEYS[entry.when]
            return _value(key, getattr(part, key), layer)
    if config.moe is None:
        return "no experts"
    return " and ".join(_value(key, value, layer) for key, value in config.moe.layers.keys().items())


def _value(key: str, value: object, layer: int) -> str:
    if isinstance(value, tuple) and layer < len(value):
        return f"{key} {value[layer]} for layer {layer}"
    return f"{key} {'null' if value is None else value}"
