"""Verification of an artifact that npuq did not make: no manifest vouches for its files, so that its structure and its
values have to speak for themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engines.rules import violations
from ..errors import CheckpointError, NpuqError
from ..formats.artifact import DESCRIPTION_NAME, description_path, read_description
from ..formats.checkpoint import CONFIG_NAME, Checkpoint
from ..formats.safetensors import DTYPES
from ..formats.schemes import Scheme
from ..formats.sources.opening import open_weights
from ..formats.sources.weights import Weight, WeightSource
from ..formats.ties import share_tied
from ..models.config import ModelConfig
from ..models.inventory import Inventory, take_inventory
from ..models.roles import Role
from ..models.tensors import Spec
from ..parallel.pool import Pool
from ..progress import LayersLeft, Progress, Task
from ..recipes.recipe import Target
from .structure import unlisted
from .values import TensorCheck, check_linear, check_shared_inputs, row_chunks


@dataclass(frozen=True)
class StoredArtifact:
    """What was read, and everything that is wrong with it; `source` is None when it could not be opened."""

    problems: tuple[str, ...]
    checks: tuple[TensorCheck, ...] = ()
    source: WeightSource | None = None


def check_stored(directory: Path, original: WeightSource | None, pool: Pool, progress: Progress) -> StoredArtifact:
    """Structure, engines' rules and every value; with `original`, the float checkpoint, the error of every linear."""
    try:
        with Checkpoint.open(directory) as checkpoint:
            problems = list(_structure(directory, checkpoint))
            share_tied(checkpoint)
            source = open_weights(checkpoint)
            config = ModelConfig.from_dict(checkpoint.config)
            inventory = take_inventory(config, source.weights)
            schemes = source.schemes
            problems += _rules(schemes, inventory)
            problems += check_shared_inputs(checkpoint, config, inventory.specs, schemes)
            left = LayersLeft(spec.layer for spec in inventory.specs.values())
            nbytes = sum(weight.nbytes for weight in source.weights.values())
            progress.start(Task("verify", nbytes, layers=left.count))
            checks = []
            for check in pool.map(lambda spec: _check(source, spec, original), inventory.specs.values()):
                checks.append(check)
                layer = check.spec.layer
                progress.advance(source.weights[check.spec.name].nbytes, layer=layer, layer_done=left.part_done(layer))
    except NpuqError as error:
        return StoredArtifact((str(error),))
    return StoredArtifact((*problems, *(line for check in checks for line in check.problems)), tuple(checks), source)


def _structure(directory: Path, checkpoint: Checkpoint) -> Iterator[str]:
    """What loaders that know only names would trip over, though npuq finds its way."""
    found = description_path(directory)
    if found is not None and found.name != DESCRIPTION_NAME:
        yield f"{found.name}: engines look for {DESCRIPTION_NAME}: rename it, or run `npuq convert`"
    types = read_description(directory) or {}
    for name in checkpoint.tensors.keys() - types.keys():
        yield f"{DESCRIPTION_NAME}: has no entry for tensor {name!r}"
    for name in sorted(types.keys() - checkpoint.tensors.keys()):
        yield f"{DESCRIPTION_NAME}: describes {name!r}, which no shard has"
    shards = {path.name for path in checkpoint.shards}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in shards:
            yield f"{path.name}: not part of the artifact, but engines load every .safetensors in this folder"
    yield from unlisted(checkpoint)
    for where, part in (("", checkpoint.config), (" under text_config", checkpoint.config.get("text_config"))):
        if isinstance(part, dict) and "quantization_config" in part:
            yield f"{CONFIG_NAME}: quantization_config{where} is left: engines would ignore {DESCRIPTION_NAME}"


def _rules(schemes: Mapping[str, Scheme], inventory: Inventory) -> Iterator[str]:
    for violation in violations(inventory.specs, schemes.__getitem__, Target.ENGINES):
        yield f"{DESCRIPTION_NAME}: {violation}"


def _check(source: WeightSource, spec: Spec, original: WeightSource | None) -> TensorCheck:
    """One weight, read whole in chunks of rows; its errors are damage, named."""
    weight = source.weights[spec.name]
    if original is not None:
        theirs = original.weights.get(spec.name)
        if theirs is None or theirs.shape != spec.shape:
            found = "is missing" if theirs is None else f"has shape {list(theirs.shape)}"
            return TensorCheck(spec, (f"tensor {spec.name!r} {found} in the source: it is another model's",))
    try:
        if weight.linear is None:
            return TensorCheck(spec, tuple(_float_problems(weight, spec)))
        return check_linear(weight.linear, spec, original, exact=False)
    except CheckpointError as error:
        return TensorCheck(spec, (str(error),))


def _float_problems(weight: Weight, spec: Spec) -> Iterator[str]:
    for start, stop in row_chunks(spec) if spec.shape and spec.role is not Role.OTHER else ():
        if not torch.isfinite(weight.rows(start, stop).to(DTYPES[weight.float_code])).all():
            yield f"tensor {spec.name!r} holds infinities or NaN"
            return
