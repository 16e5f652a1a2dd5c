"""Stage *values*: every number of an artifact. Codes, scales and biases are checked against each other, float weights
must be finite, rope tables are computed again; weights are compared with a source where one is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..deferred import torch
from ..dtypes import torch_dtype
from ..engines.requirements import fused_pairs
from ..errors import ArtifactError, CheckpointError, NpuqError
from ..formats.artifact import KV_CACHE_NAME, ROPE_NAME
from ..formats.kv_cache import load_scales
from ..formats.rope_file import load_rope
from ..formats.schemes import INPUT_OFFSET, INPUT_SCALE, WEIGHT, Scheme
from ..formats.sources.stored_linear import StoredLinear
from ..formats.sources.weights import Weight, WeightSource
from ..inputs.files import inside, is_inside
from ..models.roles import Role
from ..models.rope import rope_tables
from ..models.tensors import Spec
from ..parallel.pool import Pool
from ..parallel.torch_threads import one_torch_thread
from ..progress import LayersLeft, Progress, Task
from ..quant.stored_rows import row_ranges
from ..quant.weight_error import ErrorSums, row_sums
from .native_check import is_right_float, right_linear
from .source import Original
from .subject import Subject

_CHUNK_ELEMENTS = 1 << 20
# Tables recomputed with another libm may differ in the last bit.
_ROPE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class WeightCheck:
    """The result for one weight: problems, and its error sums when it is quantized and the source is at hand."""

    spec: Spec
    problems: tuple[str, ...] = ()
    sums: ErrorSums | None = None


def check_weights(
    subject: Subject, original: Original, pool: Pool, progress: Progress, before: int = 0
) -> Iterator[WeightCheck]:
    """Read all weights, in chunks of rows, and compare them with their originals. The pool may still be at work on
    `before` bytes."""
    left = LayersLeft(spec.layer for spec in subject.specs.values())
    sizes = {spec.name: subject.nbytes(spec) for spec in subject.specs.values()}
    progress.start(Task("verify", before + sum(sizes.values()), layers=left.count))
    for check in pool.map(lambda spec: _check(subject, spec, original.of(spec)), subject.specs.values()):
        layer = check.spec.layer
        progress.advance(sizes[check.spec.name], layer=layer, layer_done=left.part_done(layer))
        yield check


def table_problems(subject: Subject) -> Iterator[str]:
    """A line for each wrong value beside the weights: rotary tables, scales of a KV cache, input scales."""
    yield from _shared_inputs(subject)
    if subject.is_own:
        yield from _rope(subject)
        yield from _kv_cache(subject)


def _check(subject: Subject, spec: Spec, source: WeightSource | None) -> WeightCheck:
    if source is not None:
        theirs = source.weights.get(spec.name)
        if theirs is None or tuple(theirs.shape) != spec.shape:
            found = "is missing" if theirs is None else f"has shape {list(theirs.shape)}"
            return WeightCheck(spec, (f"tensor {spec.name!r} {found} in the source: it is another model's",))
    try:
        weight = subject.weight(spec)
        if weight is None:
            return WeightCheck(spec)  # named by the stage *structure*
        right = _right(weight, spec, source) if subject.is_own else None
        if right is not None:
            return right
        one_torch_thread()
        if weight.linear is not None:
            return _check_linear(weight.linear, spec, source, exact=subject.is_own)
        # Another tool may have rewritten the weights that it left float.
        return WeightCheck(spec, tuple(_float_problems(weight, spec, source if subject.is_own else None)))
    except CheckpointError as error:
        return WeightCheck(spec, (str(error),))


def _right(weight: Weight, spec: Spec, source: WeightSource | None) -> WeightCheck | None:
    """The check of a weight in which the native kernels find nothing wrong; None where they do, or cannot read it."""
    theirs = None if source is None else source.weights[spec.name]
    if weight.linear is not None:
        sums = right_linear(weight.linear, theirs)
        return None if sums is None else WeightCheck(spec, sums=None if theirs is None else sums)
    if not spec.shape or spec.role is Role.OTHER:
        return None
    expected = None if theirs is None else "F32" if spec.kept_dtype is not None else theirs.float_code
    return WeightCheck(spec) if is_right_float(weight, theirs, expected) else None


def _float_problems(weight: Weight, spec: Spec, source: WeightSource | None) -> Iterator[str]:
    known = spec.role is not Role.OTHER
    if not spec.shape or not (known or source is not None):
        return
    for start, stop in _ranges(spec):
        rows = weight.rows(start, stop).to(torch_dtype(weight.float_code))
        if known and not torch.isfinite(rows).all():
            yield f"tensor {spec.name!r} holds infinities or NaN"
            return
        if source is None:
            continue
        if spec.kept_dtype is None:
            expected = source.rows_float(spec.name, start, stop)
        else:
            expected = source.weights[spec.name].rows(start, stop).to(torch_dtype(spec.kept_dtype))
        # Bit for bit; as bytes, because an unknown tensor may hold NaN.
        if expected.dtype != rows.dtype or not torch.equal(expected.view(torch.uint8), rows.view(torch.uint8)):
            yield f"tensor {spec.name!r} is not the source's"
            return


def _check_linear(linear: StoredLinear, spec: Spec, source: WeightSource | None, *, exact: bool) -> WeightCheck:
    """Check the codes and scales of a linear; `exact` as in `LinearRows.problems`. Raises CheckpointError where they
    cannot be read at all."""
    problems: dict[str, None] = {}  # each once, in order
    squared_error, squared_norm = torch.zeros(2, spec.shape[0], dtype=torch.float64)
    for start, stop in _ranges(spec):
        rows = linear.read(start, stop)
        for problem in rows.problems(exact=exact):
            problems[f"tensor {linear.tensors[problem.suffix]!r} {problem.what}"] = None
        if source is not None:
            sums = row_sums(rows.to_float32(), source.rows_float32(spec.name, start, stop))
            squared_error[start:stop], squared_norm[start:stop] = sums
    total = None if source is None else ErrorSums(float(squared_error.sum()), float(squared_norm.sum()))
    return WeightCheck(spec, tuple(problems), total)


def _ranges(spec: Spec) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about a million values."""
    return row_ranges(spec.shape[0], spec.shape[1] if len(spec.shape) > 1 else 1, _CHUNK_ELEMENTS)


def _rope(subject: Subject) -> Iterator[str]:
    """Compare the stored rotary tables and their metadata with a recomputation."""
    if not subject.config.rope_pairs:  # nothing reads them
        return
    try:
        stored = load_rope(inside(subject.directory, ROPE_NAME, ArtifactError), subject.config)
    except NpuqError as error:
        yield str(error)
        return
    fresh = rope_tables(subject.config)
    for key, value in fresh.metadata.items():
        if stored.metadata.get(key) != value:
            yield f"{ROPE_NAME}: {key} is {stored.metadata.get(key)!r} and must be {value!r}"
    for name, table, expected in (("cos", stored.cos, fresh.cos), ("sin", stored.sin, fresh.sin)):
        # Written so that NaN counts as wrong.
        right = (np.abs(table - expected) <= _ROPE_TOLERANCE * np.abs(expected).max()).all(1)
        if not right.all():
            position = int(np.flatnonzero(~right)[0])
            yield f"{ROPE_NAME}: {name} at position {position} differs from its recomputation"


def _kv_cache(subject: Subject) -> Iterator[str]:
    """Check the scales of an int8 KV cache, which calibrated artifacts have: a positive number for every channel."""
    directory, channels = subject.directory, subject.config.attention.cache_scales
    if not channels or not is_inside(directory, KV_CACHE_NAME):  # without channels nothing reads them
        return
    try:
        path = inside(directory, KV_CACHE_NAME, ArtifactError)
        load_scales(path, subject.config.num_hidden_layers, channels)
    except NpuqError as error:
        yield str(error)


def _shared_inputs(subject: Subject) -> Iterator[str]:
    """Check that fused linears have one input scale in static W8A8, since loaders quantize their activations once."""
    schemes, checkpoint = subject.schemes, subject.checkpoint
    for leader, member in fused_pairs(subject.specs):
        if {schemes[leader], schemes[member]} != {Scheme.W8A8_STATIC}:
            continue
        for suffix in (INPUT_SCALE, INPUT_OFFSET):
            stored = [name.removesuffix(WEIGHT) + suffix for name in (leader, member)]
            if all(name in checkpoint.tensors for name in stored):
                first, second = map(checkpoint.read, stored)
                if not torch.equal(first, second):
                    yield f"tensor {stored[1]!r} differs from {stored[0]!r}: engines fuse them: calibrate both as one"
