"""Runs whole generations through one operator set and keeps every step's logits, to lay beside another set's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from npuq.formats.artifact import KV_CACHE_NAME
from npuq.runtime import llm
from npuq.runtime.engine_config import EngineConfig
from npuq.runtime.ops import LayerCache, Ops, Step
from npuq.runtime.ops.ascend.operators import AscendOps
from npuq.runtime.ops.cpu import CpuOps
from npuq.runtime.ops.reference import ReferenceOps
from npuq.runtime.sampling.params import SamplingParams

from .standins import SOC_NAME

BLOCK = 16
# Prompts of 4, 70, 33 and 21 tokens in chunks of at most 40; two sequences at once, in a cache that holds little more:
# the later prompts wait for blocks that the earlier ones give back.
PROMPT_LENGTHS = (4, 70, 33, 21)
ENGINE = {"block_size": BLOCK, "max_num_seqs": 2, "max_num_batched_tokens": 40, "prefix_segment_tokens": 32}
CACHE_BLOCKS = 8
# With an int8 cache, whose pages have 128 tokens.
INT8_LENGTHS = (4, 150, 33, 21)
INT8_ENGINE = {**ENGINE, "block_size": 128, "prefix_segment_tokens": 128}
INT8_BLOCKS = 3
NEW_TOKENS = 4


class WideAscendOps(AscendOps):
    """The Ascend set computing in float32, which no NPU does here: then only the order of operations may differ."""

    COMPUTE_DTYPES = (torch.float32,)


def make(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Ops:
    """A set of operators by name; `ascend` runs on CPU tensors, through the emulation."""
    if kind == "ascend":
        cls = WideAscendOps if dtype == torch.float32 else AscendOps
        # It rounds codes twice, which the reference backend does not: comparisons in float32 count every code.
        options = {"fused_experts": dtype != torch.float32, **options}
        return cls(device="cpu", dtype=dtype, **{"soc": SOC_NAME, **options})
    return {"reference": ReferenceOps, "cpu": CpuOps}[kind](dtype)


@dataclass
class Run:
    """What one set of operators made of the prompts: the tokens, each step, the logits of each step, and how often a
    sequence lost its blocks."""

    tokens: list[tuple[int, ...]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    preempted: int = 0


def prompts(vocabulary: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def load(path: Path, ops: Ops, **options: Any) -> llm.LanguageModel:
    """`npuq.load` with a given set of operators, its cache filled with NaN: what is read must have been written.

    Its latent is int8 where the artifact has scales for that. options: others of `npuq.load`.
    """
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    int8, size = (path / KV_CACHE_NAME).exists(), ops.dtype.itemsize
    if "kv_lora_rank" in config:
        channels = config["kv_lora_rank"] * (1 if int8 else size) + config["qk_rope_head_dim"] * size
    else:
        channels = 2 * config["num_key_value_heads"] * config["head_dim"] * size
    layers = config["num_hidden_layers"]
    token_bytes = layers * channels
    if "index_topk" in config:
        token_bytes += config.get("indexer_types", ["full"] * layers).count("full") * config["index_head_dim"] * size
    settings = INT8_ENGINE if int8 else ENGINE
    cache_bytes = (INT8_BLOCKS if int8 else CACHE_BLOCKS) * settings["block_size"] * token_bytes
    with mock.patch.object(llm, "make_ops", lambda *_: ops):
        sizes = EngineConfig(kv_cache_bytes=cache_bytes, **settings)
        model = llm.load(path, engine=sizes, kv_cache_dtype="int8" if int8 else "auto", **options)
    poison_cache(model.engine._cache)
    return model


def poison_cache(cache: Sequence[LayerCache]) -> None:
    for layer in cache:
        for pages in layer.pages.values():
            pages.tensor.fill_(111 if pages.tensor.dtype == torch.int8 else float("nan"))


def generate(
    path: Path,
    ops: Ops,
    around_step: Callable[[Callable[[], Tensor]], Tensor] | None = None,
    lengths: Sequence[int] | None = None,
    new_tokens: int = NEW_TOKENS,
    parallel: str | None = None,
) -> Run:
    """Generate from prompts of some lengths (default: those above); `around_step` may wrap each pass of the model.

    With `parallel` on rank 0, as the others follow; they end when this ends.
    """
    model = load(path, ops, parallel=parallel)
    run = Run()
    forward = model.engine.model.forward

    def recording(step: Step, cache: Sequence[LayerCache]) -> Tensor:
        logits = around_step(lambda: forward(step, cache)) if around_step else forward(step, cache)
        run.steps.append(step)
        run.logits.append(logits.float().clone())
        return logits

    if lengths is None:
        lengths = INT8_LENGTHS if (path / KV_CACHE_NAME).exists() else PROMPT_LENGTHS
    texts = prompts(model.engine.model.config.vocab_size, lengths)
    runner = model.engine
    with mock.patch.object(runner.model, "forward", recording):
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        sequences = [runner.add(text, params) for text in texts]
        while any(sequence.finish_reason is None for sequence in sequences):
            runner.step()
    run.preempted = runner.scheduler.num_preempted
    run.tokens = [tuple(sequence.tokens[sequence.num_prompt_tokens :]) for sequence in sequences]
    model.close()
    return run


def relative_error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Greatest difference of a logit over the greatest magnitude of one; infinite where anything is not finite."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not (a.isfinite().all() and b.isfinite().all()):
            return float("inf")
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst
