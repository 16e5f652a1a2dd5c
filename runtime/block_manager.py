"""Allocation of the paged cache's blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks for that many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or none at all when there are fewer."""
        if count > len(self._free):
            return None
        return [self._free.popleft() for _ in range(count)]

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks back. They are not cleared: a block is written before it is read again."""
        self._free.extend(blocks)

    def reset(self) -> None:
        """Take all blocks back from their sequences."""
        self._free = deque(range(self.num_blocks))
