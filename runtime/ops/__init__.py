"""Operators of the backends, and the values that pass between operators and the model.

The model (`runtime/model.py`) is written once against `Ops`, which has several parts: `weights` makes handles of stored
weights and `caches` makes paged caches; `norms`, `products`, `routing` and `rotary` compute, and so does one part for
each kind of attention (`mla`, `sparse` beside it, and `gqa`). `compressed`, another kind, and `hyper`, residual
streams, are parts of the reference alone. Operators have the names (less `npu_`)
and the semantics of torch_npu's (`npu_rms_norm`, `npu_kv_rmsnorm_rope_cache`, …), and come in two sizes:

* **small operators** are abstract, and every backend implements them. One method is one device call;
* **composites** (`mla.prolog`, `routing.moe_experts`, …) have a body of small operators, which is also their
  specification. A backend with one kernel for the whole overrides the composite.

Backends: `reference` (plain torch, the specification), `cpu` (torch in bounded memory), `native` (kernels in C),
`ascend` (torch_npu). Each backend builds the parts; a part gets the other parts that it calls.

Shapes: T tokens of the step, N heads, H hidden size, K input features, E experts, k experts a token, R = T·k routed
rows, L = kv_lora_rank, D = qk_rope_head_dim. "compute dtype" is `Ops.dtype`; scales are always float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..attention.pools import LayerCache
from ..ranks.group import ALONE, Group
from ..sampling.rows import LogitRow, host_rows
from .cache import Caches
from .compressed_attention import CompressedAttention
from .graphs import Graphs
from .grouped_attention import Gqa, GqaConfig, GqaParts, GroupedAttention
from .handles import (
    Activation,
    AttentionWeights,
    Experts,
    Gating,
    IndexerConfig,
    IndexerParts,
    IndexerWeights,
    Keys,
    Linear,
    LinearPart,
    Mla,
    MlaConfig,
    MlaParts,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    Projection,
    Quantized,
    Queries,
    Router,
    SparseMla,
    Static,
)
from .hyper_connections import HyperOps, HyperWeights
from .latent_attention import LatentAttention
from .norms import Norms
from .products import Products
from .rotary import Rotary
from .routing import Routing
from .sparse_attention import SparseAttention
from .steps import Decode, Lengths, Merge, Positions, Prefill, PrefixSegment, Step
from .weights import Weights

__all__ = [
    "Activation",
    "AttentionWeights",
    "Caches",
    "CompressedAttention",
    "Decode",
    "Experts",
    "Gating",
    "Gqa",
    "GqaConfig",
    "GqaParts",
    "GroupedAttention",
    "HyperOps",
    "HyperWeights",
    "IndexerConfig",
    "IndexerParts",
    "IndexerWeights",
    "Keys",
    "LatentAttention",
    "LayerCache",
    "Lengths",
    "Linear",
    "LinearPart",
    "Merge",
    "Mla",
    "MlaConfig",
    "MlaParts",
    "MlaWeights",
    "MlpWeights",
    "MoeWeights",
    "Norms",
    "Ops",
    "Positions",
    "Prefill",
    "PrefixSegment",
    "Products",
    "Projection",
    "Quantized",
    "Queries",
    "Rotary",
    "Router",
    "Routing",
    "SparseAttention",
    "SparseMla",
    "Static",
    "Step",
    "Weights",
]


class Ops:
    """The operators of one backend, in parts.

    name: "reference", "cpu" or "ascend". dtype: the compute dtype. device: where a step's tensors live. pinned: their
    copies to it come from page-locked memory.
    group: the ranks that share the model. Parts that exchange rows are made with it.
    graphs: capture of steps; None for a backend without. compressed, hyper: DeepSeek-V4's attention and residual
    streams; None for a backend without.
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    pinned = False
    group: Group = ALONE
    graphs: Graphs | None = None
    weights: Weights
    norms: Norms
    products: Products
    routing: Routing
    caches: Caches
    rotary: Rotary
    mla: LatentAttention
    sparse: SparseAttention
    gqa: GroupedAttention
    compressed: CompressedAttention | None = None
    hyper: HyperOps | None = None

    def findings(self) -> list[str]:
        """Results of the trials on the device so far, a sentence each."""
        return []

    def logit_rows(self, logits: Tensor) -> Sequence[LogitRow]:
        """Rows of logits, compute dtype `[S, vocab]`, for the sampler."""
        return host_rows(logits)

    @property
    def arithmetic(self) -> str:
        """All that the last bits of this backend's floats depend on, beside the operands.

        Ranks must have it in common: each computes routers and norms for itself, and all must choose the same experts.
        """
        return (
            f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        )

    def one_thread(self) -> AbstractContextManager[None]:
        """Context that keeps torch's own operators on the calling thread, for a backend with threads of its own.

        After each operator, torch's threads spin for a while on cores that the backend's threads need next.
        """
        return nullcontext()
