"""Whole generations of models with sparse attention: the same logits and tokens as the reference set and the cpu set
give, in sequences several times as long as a selection."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from ascend_rig import emulate, guard, harness
from ascend_rig.tape import Tape
from torch import Tensor

from npuq.errors import ArtifactError
from npuq.runtime import llm
from npuq.runtime.ops.ascend.operators import AscendOps
from npuq.runtime.step import Chunk

FAMILIES = ("v32", "glm-dsa")
# The hidden sizes, q_lora ranks and index heads that the published models have, or the fused prolog takes.
TRUE_WIDTHS = ("v32-prolog", "glm-dsa-prolog")
MIXED = ("v32-float-index-q", "v32-float-latents", "glm-dsa-float-index-q")
MODELS = (
    *(f"{name}{scheme}" for name in FAMILIES for scheme in ("", "-float", "-w8a8")),
    *MIXED,
    "glm-dsa-six-heads-float",
    *TRUE_WIDTHS,
)
# Two prompts below the limit, whose tokens reach it; then chunks of 40, and decodes beside them.
LENGTHS = (3, 4, 70, 33, 6)
TOPK = 8
INDEXER, ATTENTION, PROLOG = "npu_lightning_indexer", "npu_sparse_flash_attention", "npu_mla_prolog_v3"


def generate(path: Path, ops: harness.Ops) -> harness.Run:
    wide = path.name in TRUE_WIDTHS  # slow: a few tokens less
    return harness.generate(path, ops, lengths=(3, 4, 45) if wide else LENGTHS)


@cache
def run_of(path: Path, kind: str, dtype: torch.dtype) -> harness.Run:
    return generate(path, harness.make(kind, dtype))


@pytest.mark.parametrize("name", MODELS)
def test_float32_semantics_agree_with_the_reference(artifact, name):
    path, tape = artifact(name), Tape()
    with emulate.use_rules(wide=True) as used:
        ours = generate(path, tape.record(harness.make("ascend")))
        assert used.calls[INDEXER] and used.calls[ATTENTION] and used.calls["npu_fused_infer_attention_score"]
    theirs = generate(path, tape.replay(harness.make("reference")))
    tape.check_end()
    assert ours.tokens == theirs.tokens
    assert harness.relative_error(ours.logits, theirs.logits) < 1e-4
    assert name.endswith("-float") or tape.codes > 50_000


@pytest.mark.parametrize("name", [f"{name}{scheme}" for name in FAMILIES for scheme in ("", "-float")])
def test_float32_semantics_agree_with_the_cpu_set(artifact, name):
    path = artifact(name)
    with emulate.use_rules(wide=True):
        ours = generate(path, harness.make("ascend"))
    theirs = run_of(path, "cpu", torch.float32)
    assert ours.tokens == theirs.tokens
    assert harness.relative_error(ours.logits[:1], theirs.logits[:1]) < 1e-3


def test_the_generation_covers_what_it_is_meant_to(artifact):
    steps = run_of(artifact("v32-float"), "reference", torch.float32).steps
    dense = [step for step in steps if step.decode is None or step.decode.longest <= TOPK]
    sparse = [step.decode for step in steps if step.decode is not None and step.decode.longest > TOPK]
    assert any(step.prefill for step in dense) and any(step.decode for step in dense)
    assert all(step.prefill is None for step in steps if step.decode in sparse)
    queries = [torch.tensor([0, *decode.q_lens]).diff().tolist() for decode in sparse]
    assert any(1 in each and max(each) > 1 for each in queries), "no decode beside a chunk"
    assert any(each == [1, 1] for each in queries), "no batched decode"
    assert max(decode.longest for decode in sparse) > 5 * TOPK
    assert any(min(decode.kv_lens) <= TOPK for decode in sparse), "no sequence below the limit beside one above"


@pytest.mark.parametrize("name", ["v32-float", "glm-dsa-float"])
@pytest.mark.parametrize(
    "starts",
    [[0, 24, 48], [0, 3, 5, 7, 8, 9, 17, 60], list(range(70)), [0, 5]],
    ids=["chunks", "chunks across the limit", "one by one", "a long chunk after a short one"],
)
def test_chunks_of_any_length_agree_with_the_reference(artifact, name, starts):
    path, tokens = artifact(name), harness.prompts(320, [70])[0]
    with emulate.use_rules(wide=True):
        ours = by_chunks(path, harness.make("ascend"), tokens, starts)
    theirs = by_chunks(path, harness.make("reference"), tokens, [0])
    assert harness.relative_error([ours], [theirs]) < 1e-4


def by_chunks(path: Path, ops: harness.Ops, tokens: list[int], starts: list[int]) -> Tensor:
    """Logits of all tokens, from chunks that begin at `starts`."""
    engine = harness.load(path, ops).engine
    blocks = list(range(engine.blocks.blocks_for(len(tokens))))
    ends = [*starts[1:], len(tokens)]
    rows = [
        engine._run([Chunk(tokens[start:end], start, blocks, all_rows=True)])[0]
        for start, end in zip(starts, ends, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sequence_that_lost_its_blocks_goes_on_as_before(artifact, name):
    """Two sequences that outgrow the cache together; the later one is computed again, across the limit."""
    path, growing = artifact(f"{name}-float"), {"lengths": (58, 57), "new_tokens": 12}
    with emulate.use_rules(wide=True):
        ours = harness.generate(path, harness.make("ascend"), **growing)
    theirs = harness.generate(path, harness.make("reference"), **growing)
    assert ours.preempted > 0 and ours.tokens == theirs.tokens
    assert harness.relative_error(ours.logits, theirs.logits) < 1e-4


@pytest.mark.parametrize("name", ["v32-float", "glm-dsa-float"])
def test_tokens_that_are_not_cached_leave_the_pages_alone(artifact, name):
    """Short texts without blocks: their index keys go into a page of no sequence."""
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


@pytest.mark.parametrize("name", [*FAMILIES, *TRUE_WIDTHS])
def test_bf16_stays_near_the_reference_in_bf16(artifact, name):
    path = artifact(name)
    with emulate.use_rules():
        ours = generate(path, harness.make("ascend", torch.bfloat16))
    theirs = run_of(path, "reference", torch.bfloat16)
    # Dense steps; later ones may select other tokens where two scores tie in bf16.
    assert harness.relative_error(ours.logits[:1], theirs.logits[:1]) < 0.05


@pytest.mark.parametrize("name", TRUE_WIDTHS)
def test_the_fused_prolog_gives_the_latent_of_queries_to_the_indexer(artifact, name):
    """Every sparse step takes it, chunks too; the tokens that it selects are nearly those of the unfused chain."""
    chunks, selections = [Chunk(harness.prompts(320, [60])[0], 0, [0, 1, 2, 3])], []
    for fused in (True, False):
        with emulate.use_rules() as used:
            ops = harness.make("ascend", torch.bfloat16, fused_prolog=fused)
            engine, kept = harness.load(artifact(name), ops).engine, []
            select = ops.sparse.lightning_indexer

            def keep(*args, select=select, kept=kept):
                kept.append(select(*args))
                return kept[-1]

            ops.sparse.lightning_indexer = keep
            engine._run(chunks)
            assert used.calls[PROLOG] == (len(engine._cache) if fused else 0)
            assert used.calls[INDEXER] == len(kept) == (2 if name == "glm-dsa-prolog" else 3)
        selections.append(kept[0][TOPK:, 0].tolist())
    same = [len({*ours} & {*theirs}) for ours, theirs in zip(*selections, strict=True)]
    assert sum(same) > 0.95 * TOPK * len(same)


def test_a_float_linear_does_not_get_the_prologs_codes(artifact):
    """Layers without an indexer take the prolog then, and the others its steps."""
    with emulate.use_rules() as used:
        engine = harness.load(artifact("glm-dsa-prolog-float-index-q"), harness.make("ascend", torch.bfloat16)).engine
        engine._run([Chunk(range(3, 23), 0, [0, 1])])
        assert used.calls[PROLOG] == used.calls[INDEXER] == 2
        engine._run([Chunk([5], 4, [0])])  # below the limit the indexer has no queries
        assert used.calls[PROLOG] == 6


@pytest.mark.parametrize("name", [*FAMILIES, *TRUE_WIDTHS])
def test_no_step_waits_for_the_device(artifact, name):
    dtype = torch.bfloat16 if name in TRUE_WIDTHS else torch.float32
    with emulate.use_rules(wide=dtype == torch.float32):
        harness.generate(artifact(name), harness.make("ascend", dtype), guard.guarded, (4, 45), 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_int8_cache_is_refused_in_a_line(artifact, name, monkeypatch):
    ops: AscendOps = harness.make("ascend", torch.bfloat16)
    monkeypatch.setattr(llm, "make_ops", lambda *_: ops)
    with pytest.raises(ArtifactError, match="has no int8 KV cache") as refused:
        llm.load(artifact(name), kv_cache_dtype="int8")
    assert "\n" not in str(refused.value)
