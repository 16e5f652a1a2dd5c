"""Pools of the paged cache: the NZ arrangement against the index formula of the operator documentation, ND, codes,
and a kind of attention with a pool that multi-head latent attention does not have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npuq.errors import BackendError
from npuq.runtime.attention.pools import Pool, read_rows, stored_pools, write_rows
from npuq.runtime.backend import make_ops

sizes = st.tuples(st.integers(1, 4), st.sampled_from([16, 32, 48]), st.integers(1, 5).map(lambda tiles: 16 * tiles))


def flat_index(block: int, offset: int, channel: int, block_size: int, channels: int) -> int:
    """Element (offset, channel) of a block, one KV head, 16-bit tiles."""
    return ((block * (channels // 16) + channel // 16) * block_size + offset) * 16 + channel % 16


@given(sizes, st.sampled_from(["nz", "nd"]), st.data())
def test_written_rows_lie_where_the_formula_says(size: tuple[int, int, int], layout: str, data: st.DataObject) -> None:
    blocks, block_size, channels = size
    slots = data.draw(st.lists(st.integers(0, blocks * block_size - 1), unique=True, max_size=8))
    skipped = data.draw(st.sets(st.sampled_from(slots))) if slots else set()
    rows = torch.arange(1, len(slots) * channels + 1, dtype=torch.float32).view(len(slots), channels)
    (pool,) = stored_pools([Pool("keys", channels, layout=layout)], torch.float32, "nz")
    cache = torch.zeros(pool.shape(blocks, block_size))
    write_rows(
        cache, layout, torch.tensor([-1 if slot in skipped else slot for slot in slots], dtype=torch.int64), rows
    )
    expected = np.zeros(cache.numel(), np.float32)
    for slot, row in zip(slots, rows, strict=True):
        for channel in range(0 if slot in skipped else channels):
            nz = flat_index(slot // block_size, slot % block_size, channel, block_size, channels)
            expected[nz if layout == "nz" else slot * channels + channel] = row[channel]
    assert np.array_equal(cache.flatten().numpy(), expected)


@pytest.mark.parametrize("layout", ["nz", "nd"])
def test_reading_follows_the_block_table(layout: str) -> None:
    nd = torch.randn(5, 16, 32)
    pages = nd.unflatten(-1, (2, 16)).transpose(1, 2) if layout == "nz" else nd[:, :, None]
    tokens = read_rows(pages, layout, torch.tensor([3, 0, 4], dtype=torch.int32), 41)
    assert torch.equal(tokens, torch.cat([nd[3], nd[0], nd[4][:9]]))


def test_tiles_are_32_bytes_of_the_types_that_they_are_made_for() -> None:
    shapes = {}
    for dtype in (torch.bfloat16, torch.float32):
        for scaled in ((), ("latent",)):
            (pool,) = stored_pools([Pool("latent", 64, int8=True)], dtype, "nz", scaled)
            shapes[dtype, bool(scaled)] = pool.shape(3, 16), pool.row_bytes
    assert shapes == {
        (torch.bfloat16, False): ((3, 4, 16, 16), 128),
        (torch.bfloat16, True): ((3, 2, 16, 32), 64),
        (torch.float32, False): ((3, 4, 16, 16), 256),
        (torch.float32, True): ((3, 2, 16, 32), 64),
    }


def test_channels_that_tiles_do_not_divide_are_refused() -> None:
    (pool,) = stored_pools([Pool("rope", 24)], torch.bfloat16, "nz")
    with pytest.raises(BackendError, match=r"16 channels of torch\.bfloat16 together; 24 are no multiple"):
        pool.shape(1, 16)
    (pool,) = stored_pools([Pool("latent", 48, int8=True)], torch.bfloat16, "nz", ("latent",))
    with pytest.raises(BackendError, match=r"32 channels of torch\.int8 together; 48 are no multiple"):
        pool.shape(1, 16)


@pytest.mark.parametrize("name", ["rope", "index_key"])
def test_scales_of_a_pool_without_codes_are_refused(name: str) -> None:
    with pytest.raises(BackendError, match=f"no int8 codes can stand in pools \\['{name}'\\]"):
        stored_pools([Pool("latent", 64, int8=True), Pool("rope", 64)], torch.float32, "nz", (name,))


def test_a_layer_with_a_third_pool_in_nd_layout() -> None:
    """Sparse attention's: index keys beside latent and rope, all in ND. Allocation, writing and gathering loop."""
    caches = make_ops("reference", torch.bfloat16).caches
    pools = [Pool(name, width, layout="nd") for name, width in (("latent", 24), ("rope", 8), ("index_key", 40))]
    assert [pool.row_bytes for pool in caches.stored(pools)] == [48, 16, 80]
    cache = caches.new(pools, 3, 16)
    rows = {pool.name: torch.randn(20, pool.channels).bfloat16() for pool in pools}
    slots = torch.cat([torch.arange(32, 48), torch.arange(4)])
    for name, pages in cache.pages.items():
        assert pages.tensor.shape == (3, 16, 1, rows[name].shape[1])
        pages.write(slots, rows[name])
    blocks = torch.tensor([2, 0], dtype=torch.int32)
    gathered = caches.gather(cache, blocks, 20)
    assert list(gathered) == ["latent", "rope", "index_key"]
    assert all(torch.equal(gathered[name], rows[name]) for name in rows)
    some = caches.gather(cache, blocks, 3, torch.tensor([1, 15, 19]))
    assert all(torch.equal(some[name], rows[name][[1, 15, 19]]) for name in rows)
