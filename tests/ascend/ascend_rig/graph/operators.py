"""Semantics of the operators that torch_npu's dispatch mode calls instead of attention while it captures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

V1, V2 = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"


def register() -> torch.library.Library:
    """Register them for CPU tensors; they last as long as the returned library."""
    library = torch.library.Library("npu", "IMPL")
    for name in (V1, V2):
        library.impl(f"{name}.out", _into(getattr(torch.ops.npu, name).default), "CPU")
        library.impl(f"_{name}_get_max_workspace", _workspace, "CPU")
        library.impl(f"_{name}_infer_output", _output, "CPU")
    return library


def _into(operator: Any) -> Any:
    def call(*args: Any, workspace: Tensor | None = None, out: list[Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
        if workspace is None or workspace.dim() != 1:
            raise ValueError(f"{operator}: the workspace is {workspace!r}")
        results = operator(*args, **kwargs)
        for place, result in zip(out, results, strict=True):
            if place.shape != result.shape or place.dtype != result.dtype:
                raise ValueError(f"{operator}: {result.dtype} {result.shape} into {place.dtype} {place.shape}")
            place.copy_(result)
        return out[0], out[1]

    return call


def _workspace(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    return torch.empty(64, dtype=query.dtype)


def _output(
    query: Tensor, value: Tensor, *, input_layout: str = "BSH", query_rope: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Room for the output, which is head-major in both layouts of absorbed attention alone; none for the
    log-sum-exp."""
    if input_layout == "TND_NTD":
        shape = query.transpose(0, 1).shape
    elif input_layout == "TND":
        shape = query.shape
    elif input_layout == "BSND_NBSD":
        shape = query.permute(2, 0, 1, 3).shape
    else:
        raise ValueError(f"layout {input_layout!r} is not emulated in a graph")
    dtype = query.dtype if query_rope is None else query_rope.dtype
    return torch.empty(shape, dtype=dtype), torch.empty(0)
