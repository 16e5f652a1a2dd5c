"""Whole generations through the Ascend set: the same logits and tokens as the reference set and the cpu set give."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from ascend_rig import emulate, guard, harness
from ascend_rig.tape import Tape

from npuq.errors import BackendError
from npuq.runtime.step import Chunk, StepBuilder

MODELS = (
    *("example", "example-float", "v2-lite", "kimi", "kimi-w8a8", "kimi-static", "kimi-k2.5", "kimi-k2.5-float"),
    *("glm-flash", "twenty-heads"),
)
# One of each form of attention: what pages hold does not depend on how weights are stored.
WIDTHS = ("example", "v2-lite", "glm-flash", "twenty-heads")
# Without a tape of codes, beside operators that are not written as the reference's are: one of each kind of weights.
UNTAPED = ("example", "example-float", "v2-lite", "kimi-static", "kimi-k2.5", "glm-flash")
INT8_CACHE = ("example-int8-cache", "v2-lite-int8-cache", "prolog-int8-cache", "glm-flash-int8-cache")


@cache
def run_of(path: Path, kind: str, dtype: torch.dtype) -> harness.Run:
    return harness.generate(path, harness.make(kind, dtype))


@pytest.mark.parametrize(("name", "layout"), [*((name, "nz") for name in MODELS), *((name, "nd") for name in WIDTHS)])
def test_float32_semantics_agree_with_the_reference(artifact, name, layout):
    path, tape = artifact(name), Tape()
    with emulate.use_rules(wide=True):
        ours = harness.generate(path, tape.record(harness.make("ascend", kv_layout=layout)))
    theirs = harness.generate(path, tape.replay(harness.make("reference")))
    tape.check_end()
    assert ours.tokens == theirs.tokens
    assert harness.relative_error(ours.logits, theirs.logits) < 1e-4
    assert name.endswith("-float") or tape.codes > 50_000


@pytest.mark.parametrize("name", INT8_CACHE)
def test_an_int8_cache_agrees_with_the_reference(artifact, name):
    path, tape = artifact(name), Tape()
    with emulate.use_rules(wide=True) as used:
        ours = harness.generate(path, tape.record(harness.make("ascend")))
        assert used.calls["npu_fused_infer_attention_score_v2"] > 0
        assert used.calls["npu_mla_prolog_v3"] == 0
    theirs = harness.generate(path, tape.replay(harness.make("reference")))
    tape.check_end()
    assert ours.tokens == theirs.tokens
    # The latent's own codes are not on the tape: a tie there moves one channel of one key.
    assert harness.relative_error(ours.logits, theirs.logits) < 1e-3


def test_an_int8_cache_in_bf16_stays_near_the_reference(artifact):
    """Prefill, a chunk after it and decodes beside each other, of fixed tokens: sampled ones may part in bf16.

    With the trained model: the routers of random ones have ties, which bf16 decides either way.
    """
    steps = [
        [Chunk(range(3, 23), 0, [1]), Chunk(range(40, 50), 0, [2])],
        [Chunk(range(50, 56), 20, [1]), Chunk([60], 10, [2])],
        [Chunk([61], 26, [1]), Chunk([62], 11, [2])],
    ]
    engines = [
        harness.load(artifact("example-int8-cache"), harness.make(kind, torch.bfloat16)).engine
        for kind in ("ascend", "reference")
    ]
    for chunks in steps:
        ours, theirs = (engine._run(chunks)[0].float() for engine in engines)
        assert harness.relative_error([ours], [theirs]) < 0.05


def test_several_queries_of_a_sequence_attend_to_codes(artifact):
    """As speculation does, and `npuq evaluate`: whole sequences through the absorbed form, 16 queries an entry."""
    path, texts = artifact("example-int8-cache"), [[5, 9, 200, 17, 33], list(range(3, 38))]
    with emulate.use_rules(wide=True):
        ours = list(harness.load(path, harness.make("ascend")).logits(texts))
    theirs = list(harness.load(path, harness.make("reference")).logits(texts))
    # Untaped: ties of activations move single logits, as above.
    assert harness.relative_error(ours, theirs) < 0.03


@pytest.mark.parametrize("name", ["example-int8-cache", "prolog-int8-cache"])
def test_an_int8_cache_is_written_in_steps_where_the_operator_does_not(artifact, name):
    """As torch_npu's page has it, the operator wants both caches in int8: found out at load, without an end."""
    path = artifact(name)
    with emulate.use_rules(wide=True) as used:
        fused = harness.generate(path, harness.make("ascend"))
        assert used.calls["npu_kv_rmsnorm_rope_cache"] > 1
    with emulate.use_rules(wide=True, paired_scales=True) as used:
        ops = harness.make("ascend")
        steps = harness.generate(path, ops, guard.guarded)
        assert used.calls["npu_kv_rmsnorm_rope_cache"] == 0 and ops.mla.int8.by_operator is False
    assert steps.tokens == fused.tokens and harness.relative_error(steps.logits, fused.logits) < 1e-3


def test_the_prolog_writes_an_int8_cache(artifact):
    path = artifact("prolog-int8-cache")
    with emulate.use_rules() as used:
        fused = harness.generate(path, harness.make("ascend", torch.bfloat16), guard.guarded)
        assert used.calls["npu_mla_prolog_v3"] > 0
    theirs = run_of(path, "reference", torch.bfloat16)
    first_decode = next(i for i, step in enumerate(fused.steps) if step.prefill is None)
    pair = fused.logits[first_decode : first_decode + 1], theirs.logits[first_decode : first_decode + 1]
    assert harness.relative_error(*pair) < 0.05


@pytest.mark.parametrize("name", ["prolog", "prolog-int8-cache"])
def test_a_prolog_that_gives_queries_of_another_dtype_is_called_once(artifact, name):
    class Other:
        """`torch.ops.npu` of a build whose prolog gives int8 queries where bfloat16 ones are due, and vice versa."""

        calls = 0

        def __getattr__(self, operator):
            original = getattr(torch.ops.npu, operator)
            if operator != "npu_mla_prolog_v3":
                return original

            def call(*args, **kwargs):
                self.calls += 1
                query, *others = original(*args, **kwargs)
                return query.to(torch.int8 if query.dtype is torch.bfloat16 else torch.bfloat16), *others

            return call

    ops, other = harness.make("ascend", torch.bfloat16), Other()
    ops.npu.operators = other
    run = harness.generate(artifact(name), ops, guard.guarded)
    assert other.calls == 1
    plain = harness.generate(artifact(name), harness.make("ascend", torch.bfloat16, fused_prolog=False))
    assert harness.relative_error(run.logits[:1], plain.logits[:1]) < 0.05
    first_decode = next(i for i, step in enumerate(run.steps) if step.prefill is None)
    pair = run.logits[first_decode : first_decode + 1], plain.logits[first_decode : first_decode + 1]
    assert harness.relative_error(*pair) < 0.05


@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_an_int8_cache_of_other_pages_is_refused(artifact, block_size, monkeypatch):
    monkeypatch.setattr(harness, "INT8_ENGINE", {**harness.INT8_ENGINE, "block_size": block_size})
    with pytest.raises(BackendError, match=f"block_size {block_size}.* pages of 128 tokens only.*kv_cache_dtype auto"):
        harness.load(artifact("example-int8-cache"), harness.make("ascend", torch.bfloat16))


def test_attention_to_a_long_prefix_is_merged_in_groups(artifact):
    """Forty segments of one block: more partial results than one operator of 2025's CANN merges."""
    path, chunks = artifact("example-float"), [Chunk(range(3, 13), 640, range(1, 42))]
    results = []
    for kind in ("ascend", "reference"):
        with emulate.use_rules(wide=True) as used:
            ops = harness.make(kind)
            engine = harness.load(path, ops).engine
            builder = StepBuilder(ops, engine._builder._rope, harness.BLOCK, harness.BLOCK)
            cache = [ops.caches.new(engine.model.attention.pools(layer), 42, harness.BLOCK) for layer in range(4)]
            tokens = torch.Generator().manual_seed(5)
            for start in range(0, 640, 128):
                some = torch.randint(3, 250, (128,), generator=tokens).tolist()
                engine.model.forward(builder.build([Chunk(some, start, range(1, 42))])[0], cache)
            used.calls.clear()
            results.append(engine.model.forward(builder.build(chunks)[0], cache))
            if kind == "ascend":
                assert used.calls["npu_attention_update"] == 3 * len(cache)
    assert harness.relative_error([results[0]], [results[1]]) < 1e-4


@pytest.mark.parametrize("options", [{"kv_layout": "nd"}, {"dtype": torch.float16}])
def test_an_int8_cache_is_refused_where_attention_would_not_read_it(artifact, options):
    with pytest.raises(BackendError, match="int8 KV cache in NZ pages and computes in bfloat16"):
        harness.load(artifact("example-int8-cache"), harness.make("ascend", **{"dtype": torch.bfloat16, **options}))


@pytest.mark.parametrize("name", UNTAPED)
def test_float32_semantics_agree_with_the_cpu_set(artifact, name):
    path = artifact(name)
    with emulate.use_rules(wide=True):
        ours = harness.generate(path, harness.make("ascend"))
    theirs = run_of(path, "cpu", torch.float32)
    assert ours.tokens == theirs.tokens
    assert harness.relative_error(ours.logits[:1], theirs.logits[:1]) < 1e-3
    # Rounding ties (see the tape) move single logits by up to a percent or so in these small models.
    assert harness.relative_error(ours.logits, theirs.logits) < (1e-3 if name.endswith("-float") else 0.03)


@pytest.mark.parametrize("half_cube", [False, True])
@pytest.mark.parametrize("name", ["example", "v2-lite", "kimi", "prolog", "kimi-static", "glm-flash"])
def test_bf16_stays_near_the_reference_in_bf16(artifact, name, half_cube):
    path = artifact(name)
    with emulate.use_rules(half_cube=half_cube):
        ours = harness.generate(path, harness.make("ascend", torch.bfloat16))
    theirs = run_of(path, "reference", torch.bfloat16)
    # Tokens may part where two logits tie in bf16: the first step of every prompt is compared, before that can matter.
    assert harness.relative_error(ours.logits[:1], theirs.logits[:1]) < 0.05


@pytest.mark.parametrize("layout", ["nz", "nd"])
def test_the_fused_prolog_agrees_with_the_unfused_chain(artifact, layout):
    path = artifact("prolog")
    with emulate.use_rules() as fused_rules:
        fused = harness.generate(path, harness.make("ascend", torch.bfloat16, kv_layout=layout))
        assert fused_rules.calls["npu_mla_prolog_v3"] > 0
    with emulate.use_rules() as plain_rules:
        plain = harness.generate(path, harness.make("ascend", torch.bfloat16, kv_layout=layout, fused_prolog=False))
        assert plain_rules.calls["npu_mla_prolog_v3"] == 0
    # Prefill runs the same operators either way; the first decode follows the same tokens.
    first_decode = next(i for i, step in enumerate(fused.steps) if step.prefill is None)
    assert harness.relative_error(fused.logits[:1], plain.logits[:1]) < 1e-2
    pair = fused.logits[first_decode : first_decode + 1], plain.logits[first_decode : first_decode + 1]
    assert harness.relative_error(*pair) < 0.05


@pytest.mark.parametrize("name", ["kimi", "glm-flash", "prolog-but-heads"])
def test_the_prolog_is_for_documented_shapes_only(artifact, name):
    with emulate.use_rules() as rules:
        harness.generate(artifact(name), harness.make("ascend", torch.bfloat16))
        assert rules.calls["npu_mla_prolog_v3"] == 0


def test_the_generation_covers_what_it_is_meant_to(artifact):
    run = run_of(artifact("example-float"), "reference", torch.float32)
    assert any(step.prefill and step.prefill.segments for step in run.steps), "no chunked prefill"
    assert any(step.prefill and step.decode for step in run.steps), "no step with decodes beside a chunk"
    assert any(step.decode and len(step.decode.kv_lens) > 1 for step in run.steps), "no batched decode"
    merges = [merge for step in run.steps if step.prefill for merge in step.prefill.merges]
    assert max(len(merge.segments) for merge in merges) > 1
    needed = sum(-(-(length + harness.NEW_TOKENS) // harness.BLOCK) for length in harness.PROMPT_LENGTHS)
    assert needed > harness.CACHE_BLOCKS, "no block was used again by a later sequence"


def test_no_step_waits_for_the_device(artifact):
    with emulate.use_rules(wide=True):
        seen = []

        def guarded(forward):
            with guard.watch() as watched:
                logits = forward()
            seen.append(len(watched.launches))
            return logits

        harness.generate(artifact("example"), harness.make("ascend"), around_step=guarded)
    assert min(seen) > 50


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool(x.sum() > 0),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1, 2, 3]),
        lambda x: x.unique(),
    ],
)
def test_the_guard_refuses_what_would_wait(read):
    x = torch.ones(4)
    with pytest.raises(guard.HostSynchronisationError), torch.inference_mode(), guard.watch():
        read(x)
