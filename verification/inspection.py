"""`inspect`: the tensors of a checkpoint or an artifact, by role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..formats.artifact import MANIFEST_NAME, is_own, read_manifest, read_report
from ..formats.checkpoint import Checkpoint
from ..formats.sources.model_config import read_model_config
from ..formats.sources.opening import open_weights
from ..formats.sources.ties import share_tied
from ..formats.sources.weights import WeightSource
from ..models.config import ModelConfig
from ..models.inventory import take_inventory
from ..models.recognition import type_as_text
from .evaluations import read_evaluations


@dataclass(frozen=True)
class RoleLine:
    """All tensors of one role and scheme; `bits` is stored bits a parameter, scales included; `output_bytes` are the
    bytes in this directory.

    In a source checkpoint `scheme` is the stored dtype, and results of a conversion are None.
    """

    role: str
    scheme: str
    tensors: int
    parameters: int
    bits: float
    source_bytes: int | None
    output_bytes: int
    relative_error: float | None


@dataclass(frozen=True)
class Inspection:
    """`kind` is artifact (npuq's own), quantized_checkpoint (ModelSlim's or llm-compressor's) or checkpoint; `recipe`
    and `source` are None for all but the first. `stated_model_type` is that of config.json, where it is unknown and the
    checkpoint was read as one of a family; else None. `evaluations` are the results that `npuq evaluate --save` kept,
    oldest first."""

    path: str
    kind: str
    model_type: str
    layers: int
    experts: int
    recipe: str | None
    source: str | None
    lines: tuple[RoleLine, ...]
    evaluations: tuple[Mapping[str, Any], ...] = ()
    stated_model_type: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Fields as values for JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "lines"}
        return {**fields, "roles": [vars(line) for line in self.lines]}


def inspect(path: str | Path, family: str | None = None) -> Inspection:
    """List the tensors of a directory by role, from headers and the artifact's role totals; no weight is read.

    A checkpoint of unknown model_type is read as one of `family`.

    Raises CheckpointError for a directory that is neither checkpoint nor artifact, ArtifactError for an unfinished or
    damaged artifact.
    """
    directory = Path(path)
    with Checkpoint.open(directory) as checkpoint:
        checkpoint.read_as(family)
        config = read_model_config(checkpoint)
        if is_own(directory):
            manifest = read_manifest(directory)
            kind, (recipe, source) = "artifact", _origin(directory, manifest)
            lines, evaluations = _artifact_lines(directory), tuple(read_evaluations(manifest))
        else:
            shared = share_tied(checkpoint)
            weights, recipe, source = open_weights(checkpoint), None, None
            kind = "quantized_checkpoint" if weights.is_quantized else "checkpoint"
            lines, evaluations = _checkpoint_lines(config, weights, shared), ()
    layers, experts = config.num_hidden_layers, config.n_routed_experts
    stated = None if checkpoint.stated is None else type_as_text(checkpoint.stated)
    return Inspection(str(path), kind, config.model_type, layers, experts, recipe, source, lines, evaluations, stated)


def _origin(directory: Path, manifest: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the recipe and the source of an artifact."""
    try:
        return manifest["recipe"]["name"], manifest["source"]["name"]
    except KeyError as error:
        raise ArtifactError(
            f"{directory / MANIFEST_NAME}: does not say what it was made from; run npuq verify, or convert again"
        ) from error


def _artifact_lines(directory: Path) -> tuple[RoleLine, ...]:
    return tuple(_artifact_line(role) for role in read_report(directory)["roles"])


def _artifact_line(role: Mapping[str, Any]) -> RoleLine:
    return RoleLine(
        role=role["role"],
        scheme=role["scheme"],
        tensors=role["tensors"],
        parameters=role["parameters"],
        bits=8 * role["output_bytes"] / max(1, role["parameters"]),
        source_bytes=role["source_bytes"],
        output_bytes=role["output_bytes"],
        relative_error=role["relative_error"],
    )


def _checkpoint_lines(config: ModelConfig, source: WeightSource, shared: str | None) -> tuple[RoleLine, ...]:
    """Count the tensors; `shared` is the name under which a tied tensor is read a second time: it is stored once."""
    inventory = take_inventory(config, source.weights)
    totals: dict[tuple[str, str], list[int]] = {}
    for name, spec in inventory.specs.items():
        if name == shared:
            continue
        weight = source.weights[name]
        total = totals.setdefault((spec.role.value, weight.dtype), [0, 0, 0])
        for position, amount in enumerate((1, prod(weight.shape), weight.nbytes)):
            total[position] += amount
    lines = [
        RoleLine(role, dtype, tensors, parameters, 8 * nbytes / max(1, parameters), None, nbytes, None)
        for (role, dtype), (tensors, parameters, nbytes) in totals.items()
    ]
    return tuple(sorted(lines, key=lambda line: (-line.output_bytes, line.role, line.scheme)))
