"""Planned bytes of weights against the tensors that the Ascend backend lays out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ascend_rig import harness
from held import held_bytes

from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.model_config import read_model_config
from npuq.formats.sources.opening import open_weights
from npuq.native.mapped import MappedFiles
from npuq.runtime.attention.kinds import attention_of
from npuq.runtime.engine_config import EngineConfig
from npuq.runtime.memory.machine import engine_cache, planner_of
from npuq.runtime.memory.stored import stored_model
from npuq.runtime.memory.weights import NpuMemory, weight_bytes
from npuq.runtime.ranks.layout import Layout
from npuq.runtime.step import RopeRows
from npuq.runtime.store import open_store
from npuq.runtime.weights import load_rope_tables, load_weights

MODELS = (
    *("example", "example-float", "v2-lite", "kimi", "kimi-w8a8", "kimi-static", "kimi-k2.5", "glm-flash"),
    *("prolog", "v32", "v32-prolog", "v32-prolog-float-index-q", "glm-dsa", "qwen3", "glm4", "glm4-static"),
)


# float16 takes other scales: of static linears in words of 64 bits, of W8A8 experts in float32.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in MODELS),
        *((name, torch.float16) for name in ("example", "kimi-w8a8", "kimi-static")),
    ],
)
def test_the_npu_holds_what_is_planned(artifact, name, dtype):
    """To the byte."""
    ops = harness.make("ascend", dtype)
    with Checkpoint.open(artifact(name)) as checkpoint:
        config = read_model_config(checkpoint)
        model = stored_model(config, open_weights(checkpoint).weights)
        rope = RopeRows.of(load_rope_tables(checkpoint, config), ops)
        weights = load_weights(open_store(checkpoint, ops.dtype), config, ops, attention_of(config, 1.0))
    # The emulated device's memory is the host's: tensors that need no change are still the mapped ones.
    _, held = held_bytes((weights, rope), MappedFiles())
    planned = weight_bytes(model, Layout().owned(config, 0), NpuMemory(dtype))
    assert not any(kind.mapped for kind in planned.values())
    assert sum(kind.copied for kind in planned.values()) == held


@pytest.mark.parametrize("name", ["kimi", "v32", "glm4"])
def test_the_npus_cache_is_what_is_planned(artifact, name):
    """The blocks of sequences and the spare one, of every layer."""
    ops, sizes = harness.make("ascend", torch.bfloat16), EngineConfig(block_size=64, max_num_seqs=2)
    with Checkpoint.open(artifact(name)) as checkpoint:
        config = read_model_config(checkpoint)
        planner = planner_of(open_store(checkpoint, ops.dtype).form, config, ops, sizes, 1 << 40, int8_cache=False)
    planned = engine_cache(planner, planner.rank(Layout()), sizes)
    blocks = planned // (planner.cache_token * sizes.block_size)
    pools = attention_of(config, 1.0).pools
    layers = range(config.num_hidden_layers)
    cache = [ops.caches.new(pools(layer), blocks, sizes.block_size) for layer in layers]
    _, held = held_bytes(cache, MappedFiles())
    elsewhere = replace(planner, backend=replace(planner.backend, spare_blocks=0))
    spare = planner.rank(Layout()).workspace.fixed - elsewhere.rank(Layout()).workspace.fixed
    assert held == planned + spare
    assert spare == 64 * planner.cache_token
