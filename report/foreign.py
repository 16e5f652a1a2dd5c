"""Sizes and schemes of an artifact that another tool made, from headers and description; no errors are known."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from ..formats.checkpoint import Checkpoint
from ..formats.schemes import WEIGHT, Scheme
from ..models.config import ModelConfig
from ..models.roles import Role
from ..models.tensors import Spec
from .linears import LinearFacts, RoleFacts, linear_facts


def mtp_layers(checkpoint: Checkpoint, config: ModelConfig) -> tuple[int, ...]:
    """The multi-token-prediction layers present: those after the decoder's."""
    layers = {config.layer_of(name) for name in checkpoint.tensors}
    return tuple(sorted(layer for layer in layers if layer is not None and layer >= config.num_hidden_layers))


def foreign_linears(
    checkpoint: Checkpoint, types: Mapping[str, Scheme], specs: Mapping[str, Spec]
) -> tuple[LinearFacts, ...]:
    """The quantized linears that the architecture knows, in natural order."""
    return tuple(
        linear_facts(specs[name], types[name].value)
        for name in checkpoint.tensors
        if name in specs and specs[name].layer is not None and types.get(name, Scheme.FLOAT) is not Scheme.FLOAT
    )


def foreign_roles(
    checkpoint: Checkpoint, types: Mapping[str, Scheme], specs: Mapping[str, Spec]
) -> tuple[RoleFacts, ...]:
    """Sizes by role and scheme, the largest first. Tensors stored beside a weight (its scales) count with it."""
    sums: dict[tuple[str, str], list[int]] = {}
    for name, info in checkpoint.tensors.items():
        owner = name if name in specs else _owner(name, checkpoint)
        spec, scheme = specs.get(owner), types.get(owner, Scheme.FLOAT)
        total = sums.setdefault(((spec.role if spec else Role.OTHER).value, scheme.value), [0, 0, 0])
        total[2] += info.nbytes
        if owner == name:
            total[0] += 1
            total[1] += prod(spec.shape if spec else info.shape)
    roles = [
        RoleFacts(*key, tensors, parameters, None, size, None) for key, (tensors, parameters, size) in sums.items()
    ]
    return tuple(sorted(roles, key=lambda role: (-role.output_bytes, role.role, role.scheme)))


def _owner(name: str, checkpoint: Checkpoint) -> str:
    """The weight of the module that a tensor belongs to; the tensor itself where there is none."""
    weight = f"{name.rpartition('.')[0]}.{WEIGHT}"
    return weight if weight in checkpoint.tensors else name
