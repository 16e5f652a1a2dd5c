"""Planned bytes of weights against the tensors that the Ascend backend lays out."""

from __future__ import annotations

import pytest
import torch
from ascend_rig import harness
from held import held_bytes

from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.model_config import read_model_config
from npuq.formats.sources.opening import open_weights
from npuq.native.mapped import MappedFiles
from npuq.runtime.attention.kinds import attention_of
from npuq.runtime.memory.stored import stored_model
from npuq.runtime.memory.weights import NpuMemory, weight_bytes
from npuq.runtime.ranks.layout import Layout
from npuq.runtime.step import RopeRows
from npuq.runtime.store import open_store
from npuq.runtime.weights import load_rope_tables, load_weights

MODELS = (
    *("example", "example-float", "v2-lite", "kimi", "kimi-w8a8", "kimi-static", "kimi-k2.5", "glm-flash"),
    *("prolog", "v32", "v32-prolog", "v32-prolog-float-index-q", "glm-dsa"),
)


@pytest.mark.parametrize("name", MODELS)
def test_the_npu_holds_what_is_planned(artifact, name):
    """To the byte, but for the input scales of static linears."""
    ops = harness.make("ascend", torch.bfloat16)
    with Checkpoint.open(artifact(name)) as checkpoint:
        config = read_model_config(checkpoint)
        model = stored_model(config, open_weights(checkpoint).weights)
        rope = RopeRows.of(load_rope_tables(checkpoint, config), ops)
        weights = load_weights(open_store(checkpoint, ops.dtype), config, ops, attention_of(config, 1.0))
    # The emulated device's memory is the host's: tensors that need no change are still the mapped ones.
    _, held = held_bytes((weights, rope), MappedFiles())
    planned = weight_bytes(model, Layout().owned(config, 0), NpuMemory())
    assert not any(kind.mapped for kind in planned.values())
    input_scales = 4 * 6 * config.num_hidden_layers  # two of two bytes, of up to six linears a layer
    allowed = input_scales if name.endswith("-static") else 0
    assert abs(sum(kind.copied for kind in planned.values()) - held) <= allowed
