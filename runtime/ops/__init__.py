"""Operators of the backends, and the values that pass between operators and the model.

The model (`runtime/model.py`) is written once against `Ops`, which has five parts: `weights` makes handles of stored
weights; `norms`, `products`, `routing` and `attention` compute. Operators have the names (less
`npu_`) and the semantics of torch_npu's (`npu_rms_norm`, `npu_kv_rmsnorm_rope_cache`, …), and come in two sizes:

* **small operators** are abstract, and every backend implements them. One method is one device call;
* **composites** (`mla_prolog`, `moe_experts`, `mlp`, …) have a body of small operators, which is also their
  specification. A backend with one kernel for the whole overrides the composite.

Backends: `reference` (plain torch, the specification), `cpu` (torch in bounded memory), `native` (kernels in C),
`ascend` (torch_npu). Each backend builds the five parts; a part gets the other parts that it calls.

Shapes: T tokens of the step, N heads, H hidden size, K input features, E experts, k experts a token, R = T·k routed
rows, L = kv_lora_rank, D = qk_rope_head_dim. "compute dtype" is `Ops.dtype`; scales are always float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ..attention.pools import LayerCache
from .attention import Attention
from .handles import (
    Activation,
    AttentionWeights,
    Experts,
    Gating,
    Linear,
    LinearPart,
    Mla,
    MlaConfig,
    MlaParts,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    Quantized,
    Router,
    Static,
)
from .norms import Norms
from .products import Products
from .routing import Routing
from .steps import Decode, Prefill, Prefix, PrefixSegment, Step
from .weights import Weights

__all__ = [
    "Activation",
    "Attention",
    "AttentionWeights",
    "Decode",
    "Experts",
    "Gating",
    "LayerCache",
    "Linear",
    "LinearPart",
    "Mla",
    "MlaConfig",
    "MlaParts",
    "MlaWeights",
    "MlpWeights",
    "MoeWeights",
    "Norms",
    "Ops",
    "Prefill",
    "Prefix",
    "PrefixSegment",
    "Products",
    "Quantized",
    "Router",
    "Routing",
    "Static",
    "Step",
    "Weights",
]


class Ops:
    """The operators of one backend, in five parts.

    name: "reference", "cpu" or "ascend". dtype: the compute dtype. device: where a step's tensors live.
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    weights: Weights
    norms: Norms
    products: Products
    routing: Routing
    attention: Attention

    def one_thread(self) -> AbstractContextManager[None]:
        """Context that keeps torch's own operators on the calling thread, for a backend with threads of its own.

        After each operator, torch's threads spin for a while on cores that the backend's threads need next.
        """
        return nullcontext()
