"""Verification of an artifact that npuq did not make: no manifest vouches for its files, so that its structure and its
values have to speak for themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..convert.plan.recipe import Target
from ..convert.tally import LayersLeft
from ..convert.write.journal import JobStats
from ..engines.rules import violations
from ..errors import CheckpointError, NpuqError
from ..formats.artifact import DESCRIPTION_NAME, description_path, read_description
from ..formats.checkpoint import CONFIG_NAME, Checkpoint
from ..formats.dialects import WeightSource
from ..formats.sources import open_weights
from ..formats.stored import QuantizedSource
from ..formats.ties import share_tied
from ..models.config import ModelConfig
from ..models.inventory import Inventory, take_inventory
from ..models.roles import Role
from ..models.tensors import Spec
from ..parallel.pool import Pool
from ..progress import Progress, Task
from .structure import unlisted
from .values import TensorCheck, check_shared_inputs, row_chunks


@dataclass(frozen=True)
class StoredArtifact:
    """What was read, and everything that is wrong with it; `source` is None when it could not be opened."""

    problems: tuple[str, ...]
    checks: tuple[TensorCheck, ...] = ()
    source: QuantizedSource | None = None


def check_stored(directory: Path, original: WeightSource | None, pool: Pool, progress: Progress) -> StoredArtifact:
    """Structure, engines' rules and every value; with `original`, the float checkpoint, the error of every linear."""
    try:
        with Checkpoint.open(directory) as checkpoint:
            problems = list(_structure(directory, checkpoint))
            share_tied(checkpoint)
            source = open_weights(checkpoint)
            assert isinstance(source, QuantizedSource)  # the directory has a description
            config = ModelConfig.from_dict(checkpoint.config)
            inventory = take_inventory(config, source.weights)
            problems += _rules(source, inventory)
            problems += check_shared_inputs(checkpoint, config, inventory.specs, source.schemes)
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


def _rules(source: QuantizedSource, inventory: Inventory) -> Iterator[str]:
    for violation in violations(inventory.specs, source.schemes.__getitem__, Target.ENGINES):
        yield f"{DESCRIPTION_NAME}: {violation}"


def _check(source: QuantizedSource, spec: Spec, original: WeightSource | None) -> TensorCheck:
    """One weight, read whole in chunks of rows; its errors are damage, named."""
    if original is not None:
        weight = original.weights.get(spec.name)
        if weight is None or tuple(weight.shape) != spec.shape:
            found = "is missing" if weight is None else f"has shape {list(weight.shape)}"
            return TensorCheck(spec, (f"tensor {spec.name!r} {found} in the source: it is another model's",))
    try:
        if spec.name not in source.linears:
            return TensorCheck(spec, tuple(_float_problems(source, spec)))
        return TensorCheck(spec, (), _linear_stats(source, spec, original))
    except CheckpointError as error:
        return TensorCheck(spec, (str(error),))


def _float_problems(source: QuantizedSource, spec: Spec) -> Iterator[str]:
    for start, stop in row_chunks(spec) if spec.shape and spec.role is not Role.OTHER else ():
        if not torch.isfinite(source.rows_float(spec.name, start, stop)).all():
            yield f"tensor {spec.name!r} holds infinities or NaN"
            return


def _linear_stats(source: QuantizedSource, spec: Spec, original: WeightSource | None) -> JobStats | None:
    squared_error, squared_norm = np.zeros(spec.shape[0]), np.zeros(spec.shape[0])
    for start, stop in row_chunks(spec):
        source.quantized_rows(spec.name, start, stop, row_parallel=spec.row_parallel)
        if original is None:
            continue
        expected = original.rows_float32(spec.name, start, stop).to(torch.float64)
        difference = source.rows_float32(spec.name, start, stop).to(torch.float64) - expected
        squared_error[start:stop] = difference.square().sum(1).numpy()
        squared_norm[start:stop] = expected.square().sum(1).numpy()
    return None if original is None else JobStats(float(squared_error.sum()), float(squared_norm.sum()))
