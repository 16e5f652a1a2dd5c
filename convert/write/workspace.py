"""Memory that a thread uses again for every chunk: fresh memory costs a page fault and a zeroed page for each 4 KB."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .written import Written

# Codes are kept for hashing, so many bytes for each value of a chunk, and of so many jobs: while one is made, one may
# wait for the neighbour of its shard, and one be hashed. With two values as they are stored (4 bytes each at most) that
# is 32 of the bytes that `memory.BYTES_PER_ELEMENT` allows.
_KEPT_BYTES_PER_ELEMENT = 8
_KEPT_JOBS = 3


@dataclass
class _Codes:
    """Memory for the codes of one job, and who reads it now."""

    memory: Tensor
    lent: Written | None = None

    @property
    def free(self) -> bool:
        return self.lent is None or self.lent.taken_back


@dataclass
class Workspace:
    """One thread's memory for what it reads and for the codes it makes, as large as was ever asked of each.

    `chunk_elements`: how many values of a weight a thread may hold at a time.
    """

    chunk_elements: int
    _read: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _codes: list[_Codes] = field(default_factory=list)  # the one given last at the end

    @property
    def kept_bytes(self) -> int:
        """How many bytes of codes a thread may keep of a job."""
        return _KEPT_BYTES_PER_ELEMENT * self.chunk_elements

    def release(self) -> None:
        """Give the memory back, whoever it was lent to."""
        self._read = self._read.new_empty(0)
        for codes in self._codes:
            _take_back(codes)
        self._codes.clear()

    def read(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], in the memory that was given before."""
        if self._read.numel() < nbytes:
            self._read = torch.empty(nbytes, dtype=torch.uint8)
        return self._read[:nbytes]

    def codes(self, rows: int, columns: int) -> Tensor:
        """int8 [rows, columns], in memory that was given before and is not lent; what was lent first is taken back."""
        codes = next((codes for codes in self._codes if codes.free), None)
        if codes is None and len(self._codes) < _KEPT_JOBS:
            codes = _Codes(torch.empty(0, dtype=torch.int8))
        elif codes is None:
            codes = self._codes[0]
        _take_back(codes)
        if codes.memory.numel() < rows * columns:
            codes.memory = torch.empty(rows * columns, dtype=torch.int8)
        self._codes = [*(other for other in self._codes if other is not codes), codes]
        return codes.memory[: rows * columns].view(rows, columns)

    def lend(self, written: Written) -> None:
        """Say that the codes given last are part of `written`: they stay as they are until that is taken back."""
        self._codes[-1].lent = written


def _take_back(codes: _Codes) -> None:
    if codes.lent is not None:
        codes.lent.take_back()
        codes.lent = None
