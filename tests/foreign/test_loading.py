"""What the runtime's loader takes from other tools' artifacts: scales in other float types, and no partial sums that
operators cannot add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import foreign
import pytest
import torch
from torch import Tensor

import npuq
from npuq.errors import ArtifactError

EXPERT = "model.layers.1.mlp.experts.3.down_proj"
O_PROJ = "model.layers.0.self_attn.o_proj"
PROMPT = list(range(40, 60))


def test_scales_of_any_float_type_are_read(float_model: Path, tmp_path: Path) -> None:
    def rounded(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
        def edit(tensors: dict[str, Tensor]) -> None:
            name = f"{O_PROJ}.weight_scale"
            tensors[name] = tensors[name].bfloat16().to(dtype)[:, 0].contiguous()

        return edit

    half, whole = (
        foreign.write_modelslim(float_model, tmp_path / str(dtype), edit=rounded(dtype))
        for dtype in (torch.bfloat16, torch.float32)
    )
    logits = [torch.cat(list(npuq.load(directory).logits([PROMPT]))) for directory in (half, whole)]
    assert torch.equal(*logits)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{EXPERT}.scale_bias"]


def fold(tensors: dict[str, Tensor]) -> None:
    name = f"{EXPERT}.scale_bias"
    tensors[name] = tensors[name].unflatten(1, (4, 4)).sum(2)


@pytest.mark.parametrize(
    ("edit", "message"), [(drop, f"'{EXPERT}.weight' has no scale_bias; `npuq convert`"), (fold, "4 partial sums")]
)
def test_biases_that_no_operator_takes(
    edit: Callable[[dict[str, Tensor]], None], message: str, float_model: Path, tmp_path: Path
) -> None:
    directory = foreign.write_modelslim(
        float_model,
        tmp_path / "in",
        edit=edit,
        edit_types=lambda types: edit is drop and types.pop(f"{EXPERT}.scale_bias"),
    )
    with pytest.raises(ArtifactError, match=message):
        npuq.load(directory)
    # The remedy: conversion sums the codes itself.
    npuq.convert_checkpoint(directory, tmp_path / "out")
    npuq.load(tmp_path / "out").generate([PROMPT], max_new_tokens=1)
