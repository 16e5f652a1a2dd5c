"""A tiny DeepSeek-V4 artifact, and the names under which the engines' classes look its schemes up."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "checkpoints"))
from packed_v4 import RELEASE, write_random_release

from npuq.convert import convert_checkpoint
from npuq.formats.artifact import DESCRIPTION_NAME


def describe(folder: Path) -> dict[str, Any]:
    """The description of a release of four layers, converted by the default recipe."""
    write_random_release(folder / "source")
    convert_checkpoint(folder / "source", folder / "artifact", workers=1)
    read: dict[str, Any] = json.loads((folder / "artifact" / DESCRIPTION_NAME).read_text())
    return read


def linears() -> Iterator[tuple[str, str]]:
    """Each linear of the main model under the engines' names, without `.weight`, and its scheme in Huawei's mix."""
    ratios = RELEASE["compress_ratios"]
    for layer in range(RELEASE["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn"
        for name in ("wq_a", "wq_b", "wkv"):
            yield f"{attention}.{name}", "W8A8_DYNAMIC"
        for name in ("wo_a", "wo_b"):
            yield f"{attention}.{name}", "FLOAT"
        if ratios[layer]:
            yield f"{attention}.compressor.wkv", "FLOAT"
        if ratios[layer] == 4:
            yield f"{attention}.indexer.wq_b", "W8A8_DYNAMIC"
            yield f"{attention}.indexer.weights_proj", "FLOAT"
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield f"model.layers.{layer}.mlp.shared_experts.{name}", "W8A8_DYNAMIC"
            yield f"model.layers.{layer}.mlp.experts.0.{name}", "W4A8_DYNAMIC"
        yield f"model.layers.{layer}.mlp.gate", "FLOAT"


def differing(found: Mapping[str, Any]) -> list[str]:
    """The linears for which an engine finds another scheme than the artifact has, or none."""
    return [name for name, scheme in linears() if found.get(f"{name}.weight") != scheme]
