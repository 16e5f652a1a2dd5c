"""The operators a backend provides, and the values that pass between them and the model.

The model (`runtime/model.py`) is written once against `Ops`, which has five parts: `weights` makes handles of stored
weights, `norms`, `products`, `routing` and `attention` compute. Operators carry the names and the semantics of the
NPU's own (`npu_rms_norm`, `npu_kv_rmsnorm_rope_cache`, …) and come in two sizes:

* **small operators** have no body in the parts' own files: every backend implements them. One method is one device
  call;
* **composites** (`mla_prolog`, `moe_experts`, `mlp`, …) have a body made of small operators, which is also their
  specification. A backend that has one kernel for the whole of it overrides the composite.

Backends: `reference` (plain torch, the specification), `cpu` (torch in bounded memory), `native` (kernels in C),
`ascend` (torch_npu). Each builds its parts and gives each the others that it computes with.

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
    """How one backend computes: its parts.

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
        """Torch's own operators inside work on the calling thread alone, where this set has threads of its own.

        Torch's threads stay awake for a while after each operator they shared, on the cores that the set's want next.
        """
        return nullcontext()
