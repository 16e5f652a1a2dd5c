"""Paged caches on the CPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...attention.pools import StoredPool
from ..cache import Caches


class ReferenceCaches(Caches):
    """Caches whose unused blocks take no memory."""

    def zeros(self, pool: StoredPool, num_blocks: int, block_size: int) -> Tensor:
        shape = pool.shape(num_blocks, block_size)
        # numpy's zeros come from calloc: the pages of blocks that are never used are never touched.
        memory = np.zeros(math.prod(shape) * pool.dtype.itemsize, np.uint8)
        return torch.from_numpy(memory).view(pool.dtype).view(shape)
