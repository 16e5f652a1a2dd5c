"""Jobs of the pool: linears and MLPs whose inner channels ranks divide, beside those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from npuq.formats.schemes import Scheme
from npuq.runtime.diagnostics.selftest import data
from npuq.runtime.ops import LinearPart, MlpWeights
from npuq.runtime.ops.ascend.operators import AscendOps
from npuq.runtime.ops.handles import RowParallel
from npuq.runtime.ranks.division import Division
from npuq.runtime.ranks.group import ALONE, Distributed

from .. import emulate, guard
from ..mutants import Mutant, setting, without
from ..standins import SOC_NAME

TOKENS, HIDDEN, INNER = 7, 64, 160
SIZES = {2: (96, 64), 3: (64, 64, 32)}  # columns of each rank


def own_scale(ops: AscendOps) -> None:
    """Every rank scales its columns by their own maximum."""
    ops.norms.dynamic_quant_by = lambda x, largest: ops.norms.dynamic_quant(x)  # type: ignore[method-assign]


def own_scale_of_activated(ops: AscendOps) -> None:
    by = ops.norms.swiglu_quant_by
    ops.norms.swiglu_quant_by = lambda x, largest: by(x, ops.norms.row_maximum(x))  # type: ignore[method-assign]


def floats_added(ops: AscendOps) -> None:
    """Every rank scales its product, and floats are added."""
    scale_sums = ops.products.scale_sums

    def integer_sums(codes: Tensor, linear: Any) -> Tensor:
        return torch.zeros(codes.shape[0], 1, dtype=torch.int32)

    def row_parallel(x: Any, linear: Any) -> Tensor:
        assert isinstance(linear, RowParallel)
        codes, scale = ops.products._common_scale(x, linear)
        out = scale_sums(sums(codes, linear.linear), scale, linear.linear)
        dist.all_reduce(out)
        return out

    sums = ops.products.integer_sums
    ops.products.integer_sums = integer_sums  # type: ignore[method-assign]
    ops.products.row_parallel = row_parallel  # type: ignore[method-assign]


def bias_of_every_rank(ops: AscendOps) -> None:
    sums = ops.products.integer_sums
    ops.products.integer_sums = lambda codes, linear: sums(codes, linear) + linear.quant_bias  # type: ignore[method-assign,attr-defined]


def not_added(ops: AscendOps) -> None:
    ops.group.all_reduce_sum = lambda tensor: tensor  # type: ignore[method-assign]


def rounded_before_quantization(ops: AscendOps) -> None:
    swiglu = ops.norms.swiglu
    ops.norms.swiglu_float32 = lambda x: swiglu(x).float()  # type: ignore[method-assign]


def called(operator: str, change: Any) -> Callable[[AscendOps], None]:
    def mutate(ops: AscendOps) -> None:
        ops.npu.operators = Mutant(operator, change)

    return mutate


MATMUL, QUANTIZE = "npu_quant_matmul", "npu_quantize"
WRONG: dict[str, Callable[[AscendOps], None]] = {
    "a scale of each rank": own_scale,
    "floats added": floats_added,
    "products not added": not_added,
    "scaled sums": called(MATMUL, lambda args, kwargs: ([*args[:2], args[2] * 0.01], kwargs)),
    "sums in bf16": called(MATMUL, setting(output_dtype=torch.bfloat16)),
    "output_dtype left out": called(MATMUL, without("output_dtype")),
    "maxima beside left out": called("npu_dynamic_quant", lambda args, kwargs: ([args[0][:, :-16]], kwargs)),
}
WRONG_MLP: dict[str, Callable[[AscendOps], None]] = {
    "a scale of each rank": own_scale_of_activated,
    "rounded before quantization": rounded_before_quantization,
    "scale by product": called(QUANTIZE, lambda args, kwargs: ([*args[:5], False], kwargs)),
    "scale by column": called(QUANTIZE, lambda args, kwargs: ([*args[:4], 1, *args[5:]], kwargs)),
    "floats added": floats_added,
}
WRONG_STATIC: dict[str, Callable[[AscendOps], None]] = {
    "bias of every rank": bias_of_every_rank,
    "products not added": not_added,
}


def run_linear(scheme: Scheme, wrong: str = "") -> bool:
    """Multiply by a linear with divided inputs; True if every bit is that of one process."""
    alone, ops, division = _both()
    whole = data.stored_part(scheme, HIDDEN, INNER, seed=3)
    x = data.random_rows(alone, TOKENS, INNER, seed=4)
    x[2] = 0
    expected = alone.products.linear(x, alone.weights.linear_of([whole]))
    handle = ops.weights.row_parallel_of(_columns(whole, division, ops))
    if wrong:
        (WRONG | WRONG_STATIC)[wrong](ops)
    own = x[:, division.own.start : division.own.stop].contiguous()
    with torch.inference_mode(), guard.watch():
        found = ops.products.row_parallel(own, handle)
    return found.shape == expected.shape and bool((found == expected).all())


def run_mlp(scheme: Scheme, wrong: str = "") -> bool:
    """Run an MLP with divided inner channels; True if every bit is that of one process."""
    alone, ops, division = _both()
    gate, up = (data.stored_part(scheme, INNER, HIDDEN, seed=seed) for seed in (5, 6))
    down = data.stored_part(scheme, HIDDEN, INNER, seed=7)
    quantized = scheme is Scheme.W8A8
    x = data.random_rows(alone, TOKENS, HIDDEN, seed=8)
    x[2] = 0
    weights = alone.weights
    whole = MlpWeights(weights.linear_of([gate, up]), weights.linear_of([down]), quantized)
    expected = alone.routing.mlp(x, whole)
    parts = [_outputs(part, division) for part in (gate, up)]
    own = MlpWeights(
        ops.weights.linear_of(parts), ops.weights.row_parallel_of(_columns(down, division, ops)), quantized
    )
    if wrong:
        WRONG_MLP[wrong](ops)
    with torch.inference_mode(), guard.watch():
        found = ops.routing.mlp(x, own)
    return found.shape == expected.shape and bool((found == expected).all())


def _both() -> tuple[AscendOps, AscendOps, Division]:
    vars(emulate.rules).update(family="A2", wide=False)
    group = Distributed()
    alone, ops = (AscendOps(device="cpu", dtype=torch.bfloat16, soc=SOC_NAME, group=each) for each in (ALONE, group))
    return alone, ops, Division(group, SIZES[group.size])


def _columns(part: LinearPart, division: Division, ops: AscendOps) -> LinearPart:
    """A rank's part of a linear with divided inputs: columns of codes, or of floats outputs."""
    if part.scheme is Scheme.FLOAT:
        each = HIDDEN // division.group.size // 2 * 2
        sizes = (*[each] * (division.group.size - 1), HIDDEN - each * (division.group.size - 1))
        return replace(_outputs(part, Division(division.group, sizes)), input_division=division)
    own = division.own
    return replace(part, weight=part.weight[:, own.start : own.stop].contiguous(), input_division=division)


def _outputs(part: LinearPart, division: Division) -> LinearPart:
    """A rank's part of a linear with divided outputs."""
    rows = slice(division.own.start, division.own.stop)
    static = part.static
    if static is not None:
        static = replace(static, deq_scale=static.deq_scale[rows], quant_bias=static.quant_bias[rows])
    scale = None if part.scale is None else part.scale[rows]
    return replace(part, weight=part.weight[rows].contiguous(), scale=scale, static=static, output_division=division)
