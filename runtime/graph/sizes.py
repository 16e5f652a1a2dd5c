"""The batch sizes for which a decode step is captured."""

from __future__ import annotations

MOST_SEQUENCES = 256
"""Larger steps run eagerly: there the device needs longer for an operator than the host to launch it, and the captured
logits alone would take 132 MB at a vocabulary of 129,280."""


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Sizes up to `max_num_seqs`, rising: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, …, then `max_num_seqs` or MOST_SEQUENCES.

    A step is padded to the next size, so that less than a third of its rows are padding. There are two sizes for each
    power of two, 16 in all at the most.
    """
    most = min(max_num_seqs, MOST_SEQUENCES)
    sizes, power = {1, most}, 2
    while power <= most:
        sizes |= {size for size in (power, power + power // 2) if size <= most}
        power *= 2
    return tuple(sorted(sizes))
