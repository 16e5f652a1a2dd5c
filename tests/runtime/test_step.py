"""Building a step: cached prefixes packed into segments, and the inputs brought to the device in one copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from npuq.runtime.ops.reference import ReferenceOps
from npuq.runtime.step import Chunk, RopeRows, StepBuilder
from npuq.runtime.transfer import ALIGNMENT, packed_size, to_device

BLOCK, SEGMENT = 16, 64


def builder() -> StepBuilder:
    angles = torch.arange(512, dtype=torch.float32)[:, None] * torch.ones(1, 4)
    ops = ReferenceOps(torch.float32)
    return StepBuilder(ops, RopeRows(angles.cos(), angles.sin()), BLOCK, SEGMENT)


def chunk(start: int, count: int, first_block: int = 0) -> Chunk:
    blocks = range(first_block, first_block - (-(start + count) // BLOCK))
    return Chunk(range(3, 3 + count), start, list(blocks))


def test_prefixes_of_several_sequences_share_segments_and_cuts_do_not_depend_on_others() -> None:
    chunks = [chunk(0, 5), chunk(150, 8, 10), chunk(20, 4, 30), chunk(16, 2, 40), chunk(32, 2, 50), chunk(9, 1, 60)]
    step, order = builder().build(chunks)
    assert order == [5, 1, 2, 3, 4, 0]
    prefill = step.prefill
    assert prefill is not None and step.decode is not None
    assert prefill.lengths.q_lens == prefill.lengths.kv_lens == (8, 12, 14, 16, 21)
    # 150 tokens are 64 + 64 + 22; the rest of that segment takes the 20 and the 16 of the next two.
    assert [segment.rows for segment in prefill.segments] == [(0, 8), (0, 8), (0, 14), (14, 16)]
    assert [tuple(segment.lengths.kv_lens) for segment in prefill.segments] == [(64,), (64,), (22, 42, 58), (32,)]
    assert [tuple(segment.lengths.q_lens) for segment in prefill.segments] == [(8,), (8,), (8, 12, 14), (2,)]
    assert [segment.blocks.tolist() for segment in prefill.segments] == [
        [10, 11, 12, 13],
        [14, 15, 16, 17],
        [18, 19, 30, 31, 40],
        [50, 51],
    ]
    shared = prefill.segments[2].kept
    assert shared is not None and shared.tolist() == [*range(22), *range(32, 52), *range(64, 80)]
    assert all(segment.kept is None for segment in prefill.segments if segment is not prefill.segments[2])
    merges = [(merge.rows, merge.segments) for merge in prefill.merges]
    assert merges == [((0, 8), (0, 1, 2)), ((8, 14), (2,)), ((14, 16), (3,))]


def test_a_step_without_cached_tokens_has_nothing_to_merge() -> None:
    step, _ = builder().build([chunk(0, 5), chunk(0, 3, 4)])
    assert step.prefill is not None and step.prefill.segments == () == step.prefill.merges


@contextmanager
def page_locked(steps: StepBuilder) -> Iterator[list[bool]]:
    """Make a builder ask for page-locked memory, which takes a device; it gets other memory. Gives what was asked."""
    asked = []
    original = torch.empty

    def noting(*args: object, pin_memory: bool, **kwargs: object) -> Tensor:
        asked.append(pin_memory)
        return original(*args, **kwargs)  # type: ignore[call-overload, no-any-return]

    steps._ops.pinned = True
    with mock.patch.object(torch, "empty", noting):
        yield asked


def test_all_inputs_of_a_step_are_one_copy() -> None:
    copies: list[tuple[Tensor, dict[str, object]]] = []
    original = Tensor.to

    def noting(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        copies.append((tensor, kwargs))
        return original(tensor, *args, **kwargs)  # type: ignore[call-overload, no-any-return]

    steps = builder()
    with page_locked(steps) as asked, mock.patch.object(Tensor, "to", noting):
        step, _ = steps.build([chunk(150, 8, 10), chunk(20, 4, 30), chunk(9, 1, 60), chunk(0, 5)])
    assert asked == [True]
    ((packed, options),) = copies
    assert options == {"non_blocking": True} and packed.dtype is torch.uint8
    assert step.decode is not None and step.prefill is not None
    tensors = [step.token_ids, step.positions.slots, step.decode.block_table, step.output_rows]
    tensors += [segment.blocks for segment in step.prefill.segments]
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}
    assert memory == {packed.untyped_storage().data_ptr()}
    assert all(tensor.storage_offset() * tensor.itemsize % ALIGNMENT == 0 for tensor in tensors if tensor is not None)


def test_inputs_stay_where_they_are_on_the_cpu() -> None:
    steps = builder()
    made, _ = steps.inputs([chunk(9, 1)])
    assert steps.to_device(made).token_ids is made.token_ids


def test_a_given_buffer_is_written_again_and_again() -> None:
    tree = (torch.tensor([1, 2, 3]), (torch.tensor([[4, 5]], dtype=torch.int32), None, "text"))
    assert packed_size(tree) == 2 * ALIGNMENT
    buffer = torch.zeros(2 * ALIGNMENT + 7, dtype=torch.uint8)
    first = to_device(tree, torch.device("cpu"), False, buffer)
    second = to_device((tree[0] + 1, tree[1]), torch.device("cpu"), False, buffer)
    assert first[0].tolist() == second[0].tolist() == [2, 3, 4]
    assert first[0].data_ptr() == second[0].data_ptr() == buffer.data_ptr()
    assert second[1][0].tolist() == [[4, 5]] and second[1][1:] == (None, "text")
    with pytest.raises(RuntimeError):
        to_device(tree, torch.device("cpu"), False, buffer[:ALIGNMENT])
