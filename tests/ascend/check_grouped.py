"""Whole generations of models with grouped-query attention: the same logits and tokens as the reference set gives."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from ascend_rig import emulate, guard, harness
from ascend_rig.tape import Tape

from npuq.errors import ArtifactError
from npuq.runtime import llm
from npuq.runtime.step import Chunk

MODELS = tuple(f"{name}{scheme}" for name in ("qwen3", "glm4") for scheme in ("", "-float", "-w8a8", "-static"))
ATTENTION, SCATTER = "npu_fused_infer_attention_score_v2", "npu_scatter_pa_kv_cache"
ROTARY, PARTIAL_ROTARY = "npu_apply_rotary_pos_emb", "npu_rotary_mul"


@cache
def run_of(path: Path, kind: str, dtype: torch.dtype) -> harness.Run:
    return harness.generate(path, harness.make(kind, dtype))


@pytest.mark.parametrize("name", MODELS)
def test_float32_semantics_agree_with_the_reference(artifact, name):
    path, tape = artifact(name), Tape()
    with emulate.use_rules(wide=True) as used:
        ours = harness.generate(path, tape.record(harness.make("ascend")))
        assert used.calls[ATTENTION] and used.calls[SCATTER]
        # GLM-4.5 rotates half of the channels, which the operator in place does not take.
        assert used.calls[PARTIAL_ROTARY if name.startswith("glm4") else ROTARY]
    theirs = harness.generate(path, tape.replay(harness.make("reference")))
    tape.check_end()
    assert ours.tokens == theirs.tokens
    assert harness.relative_error(ours.logits, theirs.logits) < 1e-4
    assert name.endswith("-float") or tape.codes > 50_000


def test_the_generation_covers_what_it_is_meant_to(artifact):
    steps = run_of(artifact("qwen3-float"), "reference", torch.float32).steps
    assert not any(step.prefill.segments for step in steps if step.prefill), "chunks attend to pages"
    queries = [torch.tensor([0, *step.decode.q_lens]).diff().tolist() for step in steps if step.decode]
    assert any(step.prefill and step.decode for step in steps), "no first chunk beside a decode"
    assert any(1 in each and max(each) > 1 for each in queries), "no decode beside a later chunk"
    assert any(each == [1, 1] for each in queries), "no batched decode"


@pytest.mark.parametrize("name", ["qwen3-float", "glm4-float"])
def test_a_sequence_that_lost_its_blocks_goes_on_as_before(artifact, name):
    path, growing = artifact(name), {"lengths": (58, 57), "new_tokens": 12}
    with emulate.use_rules(wide=True):
        ours = harness.generate(path, harness.make("ascend"), **growing)
    theirs = harness.generate(path, harness.make("reference"), **growing)
    assert ours.preempted > 0 and ours.tokens == theirs.tokens
    assert harness.relative_error(ours.logits, theirs.logits) < 1e-4


@pytest.mark.parametrize("name", ["qwen3-float", "glm4-float"])
def test_tokens_that_are_not_cached_leave_the_pages_alone(artifact, name):
    path, texts = artifact(name), [[5, 9, 200, 17, 33], [4, 8, 15]]
    with emulate.use_rules(wide=True):
        model = harness.load(path, harness.make("ascend"))
        blocks = model.engine.blocks.num_blocks
        model.engine._run([Chunk(text, 0, []) for text in texts])
        for layer in model.engine._cache:
            for pool in layer.pages.values():
                assert pool.pool.layout == "nd" and pool.tensor.shape[0] == blocks + 1
                assert pool.tensor[:blocks].isnan().all()
        ours = list(model.logits(texts))
    theirs = list(harness.load(path, harness.make("reference")).logits(texts))
    assert harness.relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["qwen3", "glm4"])
def test_bf16_stays_near_the_reference_in_bf16(artifact, name):
    path = artifact(name)
    with emulate.use_rules():
        ours = harness.generate(path, harness.make("ascend", torch.bfloat16))
    theirs = run_of(path, "reference", torch.bfloat16)
    assert harness.relative_error(ours.logits[:1], theirs.logits[:1]) < 0.05


@pytest.mark.parametrize("name", ["qwen3", "glm4"])
def test_no_step_waits_for_the_device(artifact, name):
    with emulate.use_rules(wide=True):
        harness.generate(artifact(name), harness.make("ascend"), guard.guarded, (4, 45), 3)


def test_an_int8_cache_is_refused_in_a_line(artifact, monkeypatch):
    ops = harness.make("ascend", torch.bfloat16)
    monkeypatch.setattr(llm, "make_ops", lambda *_: ops)
    with pytest.raises(ArtifactError, match="has no int8 KV cache") as refused:
        llm.load(artifact("qwen3"), kv_cache_dtype="int8")
    assert "\n" not in str(refused.value)
