"""Allocation of the paged cache's blocks, and their reuse by sequences that begin with the same tokens.

A full block is known by its key, a hash of its tokens and of the key of the block before it: so a key stands for all
tokens up to the block's end. The first key hashes random bytes of this process and the sequence's salt, which no other
process and no other salt has. A block that nobody holds stays known until it is taken for other tokens, the one that
was released first before others.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import OrderedDict, abc

from .sequence import Sequence


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens each.

    reuse: find and give out blocks by their keys. computed: so many tokens at a sequence's end are never found, one or
    more, because somebody has to compute its logits.
    """

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True, computed: int = 1):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reuse = reuse
        self._computed = computed
        self._keys: list[bytes | None] = []
        self._blocks_by_key: dict[bytes, int] = {}
        self.reset()

    @property
    def num_free(self) -> int:
        """Number of blocks that nobody holds, known ones among them."""
        return len(self._free)

    @property
    def num_known(self) -> int:
        """Number of blocks with a key."""
        return len(self._blocks_by_key)

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks for that many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or none at all when there are fewer. They lose their keys."""
        if count > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            key = self._keys[block]
            if key is not None:
                del self._blocks_by_key[key]
                self._keys[block] = None
            self._holders[block] = 1
        return taken

    def release(self, blocks: abc.Sequence[int]) -> None:
        """Give blocks back, in their order in a sequence. They are not cleared: a block is written before it is read.

        Known blocks wait behind those that were released before, a sequence's last one first, because its first ones
        are part of more texts. Others are taken first.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)

    def match(self, tokens: abc.Sequence[int], salt: bytes = b"") -> tuple[list[int], list[bytes]]:
        """Take the longest run of known blocks that hold the first of these tokens: the blocks and their keys."""
        blocks: list[int] = []
        keys: list[bytes] = []
        if not self.reuse:
            return blocks, keys
        key = self._root(salt)
        for start in range(0, (len(tokens) - self._computed) // self.block_size * self.block_size, self.block_size):
            key = _next_key(key, tokens[start : start + self.block_size])
            block = self._blocks_by_key.get(key)
            if block is None:
                break
            blocks.append(block)
            keys.append(key)
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1
        return blocks, keys

    def commit(self, sequence: Sequence) -> None:
        """Make a sequence's blocks known that are full now, after the step that wrote them has returned.

        A block stays unknown if another one has its key.
        """
        if not self.reuse:
            return
        keys = sequence.keys
        while (len(keys) + 1) * self.block_size <= sequence.num_cached:
            start = len(keys) * self.block_size
            parent = keys[-1] if keys else self._root(sequence.salt)
            key = _next_key(parent, sequence.tokens[start : start + self.block_size])
            block = sequence.blocks[len(keys)]
            if self._keys[block] is None and key not in self._blocks_by_key:
                self._keys[block] = key
                self._blocks_by_key[key] = block
            keys.append(key)

    def forget(self) -> None:
        """Make all blocks unknown, because what they hold is in doubt, and those that sequences will still fill."""
        self._secret = secrets.token_bytes(32)
        self._keys = [None] * self.num_blocks
        self._blocks_by_key = {}

    def reset(self) -> None:
        """Take all blocks back from their sequences, and make them unknown."""
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))
        self._holders = [0] * self.num_blocks
        self.forget()

    def _root(self, salt: bytes) -> bytes:
        return hashlib.sha256(self._secret + hashlib.sha256(salt).digest()).digest()


def _next_key(parent: bytes, tokens: abc.Sequence[int]) -> bytes:
    """The key of a block behind the one with key `parent`. Both parts have one length, so no two pairs read alike."""
    return hashlib.sha256(parent + array("i", tokens).tobytes()).digest()
