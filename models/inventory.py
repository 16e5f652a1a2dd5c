"""A checkpoint's tensors against its family's table: the role of each, and every way in which config.json and tensors
cannot be of one model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import CheckpointError
from ..formats.dialects import Weight
from .architecture import Family, Role, Spec, family_of, layer_of, unroll
from .config import ModelConfig, check_unbiased

_EXPERT = re.compile(r"mlp\.experts\.([0-9]+)\.(.+)")
# The key that decides whether a tensor with this trait (`Entry.when`) exists.
_KEYS = {
    "full_q": "q_lora_rank",
    "q_lora": "q_lora_rank",
    "router_bias": "topk_method",
    "shared_experts": "n_shared_experts",
}


@dataclass(frozen=True)
class Inventory:
    """Every tensor of a checkpoint with its role, in checkpoint order; what was left out and why."""

    specs: dict[str, Spec]
    fused: tuple[tuple[str, ...], ...]
    mtp_layers: tuple[int, ...]
    absent_mtp_layers: tuple[int, ...]  # the config counts them, the checkpoint leaves them out
    unknown: tuple[str, ...]  # copied as they are, with the role `other`
    dropped: tuple[str, ...]  # recomputable buffers, not copied
    partial_mtp_layers: tuple[int, ...] = ()  # not counted and not whole: no loader runs them, and they are not copied


def take_inventory(config: ModelConfig, weights: Mapping[str, Weight]) -> Inventory:
    """Match a checkpoint's tensors against its family's table, in time linear in their number.

    Raises CheckpointError for a tensor that is missing, one that a model of this config does not have, one whose shape
    disagrees with the config, and a bias. Layers from `num_hidden_layers` on are multi-token-prediction layers: one
    that the config counts is there whole or not at all.
    """
    family = family_of(config.model_type)
    check_unbiased(weights)
    present = {layer for name in weights if (layer := layer_of(name)) is not None}
    first_mtp = config.num_hidden_layers
    counted = range(first_mtp, first_mtp + config.num_nextn_predict_layers)
    mtp, partial = _mtp_layers(family, config, weights, sorted(layer for layer in present if layer >= first_mtp))

    if partial:
        weights = {name: weight for name, weight in weights.items() if layer_of(name) not in partial}
    expected = _expected(config, mtp, weights)
    specs, unknown, dropped = {}, [], []
    for name, weight in weights.items():
        spec = expected.get(name)
        if spec is not None:
            specs[name] = spec
        elif name.endswith(".rotary_emb.inv_freq"):
            dropped.append(name)
        else:
            unknown.append(name)
            specs[name] = Spec(name, Role.OTHER, weight.shape, layer_of(name))
    absent = tuple(layer for layer in counted if layer not in present)
    return Inventory(specs, family.fused, mtp, absent, tuple(unknown), tuple(dropped), partial)


def _mtp_layers(
    family: Family, config: ModelConfig, weights: Mapping[str, Weight], layers: Iterable[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers behind the decoder's: those to keep, and those to leave out.

    One that is not counted is kept where it can be: it is whole, and the next after what is kept. CheckpointError for a
    layer that is no multi-token-prediction layer at all.
    """
    first = config.num_hidden_layers
    kept: list[int] = []
    partial: list[int] = []
    for layer in layers:
        own = [f"model.layers.{layer}.{entry.name}" for entry in family.mtp]
        if not any(name in weights for name in own):
            raise CheckpointError(
                f"config.json has num_hidden_layers {first}, but the checkpoint has layer {layer}, which is no "
                f"multi-token-prediction layer ({own[0]!r} is missing); config and weights are not of one model"
            )
        whole = all(
            spec.optional or (spec.name in weights and spec.shape == tuple(weights[spec.name].shape))
            for spec in unroll(config, (layer,), main=False)
        )
        counted = layer < first + config.num_nextn_predict_layers
        (kept if counted or (whole and layer == first + len(kept)) else partial).append(layer)
    return tuple(kept), tuple(partial)


def _expected(config: ModelConfig, mtp_layers: tuple[int, ...], weights: Mapping[str, Weight]) -> dict[str, Spec]:
    """Every tensor that a model of this config has, once the checkpoint has been found to be one."""
    expected, missing = {}, []
    for spec in unroll(config, mtp_layers):
        expected[spec.name] = spec
        if not spec.optional and spec.name not in weights:
            missing.append(spec.name)
            # A config may claim any number of layers: give up once more is missing than is there.
            if len(missing) > len(weights):
                break
    else:
        _refuse_contradictions(config, expected, weights)
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise CheckpointError(
            f"tensor {missing[0]!r}{more} missing, but config.json calls for it; "
            "the checkpoint is incomplete or its config is another model's: fetch it again"
        )
    _check_shapes(expected, weights)
    return expected


def _check_shapes(expected: Mapping[str, Spec], weights: Mapping[str, Weight]) -> None:
    for name, weight in weights.items():
        spec = expected.get(name)
        if spec is not None and spec.shape != tuple(weight.shape):
            raise CheckpointError(
                f"tensor {name!r} has shape {list(weight.shape)}, but config.json implies {list(spec.shape)}; "
                "config and weights are not of one model"
            )


def _refuse_contradictions(config: ModelConfig, expected: Mapping[str, Spec], weights: Mapping[str, Weight]) -> None:
    """CheckpointError for a tensor that other models of the family have, and one of this config has not: transformers
    would read over it, and engines compute without it or not start."""
    for name, weight in weights.items():
        # A tensor without values contradicts nothing: so transformers saves a part of size 0.
        key = None if name in expected or 0 in weight.shape else _deciding_key(config, name)
        if key is not None:
            raise CheckpointError(
                f"tensor {name!r} is there, but config.json has {key}, with which no model has it; "
                "config and weights are not of one model"
            )


def _deciding_key(config: ModelConfig, name: str) -> str | None:
    """What in config.json says that a tensor of the family's vocabulary does not exist; None for any other tensor."""
    layer = layer_of(name)
    if layer is None:
        return None
    family, moe = family_of(config.model_type), config.is_moe_layer(layer)
    rest = name.split(".", 3)[3]
    expert = _EXPERT.fullmatch(rest)
    if expert is not None and moe and any(entry.name == expert[2] for entry in family.expert):
        return f"n_routed_experts {config.n_routed_experts}"
    if layer < config.num_hidden_layers and any(entry.name == rest for entry in family.mtp):
        return f"num_hidden_layers {config.num_hidden_layers}"
    for entry in (*family.layer, *(family.moe if moe else family.dense)):
        if entry.name == rest and entry.when in _KEYS:
            key = _KEYS[entry.when]
            value = getattr(config, key)
            return f"{key} {'null' if value is None else value}"
    others = {entry.name for entry in (family.dense if moe else family.moe)}
    if rest in others or (expert is not None and any(entry.name == expert[2] for entry in family.expert)):
        return f"first_k_dense_replace {config.first_k_dense_replace} and moe_layer_freq {config.moe_layer_freq}"
    return None
