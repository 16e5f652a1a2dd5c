"""A cache of automatic size on the emulated NPU: what its weights and a step leave of the memory that is free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ascend_rig import harness
from held import held_bytes

from npuq.errors import BackendError
from npuq.native.mapped import MappedFiles
from npuq.runtime import llm
from npuq.runtime.engine_config import EngineConfig

SIZES: dict[str, Any] = {"block_size": 64, "max_num_seqs": 2, "max_num_batched_tokens": 40, "prefix_segment_tokens": 64}


@pytest.mark.parametrize("name", ["kimi", "glm4"])
def test_the_cache_is_what_is_left(artifact, name, monkeypatch):
    """Of its memory, to the block; the tensors are those bytes and the spare block."""
    path, plans = artifact(name), []
    monkeypatch.setattr(llm, "make_ops", lambda *_: harness.make("ascend", torch.bfloat16))
    planner_of = llm.planner_of

    def planned(*given, **options):
        plans.append(planner_of(*given, **options))
        return plans[-1]

    monkeypatch.setattr(llm, "planner_of", planned)
    whole = llm.load(path, engine=EngineConfig(**SIZES))
    assert whole.cache_tokens == 2 * -(-whole.context // 64) * 64
    plan = plans[0].rank(llm.Layout())
    for blocks in (1, 3):
        taken = plan.total_weights.copied + plan.workspace.fixed
        free = taken + plan.cached(64 * (blocks + 1)) - 1
        monkeypatch.setattr(llm, "free_memory", lambda *_, free=free: free)
        model = llm.load(path, engine=EngineConfig(**SIZES))
        assert (model.cache_tokens, model.cache_bytes) == (64 * blocks, 64 * blocks * plan.cache_token)
        assert held_bytes(model.engine._cache, MappedFiles())[1] == model.cache_bytes + 64 * plan.cache_token
    monkeypatch.setattr(llm, "free_memory", lambda *_: taken + plan.cached(64) - 1)
    with pytest.raises(BackendError, match=r"^no room for a KV cache: .* give --cache-size [^\n]*$"):
        llm.load(path, engine=EngineConfig(**SIZES))
    given = EngineConfig(kv_cache_bytes=2 * 64 * plan.cache_token, **SIZES)
    assert llm.load(path, engine=given).cache_tokens == 128
