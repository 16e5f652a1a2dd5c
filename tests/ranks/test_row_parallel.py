"""Linears whose inputs ranks divide equal those of one process to the bit, and the checks notice what would not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import ThreadGroup, on_ranks
from torch import Tensor

from npuq.formats.schemes import Scheme
from npuq.formats.static_w8a8 import InputScale
from npuq.native.binding import levels
from npuq.runtime.ops import LinearPart, MlpWeights, Ops, Static
from npuq.runtime.ops.cpu import CpuOps
from npuq.runtime.ops.handles import RowParallel
from npuq.runtime.ops.native import NativeOps
from npuq.runtime.ops.reference import ReferenceOps
from npuq.runtime.ranks.division import Division, add_bits
from npuq.runtime.ranks.group import ALONE, Group

MakeOps = Callable[[torch.dtype, Group], Ops]
OPERATOR_SETS: dict[str, MakeOps] = {
    "reference": ReferenceOps,
    "torch": CpuOps,
    **{
        f"native {level}": (lambda dtype, group, level=level: NativeOps(dtype, threads=1, level=level, group=group))
        for level in levels()
    },
}
DTYPES = [torch.float32, torch.bfloat16]
SCHEMES = [Scheme.W8A8, Scheme.W8A8_STATIC, Scheme.FLOAT]


def random_part(
    rng: np.random.Generator, scheme: Scheme, outputs: int, inputs: int, stored: torch.dtype = torch.bfloat16
) -> LinearPart:
    """A linear with random codes, extremes among them, or random floats in the dtype `stored`."""
    if scheme is Scheme.FLOAT:
        weight = torch.from_numpy(rng.standard_normal((outputs, inputs)).astype(np.float32))
        # Anywhere in a mapped file.
        file = torch.zeros(weight.numel() + 16, dtype=stored)
        place = file[(first := int(rng.integers(16))) : first + weight.numel()].view(outputs, inputs)
        return LinearPart("some.linear", scheme, place.copy_(weight))
    codes = torch.from_numpy(rng.integers(-128, 128, (outputs, inputs)).astype(np.int8))
    scale = torch.from_numpy(rng.uniform(0.001, 0.1, (outputs, 1)).astype(np.float32))
    if scheme is Scheme.W8A8:
        return LinearPart("some.linear", scheme, codes, scale)
    bias = torch.from_numpy(rng.integers(-(2**20), 2**20, outputs).astype(np.int32))
    return LinearPart("some.linear", scheme, codes, static=Static(InputScale(0.03, -7), scale.flatten(), bias))


def random_rows(rng: np.random.Generator, rows: int, columns: int, extremes: bool) -> Tensor:
    """Rows whose magnitudes differ by column; among them zeros, and with `extremes` what no scale can hold."""
    x = rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal(columns))
    x[rng.random(rows) < 0.2] = 0.0
    if extremes:
        for row in range(rows):
            x[row, rng.integers(columns)] = rng.choice([np.inf, -np.inf, np.nan, 3e38, 1e-38, -0.0, 1e30])
    return torch.from_numpy(x.astype(np.float32))


def of_rank(part: LinearPart, inputs: Division, outputs: Division | None = None) -> LinearPart:
    """What a rank loads of a linear whose inputs are divided; `outputs`: of a float one."""
    if outputs is None:
        columns = part.weight[:, inputs.own.start : inputs.own.stop].contiguous()
        return replace(part, weight=columns, input_division=inputs)
    rows = part.weight[outputs.own.start : outputs.own.stop]
    return replace(part, weight=rows, input_division=inputs, output_division=outputs)


def rows_of_rank(part: LinearPart, outputs: Division) -> LinearPart:
    """What a rank loads of a linear whose outputs are divided."""
    own = slice(outputs.own.start, outputs.own.stop)
    scale = None if part.scale is None else part.scale[own]
    static = part.static and Static(part.static.inputs, part.static.deq_scale[own], part.static.quant_bias[own])
    return replace(part, weight=part.weight[own], scale=scale, static=static, output_division=outputs)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """True for equal bits; any NaN equals any other."""
    integer = {2: torch.int16, 4: torch.int32}[one.element_size()]
    ones, others = (x.nan_to_num(0.0, 1e9, -1e9).contiguous().view(integer) for x in (one, other))
    return one.dtype is other.dtype and torch.equal(ones, others) and torch.equal(one.isnan(), other.isnan())


def divided_output(
    make: MakeOps,
    dtype: torch.dtype,
    part: LinearPart,
    x: Tensor,
    sizes: tuple[int, ...],
    change: Callable[[Ops], None],
) -> list[Tensor]:
    """The output of a row-parallel linear on every rank. change: what a mutation does to the operators of a rank."""

    def run(group: ThreadGroup) -> Tensor:
        ops, inputs = make(dtype, group), Division(group, sizes)
        change(ops)
        outputs = part.weight.shape[0]
        each = outputs // group.size
        division = Division(group, (*[each] * (group.size - 1), outputs - each * (group.size - 1)))
        share = of_rank(part, inputs, division if part.scheme is Scheme.FLOAT else None)
        handle = ops.weights.row_parallel_of(share)
        assert isinstance(handle, RowParallel)
        return ops.products.row_parallel(x.to(dtype)[:, inputs.own.start : inputs.own.stop], handle)

    return on_ranks(len(sizes), run)


def divided_equals_whole(
    make: MakeOps,
    dtype: torch.dtype,
    scheme: Scheme,
    seed: int,
    sizes: tuple[int, ...],
    extremes: bool = False,
    change: Callable[[Ops], None] = lambda ops: None,
) -> bool:
    rng = np.random.default_rng(seed)
    stored = torch.float32 if rng.random() < 0.5 else torch.bfloat16
    part = random_part(rng, scheme, int(rng.integers(4, 40)), sum(sizes), stored)
    x = random_rows(rng, int(rng.integers(1, 6)), sum(sizes), extremes)
    alone = make(dtype, ALONE)
    with torch.inference_mode():
        whole = alone.products.linear(x.to(dtype), alone.weights.linear_of([part]))
    return all(same_bits(got, whole) for got in divided_output(make, dtype, part, x, sizes, change))


WIDTHS = st.lists(st.integers(1, 70), min_size=2, max_size=4).map(tuple)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", OPERATOR_SETS)
@settings(max_examples=8)
@given(st.integers(0, 2**32 - 1), WIDTHS, st.booleans())
def test_a_row_parallel_linear_equals_one_process(
    name: str, scheme: Scheme, dtype: torch.dtype, seed: int, sizes: tuple[int, ...], extremes: bool
) -> None:
    assert divided_equals_whole(OPERATOR_SETS[name], dtype, scheme, seed, sizes, extremes)


def own_scale(ops: Ops) -> None:
    """Quantize each rank's part by its own maximum."""
    ops.group.all_reduce_max = lambda tensor: tensor  # type: ignore[method-assign]


def bias_on_every_rank(ops: Ops) -> None:
    sums = ops.products.integer_sums

    def with_bias(codes: Tensor, linear: Any) -> Tensor:
        found = sums(codes, linear)
        if linear.parts[0].static is not None and ops.group.rank > 0:
            found = found + linear.parts[0].static.quant_bias
        return found

    ops.products.integer_sums = with_bias  # type: ignore[method-assign]


def sum_after_scaling(ops: Ops) -> None:
    """Scale each rank's sums, then add floats, as a plain tensor-parallel linear does."""
    scale = ops.products.scale_sums
    group = ops.group

    def integer_sums(tensor: Tensor) -> Tensor:
        return tensor  # not added

    def scaled(sums: Tensor, scales: Tensor | None, linear: Any) -> Tensor:
        parts = group.all_gather_rows(scale(sums, scales, linear).unsqueeze(0), [1] * group.size)
        return parts.float().sum(0).to(parts.dtype)

    group.all_reduce_sum = integer_sums  # type: ignore[method-assign]
    ops.products.scale_sums = scaled  # type: ignore[method-assign]


def lost_rank(ops: Ops) -> None:
    ops.group.all_reduce_sum = lambda tensor: tensor  # type: ignore[method-assign]


MUTATIONS: dict[str, tuple[Scheme, Callable[[Ops], None]]] = {
    "a scale of each rank's own": (Scheme.W8A8, own_scale),
    "the bias on every rank": (Scheme.W8A8_STATIC, bias_on_every_rank),
    "sums of scaled products": (Scheme.W8A8, sum_after_scaling),
    "sums of scaled static products": (Scheme.W8A8_STATIC, sum_after_scaling),
    "no sum": (Scheme.W8A8, lost_rank),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", ["reference", "torch", f"native {levels()[-1]}"] if levels() else ["reference"])
def test_the_check_notices(name: str, mutation: str) -> None:
    scheme, change = MUTATIONS[mutation]
    equal = [
        divided_equals_whole(OPERATOR_SETS[name], torch.float32, scheme, seed, (33, 20, 47), change=change)
        for seed in range(8)
    ]
    assert sum(equal) <= 1


# Of gate and up, and of down.
MLP_SCHEMES = [
    (Scheme.W8A8, Scheme.W8A8),
    (Scheme.FLOAT, Scheme.FLOAT),
    (Scheme.W8A8, Scheme.W8A8_STATIC),
    (Scheme.W8A8, Scheme.FLOAT),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schemes", MLP_SCHEMES, ids=str)
@pytest.mark.parametrize("name", OPERATOR_SETS)
@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1), WIDTHS, st.booleans())
def test_a_divided_mlp_equals_one_process(
    name: str,
    schemes: tuple[Scheme, Scheme],
    dtype: torch.dtype,
    seed: int,
    sizes: tuple[int, ...],
    extremes: bool,
) -> None:
    make, rng = OPERATOR_SETS[name], np.random.default_rng(seed)
    hidden = int(rng.integers(4, 60))
    stored = torch.float32 if rng.random() < 0.5 else torch.bfloat16
    gate, up = (random_part(rng, schemes[0], sum(sizes), hidden, stored) for _ in range(2))
    down = random_part(rng, schemes[1], hidden, sum(sizes), stored)
    x = random_rows(rng, int(rng.integers(1, 6)), hidden, extremes).to(dtype)

    def weights(ops: Ops, gate: LinearPart, up: LinearPart, down: LinearPart) -> MlpWeights:
        gate_up, last = ops.weights.linear_of([gate, up]), ops.weights.row_parallel_of(down)
        return MlpWeights(gate_up, last, quantized=down.scheme is Scheme.W8A8)

    def run(group: ThreadGroup) -> Tensor:
        ops, inner = make(dtype, group), Division(group, sizes)
        each = hidden // group.size
        outputs = Division(group, (*[each] * (group.size - 1), hidden - each * (group.size - 1)))
        last = of_rank(down, inner, outputs if down.scheme is Scheme.FLOAT else None)
        return ops.routing.mlp(x, weights(ops, rows_of_rank(gate, inner), rows_of_rank(up, inner), last))

    alone = make(dtype, ALONE)
    with torch.inference_mode():
        whole = alone.routing.mlp(x, weights(alone, gate, up, down))
    for got in on_ranks(len(sizes), run):
        assert same_bits(got, whole)


@pytest.mark.parametrize("name", OPERATOR_SETS)
@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), WIDTHS)
def test_a_maximum_of_the_whole_row_quantizes_its_parts_alike(name: str, seed: int, sizes: tuple[int, ...]) -> None:
    norms = OPERATOR_SETS[name](torch.float32, ALONE).norms
    rng = np.random.default_rng(seed)
    x = random_rows(rng, 6, sum(sizes), extremes=True)
    parts = x.split(list(sizes), dim=1)
    largest = torch.stack([norms.row_maximum(part) for part in parts]).amax(0)
    assert not largest.isnan().any()
    whole, joined = norms.dynamic_quant(x), [norms.dynamic_quant_by(part, largest) for part in parts]
    assert torch.equal(torch.cat([part.codes for part in joined], 1), whole.codes)
    assert all(same_bits(part.scale, whole.scale) for part in joined)
    finite = x.isfinite().all(1)
    assert whole.scale[finite].isfinite().all() and whole.scale[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 3, 8])
def test_bits_of_one_rank_survive_the_sum(dtype: torch.dtype, width: int) -> None:
    rows = torch.tensor([[-0.0, float("nan"), float("-inf"), 1.5, -2.25, 3e-8, 0.0, 7.0]] * 5).to(dtype)[:, :width]
    owner = torch.tensor([0, 2, 1, 2, 0])

    def run(group: ThreadGroup) -> Tensor:
        return add_bits(rows.masked_fill((owner != group.rank)[:, None], 0), group)

    integer = {2: torch.int16, 4: torch.int32}[rows.element_size()]
    for got in on_ranks(3, run):
        assert torch.equal(got.contiguous().view(integer), rows.contiguous().view(integer))
