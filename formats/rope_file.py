"""The rotary tables of an artifact on disk: `npuq/rope.safetensors`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import ArtifactError
from ..models.config import ModelConfig
from ..models.rope import RopeTables, attention_scale
from .safetensors import load_tensors, write_tensors

# A stored softmax_scale may differ from the one computed from the config, but by less than this factor.
_PLAUSIBLE = 8.0


def save_rope(tables: RopeTables, path: Path) -> None:
    """Write the tables as safetensors, their parameters as metadata: the same tables always give the same bytes."""
    write_tensors(path, {"cos": tables.cos, "sin": tables.sin}, tables.metadata)


def load_rope(path: Path, config: ModelConfig) -> RopeTables:
    """Read the tables that `save_rope` wrote for such a model.

    Raises ArtifactError, naming file and tensor, for a missing file or one of another format, a table whose dtype or
    shape disagrees with the config, a value that is not finite, and a softmax scale that is not positive or far from
    the config's.
    """
    form = ("F32", (config.rope.positions, config.rope.dim // 2))
    tensors, metadata = load_tensors(path, {"cos": form, "sin": form}, ArtifactError)
    for name, table in tensors.items():
        if not np.isfinite(table).all():
            raise ArtifactError(f"{path}: tensor {name!r} holds values that are not finite; convert again")
    return RopeTables(tensors["cos"], tensors["sin"], _softmax_scale(path, config, metadata), metadata)


def _softmax_scale(path: Path, config: ModelConfig, metadata: Mapping[str, str]) -> float:
    stored, expected = metadata.get("softmax_scale", ""), attention_scale(config)
    try:
        scale = float(stored)
    except ValueError:
        scale = math.nan
    # Written so that NaN counts as wrong.
    if not expected / _PLAUSIBLE <= scale <= expected * _PLAUSIBLE:
        raise ArtifactError(
            f"{path}: softmax_scale {stored[:40]!r} is not near the {expected:.4g} of config.json; convert again"
        )
    return scale
