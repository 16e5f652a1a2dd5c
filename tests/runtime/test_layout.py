"""The NZ arrangement of the paged cache against the index formula of the operator documentation."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from npuq.runtime.layout import nd_from_nz, nz_from_nd, read_nz, write_nz

sizes = st.tuples(st.integers(1, 4), st.sampled_from([16, 32, 48]), st.integers(1, 5).map(lambda tiles: 16 * tiles))


def flat_index(block: int, offset: int, channel: int, block_size: int, channels: int) -> int:
    """Element (offset, channel) of a block, one KV head, 16-bit tiles."""
    return ((block * (channels // 16) + channel // 16) * block_size + offset) * 16 + channel % 16


@given(sizes, st.integers(0, 2**32 - 1))
def test_conversion_follows_the_formula(size: tuple[int, int, int], seed: int) -> None:
    blocks, block_size, channels = size
    nd = np.random.default_rng(seed).standard_normal((blocks, block_size, channels)).astype(np.float32)
    flat = np.zeros(nd.size, np.float32)
    for block, offset, channel in np.ndindex(nd.shape):
        flat[flat_index(block, offset, channel, block_size, channels)] = nd[block, offset, channel]
    nz = nz_from_nd(torch.from_numpy(nd))
    assert nz.shape == (blocks, channels // 16, block_size, 16)
    assert np.array_equal(nz.flatten().numpy(), flat)
    assert torch.equal(nd_from_nz(nz), torch.from_numpy(nd))


@given(sizes, st.data())
def test_written_rows_lie_where_the_formula_says(size: tuple[int, int, int], data: st.DataObject) -> None:
    blocks, block_size, channels = size
    slots = data.draw(st.lists(st.integers(0, blocks * block_size - 1), unique=True, max_size=8))
    skipped = data.draw(st.sets(st.sampled_from(slots))) if slots else set()
    rows = torch.arange(1, len(slots) * channels + 1, dtype=torch.float32).view(len(slots), channels)
    cache = torch.zeros(blocks, channels // 16, block_size, 16)
    write_nz(cache, torch.tensor([-1 if slot in skipped else slot for slot in slots], dtype=torch.int64), rows)
    expected = np.zeros(cache.numel(), np.float32)
    for slot, row in zip(slots, rows, strict=True):
        for channel in range(0 if slot in skipped else channels):
            place = flat_index(slot // block_size, slot % block_size, channel, block_size, channels)
            expected[place] = row[channel]
    assert np.array_equal(cache.flatten().numpy(), expected)


def test_reading_follows_the_block_table() -> None:
    nd = torch.randn(5, 16, 32)
    table = torch.tensor([3, 0, 4], dtype=torch.int32)
    tokens = read_nz(nz_from_nd(nd), table, 41)
    assert torch.equal(tokens, torch.cat([nd[3], nd[0], nd[4][:9]]))
