"""Measuring a decode step: whole, run eagerly and as a graph, and operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ....errors import GenerationError
from ....formats.checkpoint import Checkpoint
from ....formats.sources.model_config import read_model_config
from ....models.config import ModelConfig
from ...attention.kinds import attention_of
from ...backend import make_ops
from ...engine import Engine
from ...engine_config import EngineConfig
from ...graph.decode import DecodeGraphs
from ...llm import load
from ...step import Chunk, RopeRows
from .synthetic import DEEPSEEK_V3_LAYERS, random_model
from .timing import OperatorTime, OperatorTimer, seconds_of
from .traffic import step_bytes

BLOCK = 128
STEP_SECONDS = 1.0
"""A whole step is repeated for so long."""
MOST_STEPS = 100


@dataclass(frozen=True)
class Bench:
    """Measurements of one decode step.

    model: a directory, or what the random model is like. emulated: the device is an NPU's stand-in on the CPU.
    sequences: in the step, one token each. context: tokens of each sequence, that one included. bytes: of weights and
    cache that a step reads. eager_seconds, graph_seconds: of one step, its inputs' copies included, until the device is
    done; None where no graph ran: the backend has none, the step is too large, or a capture or a replay failed.
    """

    backend: str
    device: str
    emulated: bool
    model: str
    sequences: int
    context: int
    bytes: int
    eager_seconds: float
    graph_seconds: float | None
    operators: tuple[OperatorTime, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bench_model(directory: Path, backend: str, device: str | None, sequences: int, context: int) -> Bench:
    """Measure a model's decode step. Raises as `load` does, and GenerationError for a context that is too long."""
    with Checkpoint.open(directory) as checkpoint:
        config = read_model_config(checkpoint)
    check_context(config, context)
    model = load(directory, backend, device=device, engine=_engine_config(config, sequences, context))
    return measure(model.engine, str(directory), sequences, context)


def bench_random(
    backend: str,
    device: str | None,
    sequences: int,
    context: int,
    config: Mapping[str, Any] = DEEPSEEK_V3_LAYERS,
) -> Bench:
    """Measure a decode step of two layers of random weights. Raises as `bench_model` does."""
    read = ModelConfig.from_dict(config)
    check_context(read, context)
    model, tables = random_model(read, make_ops(backend, device=device))
    sizes = _engine_config(read, sequences, context)
    engine = Engine(model, RopeRows.of(tables, model.ops), frozenset(), sizes)
    return measure(engine, f"{read.num_hidden_layers} layers of {read.model_type}, random weights", sequences, context)


def check_context(config: ModelConfig, context: int) -> None:
    """Raise GenerationError for a context longer than a model's."""
    if context > config.max_position_embeddings:
        raise GenerationError(f"a context of {context} tokens; the model's is {config.max_position_embeddings}")


def measure(engine: Engine, name: str, sequences: int, context: int) -> Bench:
    """Measure the decode step of an engine, with sequences of `context` tokens whose cached rows are random."""
    ops, model, cache = engine.model.ops, engine.model, engine.cache
    for layer in cache:
        for pages in layer.pages.values():
            if pages.tensor.is_floating_point():
                pages.tensor.uniform_(-1, 1)
            else:
                pages.tensor.random_(-100, 100)
    width = -(-context // BLOCK)
    tokens = [(7 + 13 * index) % model.config.vocab_size for index in range(sequences)]
    chunks = [
        Chunk([token], context - 1, range(index * width, (index + 1) * width)) for index, token in enumerate(tokens)
    ]
    step, _ = engine.builder.build(chunks)
    timer = OperatorTimer(ops)
    with ops.one_thread():
        eager = _step_seconds(lambda: engine.run_eagerly(chunks), ops.device)
        replayed = None if engine.graphs is None else _replay_seconds(engine.graphs, chunks, ops.device)
        with timer.watching():
            model.forward(step, cache)
    dense = model.attention.dense_tokens
    selected = dense if dense is not None and context > dense else None
    return Bench(
        backend=ops.name,
        device=str(ops.device),
        emulated=ops.name == "ascend" and ops.device.type == "cpu",
        model=name,
        sequences=sequences,
        context=context,
        bytes=step_bytes(model.weights, cache, step, selected),
        eager_seconds=eager,
        graph_seconds=replayed,
        operators=tuple(timer.times()),
    )


def _replay_seconds(graphs: DecodeGraphs, chunks: Sequence[Chunk], device: torch.device) -> float | None:
    """Seconds of a step as a graph; None if it is larger than any graph, and if a replay fails."""
    if graphs.run(chunks) is None:
        return None
    seconds = _step_seconds(lambda: graphs.run(chunks), device)
    return seconds if graphs.active else None


def _step_seconds(run: Callable[[], object], device: torch.device) -> float:
    return seconds_of(run, device, STEP_SECONDS, MOST_STEPS)


def _engine_config(config: ModelConfig, sequences: int, context: int) -> EngineConfig:
    attention = attention_of(config, 1.0)
    channels = sum(pool.channels for layer in range(config.num_hidden_layers) for pool in attention.pools(layer))
    tokens = sequences * -(-context // BLOCK) * BLOCK
    return EngineConfig(
        kv_cache_bytes=4 * channels * tokens,  # enough in float32
        block_size=BLOCK,
        max_num_seqs=sequences,
        max_num_batched_tokens=sequences + 1,
    )
