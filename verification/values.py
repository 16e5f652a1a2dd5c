"""Verification of values, streamed: codes, scales and biases against each other, float weights, rope tables; and with
the source at hand, the error of every linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..engines.rules import fused_pairs
from ..errors import ArtifactError, CheckpointError, NpuqError
from ..formats.artifact import KV_CACHE_NAME, ROPE_NAME
from ..formats.checkpoint import Checkpoint
from ..formats.kv_cache import load_scales
from ..formats.rope_file import load_rope
from ..formats.schemes import INPUT_OFFSET, INPUT_SCALE, WEIGHT, Scheme
from ..formats.sources.described import described_linear
from ..formats.sources.stored_linear import StoredLinear
from ..formats.sources.weights import WeightSource
from ..inputs.files import inside, is_inside
from ..models.config import ModelConfig
from ..models.roles import Role
from ..models.rope import rope_tables
from ..models.tensors import Spec
from ..quant.weight_error import ErrorSums
from .structure import Layout

_CHUNK_ELEMENTS = 1 << 20
# Tables recomputed with another libm may differ in the last bit.
_ROPE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class TensorCheck:
    """The result for one source tensor: problems, and its error sums when it is quantized and the source is at hand."""

    spec: Spec
    problems: tuple[str, ...] = ()
    stats: ErrorSums | None = None


def check_values(layout: Layout, spec: Spec, source: WeightSource | None) -> TensorCheck:
    """Read every value of one source tensor's artifact tensors, in chunks of rows."""
    if not _is_readable(layout, spec):
        return TensorCheck(spec)  # the layout checks have named it
    if source is not None:
        weight = source.weights.get(spec.name)
        if weight is None or tuple(weight.shape) != spec.shape:
            found = "is missing" if weight is None else f"has shape {list(weight.shape)}"
            return TensorCheck(spec, (f"tensor {spec.name!r} {found} in the source: it is another model's",))
    if layout.schemes[spec.name] is Scheme.FLOAT:
        return TensorCheck(spec, tuple(_float_problems(layout, spec, source)))
    try:
        linear = described_linear(layout.checkpoint, layout.schemes, spec.name)
        return check_linear(linear, spec, source, exact=True)
    except CheckpointError as error:
        return TensorCheck(spec, (str(error),))


def check_rope(layout: Layout) -> Iterator[str]:
    """The stored rotary tables and their metadata against a recomputation."""
    try:
        stored = load_rope(inside(layout.checkpoint.directory, ROPE_NAME, ArtifactError), layout.config)
    except NpuqError as error:
        yield str(error)
        return
    fresh = rope_tables(layout.config)
    for key, value in fresh.metadata.items():
        if stored.metadata.get(key) != value:
            yield f"{ROPE_NAME}: {key} is {stored.metadata.get(key)!r} and must be {value!r}"
    for name, table, expected in (("cos", stored.cos, fresh.cos), ("sin", stored.sin, fresh.sin)):
        # Written so that NaN counts as wrong.
        right = ((table - expected).abs() <= _ROPE_TOLERANCE * expected.abs().max()).all(1)
        if not right.all():
            position = int((~right).nonzero()[0, 0])
            yield f"{ROPE_NAME}: {name} at position {position} differs from its recomputation"


def check_kv_cache(layout: Layout) -> Iterator[str]:
    """The scales of an int8 KV cache, which calibrated artifacts have: a positive number for every channel."""
    directory = layout.checkpoint.directory
    if not is_inside(directory, KV_CACHE_NAME):
        return
    try:
        path = inside(directory, KV_CACHE_NAME, ArtifactError)
        load_scales(path, layout.config.num_hidden_layers, layout.config.attention.kv_lora_rank)
    except NpuqError as error:
        yield str(error)


def _is_readable(layout: Layout, spec: Spec) -> bool:
    """Whether the artifact's tensors of one source tensor are all there in the right form."""
    try:
        outputs = layout.outputs(spec)
    except ValueError:
        return False
    tensors = layout.checkpoint.tensors
    return all(
        output.name in tensors
        and (tensors[output.name].dtype, tensors[output.name].shape) == (output.dtype, output.shape)
        for output in outputs
    )


def _float_problems(layout: Layout, spec: Spec, source: WeightSource | None) -> Iterator[str]:
    if not spec.shape:
        return
    for start, stop in row_chunks(spec):
        rows = layout.checkpoint.read_rows(spec.name, start, stop)
        if spec.role is not Role.OTHER and not torch.isfinite(rows).all():
            yield f"tensor {spec.name!r} holds infinities or NaN"
            return
        if source is None:
            continue
        read = source.rows_float32 if spec.kept_dtype is not None else source.rows_float
        expected = read(spec.name, start, stop)
        # Bit for bit; as bytes, because an unknown tensor may hold NaN.
        if expected.dtype != rows.dtype or not torch.equal(expected.view(torch.uint8), rows.view(torch.uint8)):
            yield f"tensor {spec.name!r} is not the source's"
            return


def check_linear(linear: StoredLinear, spec: Spec, source: WeightSource | None, *, exact: bool) -> TensorCheck:
    """Every value of a quantized linear, in chunks of rows; `exact` as in `LinearRows.problems`.

    Raises CheckpointError for codes and scales that cannot be read at all.
    """
    problems: dict[str, None] = {}  # each once, in order
    squared_error, squared_norm = np.zeros(spec.shape[0]), np.zeros(spec.shape[0])
    for start, stop in row_chunks(spec):
        rows = linear.read(start, stop)
        for problem in rows.problems(exact=exact):
            problems[f"tensor {linear.tensors[problem.suffix]!r} {problem.what}"] = None
        if source is not None:
            expected = source.rows_float32(spec.name, start, stop).to(torch.float64)
            difference = rows.to_float32().to(torch.float64) - expected
            squared_error[start:stop] = difference.square().sum(1).numpy()
            squared_norm[start:stop] = expected.square().sum(1).numpy()
    stats = None if source is None else ErrorSums(float(squared_error.sum()), float(squared_norm.sum()))
    return TensorCheck(spec, tuple(problems), stats)


def check_shared_inputs(
    checkpoint: Checkpoint, config: ModelConfig, specs: Mapping[str, Spec], schemes: Mapping[str, Scheme]
) -> Iterator[str]:
    """Linears that loaders fuse quantize their activations once: in static W8A8 they need one input scale."""
    for leader, member in fused_pairs(specs):
        if {schemes[leader], schemes[member]} != {Scheme.W8A8_STATIC}:
            continue
        for suffix in (INPUT_SCALE, INPUT_OFFSET):
            stored = [name.removesuffix(WEIGHT) + suffix for name in (leader, member)]
            if all(name in checkpoint.tensors for name in stored):
                first, second = map(checkpoint.read, stored)
                if not torch.equal(first, second):
                    yield f"tensor {stored[1]!r} differs from {stored[0]!r}: engines fuse them: calibrate both as one"


def row_chunks(spec: Spec) -> Iterator[tuple[int, int]]:
    """Row ranges of about a million values, of an even number of rows for packed int4."""
    columns = max(1, spec.shape[1] if len(spec.shape) > 1 else 1)
    rows = max(2, _CHUNK_ELEMENTS // columns // 2 * 2)
    for start in range(0, spec.shape[0], rows):
        yield start, min(start + rows, spec.shape[0])
