"""Artifacts with scales for an int8 KV cache, without a calibration."""

from __future__ import annotations

import shutil
from pathlib import Path

from npuq.formats.artifact import KV_CACHE_NAME
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.kv_cache import save_scales, storable_scale
from npuq.models.config import ModelConfig


def copy_with_scales(artifact: Path, directory: Path) -> Path:
    """Copy an artifact and add scales such as calibration finds: a few times the norm's gain at code 127."""
    shutil.copytree(artifact, directory)
    with Checkpoint.open(directory) as checkpoint:
        config = ModelConfig.from_dict(checkpoint.config)
        gains = [
            checkpoint.view(f"model.layers.{layer}.self_attn.kv_a_layernorm.weight").float().abs()
            for layer in range(config.num_hidden_layers)
        ]
    save_scales([storable_scale(4 * gain / 127) for gain in gains], directory / KV_CACHE_NAME)
    return directory
