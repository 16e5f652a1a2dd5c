"""The captured batch sizes."""

from __future__ import annotations

import pytest

from npuq.runtime.graph.sizes import MOST_SEQUENCES, graph_sizes


@pytest.mark.parametrize("most", [1, 2, 3, 5, 32, 100, 255, 256, 257, 10_000])
def test_a_step_is_padded_by_less_than_a_third(most):
    sizes = graph_sizes(most)
    assert sizes == tuple(sorted(set(sizes))) and len(sizes) <= 16
    assert sizes[-1] == min(most, MOST_SEQUENCES)
    for sequences in range(1, sizes[-1] + 1):
        size = next(size for size in sizes if size >= sequences)
        assert 3 * (size - sequences) < size


def test_the_sizes_of_the_default_engine():
    assert graph_sizes(32) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
