"""Stored tensors, looked up by name and checked against the shape that config.json gives.

Tensors are memory-mapped views. Of the data, loading reads only FP8 and int4 weights of a float source, which are
dequantized here, and scales, which must be positive numbers. Backends then keep the views, upcast them, or lay them
out for a device.

A rank asks for its part of a tensor. Rows are a view like the whole; columns are copied, and nothing else is read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..dtypes import FLOAT_CODES, ITEM_BYTES
from ..errors import ArtifactError, CheckpointError, NpuqError
from ..formats.artifact import DESCRIPTION_NAME, description_path, is_own, read_description, read_manifest
from ..formats.checkpoint import Checkpoint
from ..formats.schemes import BIAS, BIAS_COLUMNS, DEQ_SCALE, QUANT_BIAS, SCALE, WEIGHT, Scheme
from ..formats.sources.described import described_linear
from ..formats.sources.integer_tables import check_indices
from ..formats.sources.opening import open_weights
from ..formats.sources.stored_linear import StoredLinear
from ..formats.sources.ties import share_tied
from ..formats.sources.weights import WeightSource
from ..models.families import family_of
from ..models.inventory import check_unbiased
from ..native.mapped import MappedFiles
from .memory.stored import NOTHING, Stored, form_of
from .ops import LinearPart, Static
from .ranks.shares import WHOLE, Share

_READ_BYTES = 16 << 20


class Store(Protocol):
    """Source of stored tensors. Errors name the tensor that is missing or of another shape.

    files: the mapped files behind the tensors.
    """

    files: MappedFiles

    def tensor(self, name: str, *shape: int, rows: range | None = None) -> Tensor:
        """The float tensor of that shape, in its stored dtype, memory-mapped. rows: only these of its rows."""

    def table(self, name: str, *shape: int, most: int) -> Tensor:
        """The int64 tensor of that shape, memory-mapped, whose numbers are 0 to `most` − 1."""

    def scheme(self, prefix: str) -> Scheme:
        """The scheme of the linear `{prefix}.weight`."""

    def linear(self, prefix: str, outputs: int, inputs: int, share: Share = WHOLE) -> LinearPart:
        """The linear `{prefix}.weight` `[outputs, inputs]` and the tensors that its scheme stores beside it.

        share: the part of it that this rank loads, as of the linear's scheme.
        """


class FloatStore:
    """Store of an unquantized checkpoint. FP8 and int4 weights are dequantized into `dtype`, all other tensors
    are views."""

    def __init__(self, source: WeightSource, dtype: torch.dtype):
        self.files = source.checkpoint.files
        self._source = source
        self._dtype = dtype

    def tensor(self, name: str, *shape: int, rows: range | None = None) -> Tensor:
        weight = self._source.weights.get(name)
        if weight is None:
            directory = self._source.checkpoint.directory
            raise CheckpointError(f"{directory}: no tensor {name!r}, which its config.json asks for")
        if weight.shape != shape:
            raise CheckpointError(
                f"{weight.file}: tensor {name!r} is {list(weight.shape)}; config.json says {list(shape)}"
            )
        view = weight.view()
        if rows is None:
            return weight.rows().to(self._dtype) if view is None else view
        return weight.rows(rows.start, rows.stop).to(self._dtype) if view is None else view[rows.start : rows.stop]

    def table(self, name: str, *shape: int, most: int) -> Tensor:
        return _table(self._source.checkpoint, name, shape, most, CheckpointError)

    def scheme(self, prefix: str) -> Scheme:
        return Scheme.FLOAT

    def form(self, name: str) -> Stored:
        """How a tensor is stored, unchecked; of one that is missing, which loading will refuse, any form."""
        weight = self._source.weights.get(name)
        return NOTHING if weight is None else form_of(weight)

    def linear(self, prefix: str, outputs: int, inputs: int, share: Share = WHOLE) -> LinearPart:
        return _float_part(self, prefix, outputs, inputs, share)

    def identity(self) -> object:
        """Facts by which ranks know the same model: names, dtypes, shapes; of an artifact also schemes and hashes."""
        return _headers(self._source.checkpoint)


class ArtifactStore:
    """Store of a finished artifact of npuq or of ModelSlim. Schemes are those of the description.

    Raises ArtifactError for an unfinished artifact.
    """

    def __init__(self, checkpoint: Checkpoint):
        manifest = read_manifest(checkpoint.directory) if is_own(checkpoint.directory) else {}
        files = manifest.get("files", {}).items()
        self._hashes = sorted((name, file["sha256"]) for name, file in files if name.endswith(".safetensors"))
        self.files = checkpoint.files
        self._checkpoint = checkpoint
        self._path = description_path(checkpoint.directory) or checkpoint.directory / DESCRIPTION_NAME
        self._types = read_description(checkpoint.directory) or {}

    def tensor(self, name: str, *shape: int, rows: range | None = None) -> Tensor:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise ArtifactError(f"{self._checkpoint.directory}: no tensor {name!r}, which its config.json asks for")
        if info.shape != shape or info.dtype not in FLOAT_CODES:
            raise ArtifactError(
                f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}; config.json and its scheme say "
                f"{' or '.join(FLOAT_CODES)} {list(shape)}"
            )
        view = self._checkpoint.view(name)
        return view if rows is None else view[rows.start : rows.stop]

    def table(self, name: str, *shape: int, most: int) -> Tensor:
        return _table(self._checkpoint, name, shape, most, ArtifactError)

    def scheme(self, prefix: str) -> Scheme:
        name = f"{prefix}.{WEIGHT}"
        if name not in self._types:
            raise ArtifactError(f"{self._path}: no entry for {name!r}; convert the checkpoint again")
        return self._types[name]

    def form(self, name: str) -> Stored:
        """As `FloatStore.form`."""
        info = self._checkpoint.tensors.get(name)
        return NOTHING if info is None else Stored(self._types.get(name, Scheme.FLOAT), ITEM_BYTES[info.dtype], True)

    def linear(self, prefix: str, outputs: int, inputs: int, share: Share = WHOLE) -> LinearPart:
        if self.scheme(prefix) is Scheme.FLOAT:
            return _float_part(self, prefix, outputs, inputs, share)
        name = f"{prefix}.{WEIGHT}"
        try:
            return _part(prefix, described_linear(self._checkpoint, self._types, name, (outputs, inputs)), share)
        except CheckpointError as error:
            raise ArtifactError(str(error)) from error

    def identity(self) -> object:
        """As `FloatStore.identity`."""
        return _headers(self._checkpoint), sorted(self._types.items()), self._hashes


def _table(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], most: int, kind: type[NpuqError]) -> Tensor:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise kind(f"{checkpoint.directory}: no tensor {name!r}, which its config.json asks for")
    if info.shape != shape or info.dtype != "I64":
        raise kind(
            f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}; config.json says I64 {list(shape)}"
        )
    table = checkpoint.view(name)
    try:
        check_indices(table, most, name, info.file)
    except CheckpointError as error:
        raise kind(str(error)) from error
    return table


def _headers(checkpoint: Checkpoint) -> list[tuple[str, str, tuple[int, ...]]]:
    return sorted((name, info.dtype, info.shape) for name, info in checkpoint.tensors.items())


def _float_part(store: Store, prefix: str, outputs: int, inputs: int, share: Share) -> LinearPart:
    rows = None if share.rows is None else share.rows.own
    weight = store.tensor(f"{prefix}.{WEIGHT}", outputs, inputs, rows=rows)
    return LinearPart(prefix, Scheme.FLOAT, weight, output_division=share.rows, input_division=share.inputs)


def _part(prefix: str, linear: StoredLinear, share: Share) -> LinearPart:
    scheme = linear.scheme
    if scheme is Scheme.W4A8:
        # Whole: only experts may be W4A8, and they are not divided. Others are refused where they would run.
        return LinearPart(prefix, scheme, linear.mapped(WEIGHT), linear.mapped_scale(SCALE), _scale_bias(linear))
    columns = share.columns
    codes = _own_rows(linear.mapped(WEIGHT), share) if columns is None else _columns(linear, columns.own)
    part = LinearPart(prefix, scheme, codes, output_division=share.rows, input_division=share.inputs)
    if scheme is Scheme.W8A8_STATIC:
        deq_scale, quant_bias = linear.mapped_scale(DEQ_SCALE).flatten(), linear.mapped(QUANT_BIAS).flatten()
        static = Static(linear.input_scale(), _own_rows(deq_scale, share), _own_rows(quant_bias, share))
        return replace(part, static=static)
    return replace(part, scale=_own_rows(linear.mapped_scale(SCALE), share))


def _own_rows(tensor: Tensor, share: Share) -> Tensor:
    return tensor if share.rows is None else tensor[share.rows.own.start : share.rows.own.stop]


def _columns(linear: StoredLinear, columns: range) -> Tensor:
    """Copy columns of the codes, some rows at a time and not through the map, whose pages hold whole rows."""
    outputs, inputs = linear.shape
    copy = torch.empty(outputs, len(columns), dtype=torch.int8)
    for some in torch.arange(outputs).split(max(1, _READ_BYTES // inputs)):
        first, last = int(some[0]), int(some[-1]) + 1
        rows = linear.checkpoint.read_rows(linear.tensors[WEIGHT], first, last)
        copy[first:last] = rows[:, columns.start : columns.stop]
    return copy


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


def open_store(checkpoint: Checkpoint, dtype: torch.dtype) -> FloatStore | ArtifactStore:
    """Open the store for a directory. dtype: of dequantized weights of a float source."""
    check_unbiased(family_of(checkpoint.config.get("model_type")), checkpoint.tensors)
    share_tied(checkpoint)
    if is_artifact(checkpoint.directory):
        return ArtifactStore(checkpoint)
    source = open_weights(checkpoint)
    if source.is_quantized:
        raise CheckpointError(f"{checkpoint.directory}: compressed-tensors weights: run `npuq convert` on it first")
    return FloatStore(source, dtype)
