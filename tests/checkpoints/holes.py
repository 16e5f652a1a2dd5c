"""Checkpoints whose shards have true headers and no data: their bytes are holes, which take no room on the disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from npuq.dtypes import ITEM_BYTES
from npuq.formats.safetensors import encode_header

Header = tuple[str, str, tuple[int, ...]]


def write_holes(directory: Path, config: dict[str, Any], tensors: Sequence[Header], shards: int = 163) -> None:
    """Write config.json, index and shards for tensors of a name, a safetensors dtype and a shape."""
    directory.mkdir(parents=True)
    placed, per_shard = {}, -(-len(tensors) // shards)
    for number in range(shards):
        part = tensors[number * per_shard : (number + 1) * per_shard]
        shard = f"model-{number + 1:05d}-of-{shards:06d}.safetensors"
        header = encode_header(part)
        with (directory / shard).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in part))
        placed |= {name: shard for name, _, _ in part}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
