"""Stored tensors, looked up by name and checked against the shape that config.json gives.

Tensors are memory-mapped views. Of the data, loading reads only FP8 and int4 weights of a float source, which are
dequantized here, and scales, which must be positive numbers. Backends then keep the views, upcast them, or lay them
out for a device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArtifactError, CheckpointError
from ..formats.artifact import DESCRIPTION_NAME, description_path, is_own, read_description, read_manifest
from ..formats.checkpoint import Checkpoint
from ..formats.safetensors import FLOAT_CODES
from ..formats.schemes import BIAS, BIAS_COLUMNS, DEQ_SCALE, QUANT_BIAS, SCALE, WEIGHT, Scheme
from ..formats.sources.described import described_linear
from ..formats.sources.opening import open_weights
from ..formats.sources.stored_linear import StoredLinear
from ..formats.sources.ties import share_tied
from ..formats.sources.weights import WeightSource
from ..models.families import family_of
from ..models.inventory import check_unbiased
from ..native.mapped import MappedFiles
from .ops import LinearPart, Static


class Store(Protocol):
    """Source of stored tensors. Errors name the tensor that is missing or of another shape.

    files: the mapped files behind the tensors.
    """

    files: MappedFiles

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The float tensor of that shape, in its stored dtype, memory-mapped."""

    def linear(self, prefix: str, outputs: int, inputs: int) -> LinearPart:
        """The linear `{prefix}.weight` `[outputs, inputs]` and the tensors that its scheme stores beside it."""


class FloatStore:
    """Store of an unquantized checkpoint. FP8 and int4 weights are dequantized into `dtype`, all other tensors
    are views."""

    def __init__(self, source: WeightSource, dtype: torch.dtype):
        self.files = source.checkpoint.files
        self._source = source
        self._dtype = dtype

    def tensor(self, name: str, *shape: int) -> Tensor:
        weight = self._source.weights.get(name)
        if weight is None:
            directory = self._source.checkpoint.directory
            raise CheckpointError(f"{directory}: no tensor {name!r}, which its config.json asks for")
        if weight.shape != shape:
            raise CheckpointError(
                f"{weight.file}: tensor {name!r} is {list(weight.shape)}; config.json says {list(shape)}"
            )
        view = weight.view()
        return weight.rows().to(self._dtype) if view is None else view

    def linear(self, prefix: str, outputs: int, inputs: int) -> LinearPart:
        return LinearPart(prefix, Scheme.FLOAT, self.tensor(f"{prefix}.weight", outputs, inputs))


class ArtifactStore:
    """Store of a finished artifact of npuq or of ModelSlim. Schemes are those of the description.

    Raises ArtifactError for an unfinished artifact.
    """

    def __init__(self, checkpoint: Checkpoint):
        if is_own(checkpoint.directory):
            read_manifest(checkpoint.directory)
        self.files = checkpoint.files
        self._checkpoint = checkpoint
        self._path = description_path(checkpoint.directory) or checkpoint.directory / DESCRIPTION_NAME
        self._types = read_description(checkpoint.directory) or {}

    def tensor(self, name: str, *shape: int) -> Tensor:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise ArtifactError(f"{self._checkpoint.directory}: no tensor {name!r}, which its config.json asks for")
        if info.shape != shape or info.dtype not in FLOAT_CODES:
            raise ArtifactError(
                f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}; config.json and its scheme say "
                f"{' or '.join(FLOAT_CODES)} {list(shape)}"
            )
        return self._checkpoint.view(name)

    def linear(self, prefix: str, outputs: int, inputs: int) -> LinearPart:
        name = f"{prefix}.{WEIGHT}"
        if name not in self._types:
            raise ArtifactError(f"{self._path}: no entry for {name!r}; convert the checkpoint again")
        if self._types[name] is Scheme.FLOAT:
            return LinearPart(prefix, Scheme.FLOAT, self.tensor(name, outputs, inputs))
        try:
            return _part(prefix, described_linear(self._checkpoint, self._types, name, (outputs, inputs)))
        except CheckpointError as error:
            raise ArtifactError(str(error)) from error


def _part(prefix: str, linear: StoredLinear) -> LinearPart:
    scheme, codes = linear.scheme, linear.mapped(WEIGHT)
    if scheme is Scheme.W8A8_STATIC:
        deq_scale, quant_bias = linear.mapped_scale(DEQ_SCALE).flatten(), linear.mapped(QUANT_BIAS).flatten()
        return LinearPart(prefix, scheme, codes, static=Static(linear.input_scale(), deq_scale, quant_bias))
    scale = linear.mapped_scale(SCALE)
    return LinearPart(prefix, scheme, codes, scale, _scale_bias(linear) if scheme is Scheme.W4A8 else None)


def _scale_bias(linear: StoredLinear) -> Tensor:
    if BIAS not in linear.tensors:
        raise ArtifactError(f"{linear.file}: {linear.name!r} has no {BIAS}; `npuq convert` the artifact: that adds it")
    bias = linear.mapped(BIAS)
    if bias.shape[1] not in (1, BIAS_COLUMNS):
        name = linear.tensors[BIAS]
        raise ArtifactError(
            f"{linear.file}: tensor {name!r} has {bias.shape[1]} partial sums, and operators take 1 or "
            f"{BIAS_COLUMNS}; `npuq convert` the artifact: that makes them anew"
        )
    return bias if bias.dtype is torch.float32 else bias.to(torch.float32)


def is_artifact(directory: Path) -> bool:
    """True for the directory of a quantized artifact, which has the description that engines look for."""
    return description_path(directory) is not None


def open_store(checkpoint: Checkpoint, dtype: torch.dtype) -> Store:
    """Open the store for a directory. dtype: of dequantized weights of a float source."""
    check_unbiased(family_of(checkpoint.config.get("model_type")), checkpoint.tensors)
    share_tied(checkpoint)
    if is_artifact(checkpoint.directory):
        return ArtifactStore(checkpoint)
    source = open_weights(checkpoint)
    if source.is_quantized:
        raise CheckpointError(f"{checkpoint.directory}: compressed-tensors weights: run `npuq convert` on it first")
    return FloatStore(source, dtype)
