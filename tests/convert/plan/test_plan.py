"""Placement: every output byte has one place, whatever the tensors and the shard size."""

from __future__ import annotations

import json
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import plan_of, tensors

from npuq.errors import RecipeError
from npuq.formats.schemes import Scheme
from npuq.quant.stored_rows import row_ranges

ITEM = {"I32": 4, "F32": 4, "BF16": 2, "I8": 1}


@given(tensors(), st.integers(1, 60_000))
def test_every_byte_has_exactly_one_place(given_tensors, max_shard_size):
    plan = plan_of(given_tensors, max_shard_size)
    assert [job.source for job in plan.jobs] == [name for name, _, _ in given_tensors]
    slots = [slot for job in plan.jobs for slot in job.outputs]
    for number, shard in enumerate(plan.shards):
        mine = sorted((slot for slot in slots if slot.shard == number), key=lambda slot: slot.start)
        position = len(shard.header)
        length = int.from_bytes(shard.header[:8], "little")
        assert position == 8 + length and position % 64 == 0
        header = json.loads(shard.header[8:])
        header.pop("__metadata__")
        assert set(header) == {slot.name for slot in mine}
        for slot in mine:
            assert slot.start == position  # no hole, no overlap
            assert slot.start % ITEM[slot.dtype] == 0
            assert slot.nbytes == prod(slot.shape) * ITEM[slot.dtype]
            begin = position - len(shard.header)
            assert header[slot.name] == {
                "dtype": slot.dtype,
                "shape": list(slot.shape),
                "data_offsets": [begin, begin + slot.nbytes],
            }
            position += slot.nbytes
        assert shard.nbytes == position
        assert shard.nbytes <= max_shard_size or len(shard.jobs) == 1
        assert {plan.jobs[index].shard for index in shard.jobs} == {number}
    assert sorted(index for shard in plan.shards for index in shard.jobs) == list(range(len(plan.jobs)))


@given(tensors(), st.integers(200, 60_000))
def test_shards_are_not_needlessly_small(given_tensors, max_shard_size):
    plan = plan_of(given_tensors, max_shard_size)
    for number, shard in enumerate(plan.shards[:-1]):
        first = plan.jobs[plan.shards[number + 1].jobs[0]]
        # A bound of the header entries decides: at most about 250 bytes and six for each odd character a tensor.
        slack = 400 * len(first.outputs) + 400 * sum(len(plan.jobs[i].outputs) for i in shard.jobs)
        assert shard.nbytes + first.output_bytes + slack > max_shard_size


@given(tensors(), st.integers(200, 60_000))
def test_neighbouring_shards_fill_by_turns(given_tensors, max_shard_size):
    plan = plan_of(given_tensors, max_shard_size)
    assert sorted(job.index for job in plan.turns) == list(range(len(plan.jobs)))
    largest = max(job.output_bytes for job in plan.jobs)
    left = [sum(plan.jobs[index].output_bytes for index in shard.jobs) for shard in plan.shards]
    filled = [0] * len(plan.shards)
    order = {number: [job.index for job in plan.turns if job.shard == number] for number in range(len(plan.shards))}
    assert order == {number: list(shard.jobs) for number, shard in enumerate(plan.shards)}
    for job in plan.turns:
        pair = job.shard // 2
        assert left[: 2 * pair] == [0] * (2 * pair)  # one pair after the other
        filled[job.shard] += job.output_bytes
        left[job.shard] -= job.output_bytes
        both = range(2 * pair, min(2 * pair + 2, len(plan.shards)))
        if all(left[number] for number in both):
            assert max(filled[number] for number in both) - min(filled[number] for number in both) <= largest


@given(st.integers(0, 500), st.integers(1, 64), st.integers(1, 5000), st.sampled_from([1, 2, 16, 128]))
def test_chunks_cover_all_rows_in_even_steps(rows, columns, elements, block_rows):
    chunks = list(row_ranges(rows, columns, elements, block_rows))
    position = 0
    for start, stop in chunks:
        assert start == position and start % 2 == 0 and stop > start
        assert (stop - start) * columns <= max(elements, 2 * columns)
        position = stop
    assert position == rows


def test_a_shape_that_a_scheme_cannot_hold_is_refused():
    with pytest.raises(RecipeError, match=r"W4A8_DYNAMIC for 'x\.gate_proj\.weight'.*odd"):
        plan_of([("x.gate_proj.weight", (3, 16), Scheme.W4A8)], 1000)
    with pytest.raises(RecipeError, match=r"x\.down_proj\.weight.*not divisible by 16"):
        plan_of([("x.down_proj.weight", (4, 24), Scheme.W4A8)], 1000)
