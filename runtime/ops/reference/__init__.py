"""The specification: every operator in plain torch, with the NPU's rounding, and its integers exactly."""

from __future__ import annotations

import torch

from ....errors import BackendError
from ...ranks.group import ALONE, Group
from .. import Ops
from .cache import ReferenceCaches
from .compressed_attention import ReferenceCompressedAttention
from .grouped_attention import ReferenceGroupedAttention
from .hyper_connections import ReferenceHyperOps
from .latent_attention import ReferenceLatentAttention
from .norms import ReferenceNorms
from .products import ReferenceProducts
from .rotary import ReferenceRotary
from .routing import ReferenceRouting
from .sparse_attention import ReferenceSparseAttention
from .weights import ReferenceWeights

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise BackendError for a dtype that torch's operators on the CPU do not compute in."""
    if dtype not in COMPUTE_DTYPES:
        raise BackendError(f"compute dtype {dtype} is not one of float32, bfloat16 and float16")


class ReferenceOps(Ops):
    """Plain torch on the CPU."""

    name = "reference"

    def __init__(self, dtype: torch.dtype = torch.float32, group: Group = ALONE):
        check_dtype(dtype)
        self.group = group
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.weights = ReferenceWeights()
        self.norms = ReferenceNorms(dtype)
        self.products = ReferenceProducts(dtype, self.norms)
        self.routing = ReferenceRouting(dtype, self.norms, self.products, group)
        self.caches = ReferenceCaches(dtype)
        self.rotary = ReferenceRotary(dtype)
        self.mla = ReferenceLatentAttention(dtype, self.weights, self.norms, self.products, self.rotary)
        self.sparse = ReferenceSparseAttention(dtype, self.weights, self.norms, self.products, self.rotary)
        self.gqa = ReferenceGroupedAttention(dtype, self.weights, self.norms, self.products, self.rotary)
        self.compressed = ReferenceCompressedAttention(dtype, self.weights, self.norms, self.products)
        self.hyper = ReferenceHyperOps()
