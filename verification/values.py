"""Verification of values, streamed: codes, scales and biases against each other, float weights, rope tables; and with
the source at hand, the error of every linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..convert.write.journal import JobStats
from ..engines.rules import fused_pairs
from ..errors import ArtifactError, NpuqError
from ..formats.artifact import KV_CACHE_NAME, ROPE_NAME
from ..formats.checkpoint import Checkpoint
from ..formats.dialects import WeightSource
from ..formats.int4 import unpack_int4
from ..formats.kv_cache import load_scales
from ..formats.schemes import (
    BIAS,
    DEQ_SCALE,
    INPUT_OFFSET,
    INPUT_SCALE,
    OFFSET,
    QUANT_BIAS,
    SCALE,
    WEIGHT,
    OutputTensor,
    Scheme,
    dequantize,
    scale_bias,
)
from ..formats.static_w8a8 import input_scale_of, load_deq_scale, quant_bias
from ..inputs.files import inside, is_inside
from ..models.config import ModelConfig
from ..models.roles import Role
from ..models.rope import load_rope, rope_tables
from ..models.tensors import Spec
from .structure import Layout

_CHUNK_ELEMENTS = 1 << 20
# Tables recomputed with another libm may differ in the last bit.
_ROPE_TOLERANCE = 1e-6
# input_scale · weight_scale, where weight_scale may itself be a rounded quotient.
_DEQ_TOLERANCE = 2.0**-22


@dataclass(frozen=True)
class TensorCheck:
    """The result for one source tensor: problems, and its error sums when it is quantized and the source is at hand."""

    spec: Spec
    problems: tuple[str, ...] = ()
    stats: JobStats | None = None


def check_values(layout: Layout, spec: Spec, source: WeightSource | None) -> TensorCheck:
    """Read every value of one source tensor's artifact tensors, in chunks of rows."""
    outputs = _readable(layout, spec)
    if not outputs:
        return TensorCheck(spec)  # the layout checks have named it
    if source is not None:
        weight = source.weights.get(spec.name)
        if weight is None or tuple(weight.shape) != spec.shape:
            found = "is missing" if weight is None else f"has shape {list(weight.shape)}"
            return TensorCheck(spec, (f"tensor {spec.name!r} {found} in the source: it is another model's",))
    if layout.schemes[spec.name] is Scheme.FLOAT:
        return TensorCheck(spec, tuple(_float_problems(layout, spec, source)))
    return _check_linear(layout, spec, outputs, source)


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


def _readable(layout: Layout, spec: Spec) -> tuple[OutputTensor, ...]:
    """The artifact's tensors of one source tensor, if all are there in the right form; else nothing."""
    try:
        outputs = layout.outputs(spec)
    except ValueError:
        return ()
    tensors = layout.checkpoint.tensors
    sound = all(
        output.name in tensors
        and (tensors[output.name].dtype, tensors[output.name].shape) == (output.dtype, output.shape)
        for output in outputs
    )
    return outputs if sound else ()


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


def _check_linear(
    layout: Layout, spec: Spec, outputs: Sequence[OutputTensor], source: WeightSource | None
) -> TensorCheck:
    scheme = layout.schemes[spec.name]
    names = {output.name.rpartition(".")[2]: output.name for output in outputs}
    problems: dict[str, None] = {}  # each once, in order
    squared_error, squared_norm = np.zeros(spec.shape[0]), np.zeros(spec.shape[0])
    by_row = {suffix: name for suffix, name in names.items() if suffix in (WEIGHT, SCALE, OFFSET, BIAS)}
    for start, stop in row_chunks(spec):
        rows = {
            suffix: layout.checkpoint.read_rows(name, start // 2 if packed else start, stop // 2 if packed else stop)
            for suffix, name in by_row.items()
            for packed in [suffix == WEIGHT and scheme is Scheme.W4A8]
        }
        codes = unpack_int4(rows[WEIGHT]) if scheme is Scheme.W4A8 else rows[WEIGHT]
        scale = rows[SCALE]
        if not (torch.isfinite(scale) & (scale > 0)).all():
            problems[f"tensor {names[SCALE]!r} holds a scale that is not a positive number"] = None
        if rows[OFFSET].count_nonzero():
            problems[f"tensor {names[OFFSET]!r} is not zero: the codes are symmetric"] = None
        if BIAS in rows and not torch.equal(rows[BIAS], scale_bias(codes, scale, rows[BIAS].shape[1])):
            problems[f"tensor {names[BIAS]!r} disagrees with the stored codes: experts would compute garbage"] = None
        if source is not None:
            expected = source.rows_float32(spec.name, start, stop).to(torch.float64)
            difference = dequantize(rows, scheme).to(torch.float64) - expected
            squared_error[start:stop] = difference.square().sum(1).numpy()
            squared_norm[start:stop] = expected.square().sum(1).numpy()
    if scheme is Scheme.W8A8_STATIC:
        problems.update(dict.fromkeys(_static_problems(layout, names)))
    stats = None if source is None else JobStats(float(squared_error.sum()), float(squared_norm.sum()))
    return TensorCheck(spec, tuple(problems), stats)


def _static_problems(layout: Layout, names: Mapping[str, str]) -> Iterator[str]:
    """The tensors of a W8A8 linear that is quantized for a fixed input scale, against each other."""
    read = layout.checkpoint.read
    try:
        inputs = input_scale_of({suffix: read(names[suffix]) for suffix in (INPUT_SCALE, INPUT_OFFSET)})
    except ValueError as error:
        yield f"tensor {names[INPUT_SCALE]!r}: {error}"
        return
    deq_scale, expected = load_deq_scale(read(names[DEQ_SCALE])), inputs.scale * read(names[SCALE]).flatten()
    # Written so that NaN counts as wrong.
    if not ((deq_scale - expected).abs() <= _DEQ_TOLERANCE * expected).all():
        yield f"tensor {names[DEQ_SCALE]!r} is not input_scale · weight_scale: outputs would be scaled wrongly"
    if not torch.equal(read(names[QUANT_BIAS]), quant_bias(read(names[WEIGHT]), inputs.offset)):
        yield f"tensor {names[QUANT_BIAS]!r} disagrees with the stored codes and input_offset: outputs would be shifted"


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
