"""Checkpoints of random weights in bfloat16, of any family: its table gives names and shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from npuq.models.config import ModelConfig
from npuq.models.tensors import ModelTensors, Spec


def write_random(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A checkpoint with the MTP layers that config.json counts; activations keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    model = ModelConfig.from_dict(config)
    drafts = range(model.num_hidden_layers, model.num_hidden_layers + model.num_nextn_predict_layers)
    tensors = {spec.name: _random(spec, generator) for spec in ModelTensors(model).unroll(drafts)}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _random(spec: Spec, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(spec.shape, generator=generator)
    kind = "" if spec.entry is None else spec.entry.kind
    if kind == "linear":
        drawn /= math.sqrt(spec.shape[1])
    elif kind != "lookup":
        drawn = drawn / 10 + (kind == "norm")
    return drawn if spec.kept_dtype == "F32" else drawn.bfloat16()
