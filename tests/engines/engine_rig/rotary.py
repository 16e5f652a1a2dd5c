"""The rotary tables and the softmax scale that an engine makes of config.json, against npuq's of the same config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from npuq.engines.placement import check_placement
from npuq.errors import CheckpointError
from npuq.formats.checkpoint import Checkpoint
from npuq.models.config import ModelConfig
from npuq.models.rope import rope_tables

_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 128}
ROPES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "yarn": _YARN,
    "yarn with mscale": {**_YARN, "mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 16},
    "yarn with attention_factor": {**_YARN, "attention_factor": 1.5},
    "yarn without truncation": {**_YARN, "truncate": False},
    "linear": {"type": "linear", "factor": 2.0},
    "linear with mscale_all_dim": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "llama3": {"type": "llama3", "factor": 2.0, **_LLAMA3},
}
# Both engines keep the tables in the model's dtype, bfloat16.
_TOLERANCE = 2.0**-8


def check_rope(name: str, engine: ModuleType, artifact: Path, folder: Path, key: str) -> None:
    """The engine's tables are npuq's, or `verify --engine` says that they are not."""
    shutil.copytree(artifact, folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | {"rope_scaling": ROPES[key]}
    path.write_text(json.dumps(raw))
    try:
        told, config = check_placement(folder, name, 1, False), ModelConfig.from_dict(raw)
    except CheckpointError:  # npuq computes no such rope either
        return
    assert _agrees(engine, folder, config) == (not told), told


def _agrees(engine: ModuleType, directory: Path, config: ModelConfig) -> bool:
    with Checkpoint.open(directory) as checkpoint:
        weights = ((name, checkpoint.read(name)) for name in checkpoint.tensors)
        try:
            attention = engine.build(directory, weights, 1, 1, 0, False).model.layers[0].self_attn
        except KeyError:  # vLLM asks every type for YaRN's parameters
            return False
    tables, cache = rope_tables(config), attention.rotary_emb.cos_sin_cache.float()
    if cache.shape[0] < tables.cos.shape[0]:
        return False
    cos, sin = (half.numpy() for half in cache[: tables.cos.shape[0]].chunk(2, dim=-1))
    error = max(float(abs(cos - tables.cos).max()), float(abs(sin - tables.sin).max()))
    return error <= _TOLERANCE and abs(attention.scaling / tables.softmax_scale - 1) < 1e-6
