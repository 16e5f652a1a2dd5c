"""Memory that a thread uses again for every chunk: fresh memory costs a page fault and a zeroed page for each 4 KB."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Codes are kept for hashing, so many bytes for each value of a chunk. With a value as it is stored (4 bytes at most)
# that is a third of what `memory.BYTES_PER_ELEMENT` allows.
_KEPT_BYTES_PER_ELEMENT = 8


@dataclass
class Workspace:
    """One thread's memory for what it reads and for the codes it makes, as large as was ever asked of each.

    `chunk_elements`: how many values of a weight a thread may hold at a time.
    """

    chunk_elements: int
    _read: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _codes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int8))

    @property
    def kept_bytes(self) -> int:
        """How many bytes of codes a thread may keep beside a chunk."""
        return _KEPT_BYTES_PER_ELEMENT * self.chunk_elements

    def release(self) -> None:
        """Give the memory back."""
        self._read = self._read.new_empty(0)
        self._codes = self._codes.new_empty(0)

    def read(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], in the memory that was given before."""
        if self._read.numel() < nbytes:
            self._read = torch.empty(nbytes, dtype=torch.uint8)
        return self._read[:nbytes]

    def codes(self, rows: int, columns: int) -> Tensor:
        """int8 [rows, columns], in the memory that was given before."""
        if self._codes.numel() < rows * columns:
            self._codes = torch.empty(rows * columns, dtype=torch.int8)
        return self._codes[: rows * columns].view(rows, columns)
