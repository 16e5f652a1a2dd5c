"""Models whose heads, columns and vocabulary ranks divide give the logits of one process, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grouped_models
import pytest
import tiny
import torch
from calibrated import convert, text
from threads import ThreadGroup, on_ranks
from torch import Tensor

import npuq
from npuq.errors import ArtifactError, BackendError, CheckpointError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.model_config import read_model_config
from npuq.runtime.attention.kinds import attention_of
from npuq.runtime.attention.pools import LayerCache
from npuq.runtime.engine import Engine
from npuq.runtime.engine_config import EngineConfig
from npuq.runtime.model import Model
from npuq.runtime.ops import Ops, Step
from npuq.runtime.ops.cpu import CpuOps
from npuq.runtime.ops.latent_attention import LATENT
from npuq.runtime.ops.native import NativeOps
from npuq.runtime.ops.native.blocks import NativeMla
from npuq.runtime.ops.reference import ReferenceOps
from npuq.runtime.ranks.group import ALONE, Group
from npuq.runtime.ranks.layout import Layout
from npuq.runtime.step import RopeRows
from npuq.runtime.store import open_store
from npuq.runtime.weights import load_rope_tables, load_weights

SIZES = EngineConfig(64 << 20, block_size=16, max_num_seqs=4, max_num_batched_tokens=24, prefix_segment_tokens=32)
# Chunks: one with a cached prefix, one of a single token, which decodes; whole sequences; more than a sparse selection.
LENGTHS = (37, 25, 5, 1, 75)
STATIC = """\
name: static
method: gptq
rules:
  - names: ["*.self_attn.*.weight", "*.down_proj.weight"]
    roles: [attention, dense_mlp, shared_expert]
    layers: 0-2
    scheme: W8A8_STATIC
  - roles: [routed_expert]
    scheme: W4A8
  - scheme: W8A8
"""


class Case(NamedTuple):
    """A model, and the layouts (ranks, ep, tp) that divide it."""

    model: str
    layouts: tuple[tuple[int, int, int], ...]
    int8_cache: bool = False


CASES = [
    Case("example", ((2, 2, 2), (4, 1, 4))),
    Case("example-w4a8", ((2, 1, 2), (4, 4, 4), (4, 4, 2))),
    Case("example-w4a8", ((2, 2, 2),), int8_cache=True),
    Case("v3-static", ((2, 2, 2), (4, 1, 4))),
    Case("v2-lite", ((4, 4, 2), (4, 4, 4))),
    Case("v2-lite-w4a8", ((4, 1, 4),)),
    Case("glm-flash-w4a8", ((4, 4, 4), (5, 1, 5))),
    Case("v32-w4a8", ((4, 4, 4),)),
    Case("glm-5-w4a8", ((2, 1, 2),)),
    Case("glm-5", ((4, 1, 4),)),
    Case("tied", ((4, 1, 4),)),
    # Two key and value heads: one a rank, and one on several. Biases, partial rotation; float and codes.
    Case("qwen3-w4a8", ((2, 2, 2), (8, 1, 4))),
    Case("glm", ((2, 1, 2), (6, 1, 6))),
]


def native(dtype: torch.dtype, group: Group) -> Ops:
    return NativeOps(dtype, threads=1, group=group)


BACKENDS: dict[str, tuple[Callable[[torch.dtype, Group], Ops], torch.dtype]] = {
    "reference": (ReferenceOps, torch.float32),
    "torch": (CpuOps, torch.float32),
    "native": (native, torch.float32),
    "native bfloat16": (native, torch.bfloat16),
}


@pytest.fixture(scope="module")
def models(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`models(name)`: a bfloat16 checkpoint, its "-w4a8" or its "-static" artifact; each made once."""
    folder = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        if name == "example":
            return example_fp8
        base, _, recipe = name.rpartition("-") if name.endswith(("-w4a8", "-static")) else (name, "", "")
        directory = folder / name
        if directory.exists():
            return directory
        if name == "tied":  # in float32, which stays where it is mapped
            tiny.make_checkpoint(directory, "v3", tie_word_embeddings=True)
        elif not recipe and base in grouped_models.MODELS:
            grouped_models.make_grouped(directory, base)
        elif not recipe:
            tiny.make_source(directory, base)
        elif recipe == "static":
            words, file = folder / "words.txt", folder / "static.yaml"
            words.write_text(text(4000, vocabulary=tiny.VOCABULARY))
            file.write_text(STATIC)
            convert(get(base), directory, words, recipe=file, method=None)
        else:
            npuq.convert_checkpoint(get(base), directory, recipe=recipe, method="minmax", workers=1)
        return directory

    return get


class Ranks(Model):
    """A model of which ranks besides the first get no logits: it gives their engine zeros."""

    def forward(self, step: Step, cache: tuple[LayerCache, ...]) -> Tensor:  # type: ignore[override]
        logits = super().forward(step, cache)
        if self.weights.vocabulary is None or self.weights.vocabulary.group.rank == 0:
            return logits
        assert logits.shape == (0, self.config.vocab_size)
        return logits.new_zeros(step.num_tokens if step.output_rows is None else len(step.output_rows), logits.shape[1])


def engine(directory: Path, ops: Ops, layout: Layout, int8_cache: bool = False) -> Engine:
    with Checkpoint.open(directory) as checkpoint:
        config = read_model_config(checkpoint)
        tables = load_rope_tables(checkpoint, config)
        owned = layout.owned(config, ops.group.rank)
        attention = attention_of(config, tables.softmax_scale, len(owned.heads))
        weights = load_weights(open_store(checkpoint, ops.dtype), config, ops, attention, owned=owned)
    scales = None
    if int8_cache:
        channels = config.attention.sizes()["kv_lora"]
        scales = [{LATENT: torch.full((channels,), 0.02)} for _ in range(config.num_hidden_layers)]
    return Engine(Ranks(config, ops, weights, attention), RopeRows.of(tables, ops), frozenset(), SIZES, scales)


def sequences(engine: Engine) -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(0, engine.model.config.vocab_size, (n,), generator=draw).tolist() for n in LENGTHS]


def logits(directory: Path, ops: Ops, layout: Layout, int8_cache: bool) -> list[Tensor]:
    running = engine(directory, ops, layout, int8_cache)
    return list(running.logits(sequences(running)))


@pytest.mark.parametrize(("backend", "case"), [
    pytest.param(backend, case, id=f"{backend}-{case.model}{'-int8-cache' if case.int8_cache else ''}")
    for backend in BACKENDS
    for case in CASES
    if backend in ("reference", "native") or case.model in ("example-w4a8", "v32-w4a8")
])  # fmt: skip
def test_logits_are_those_of_one_process(models: Callable[[str], Path], backend: str, case: Case) -> None:
    directory, (make, dtype) = models(case.model), BACKENDS[backend]
    with torch.inference_mode():
        whole = logits(directory, make(dtype, ALONE), Layout(), case.int8_cache)
    assert [len(rows) for rows in whole] == list(LENGTHS)
    for numbers in case.layouts:
        layout = Layout(*numbers)

        def run(group: ThreadGroup, layout: Layout = layout) -> list[Tensor]:
            return logits(directory, make(dtype, group), layout, case.int8_cache)

        for got, wanted in zip(on_ranks(layout.ranks, run)[0], whole, strict=True):
            assert torch.equal(got, wanted), layout


def test_a_divided_layer_is_one_native_call_up_to_its_last_product(models: Callable[[str], Path]) -> None:
    def run(group: ThreadGroup) -> Engine:
        return engine(models("example-w4a8"), native(torch.float32, group), Layout(2, 1, 2))

    models("example-w4a8")
    for running in on_ranks(2, run):
        for layer in running.model.weights.layers:
            assert isinstance(layer.attention, NativeMla) and not layer.attention.block.o


@pytest.mark.parametrize(("model", "numbers", "message"), [
    ("glm-flash", (8, 8, 8), "20 attention heads are not divisible by 8; with 8 ranks take one of tp=1, 2, 4"),
    ("example", (3, 1, 3), "4 attention heads are not divisible by 3; with 3 ranks take tp=1"),
])  # fmt: skip
def test_heads_that_ranks_do_not_divide_are_refused(
    models: Callable[[str], Path], model: str, numbers: tuple[int, int, int], message: str
) -> None:
    with Checkpoint.open(models(model)) as checkpoint:
        config = read_model_config(checkpoint)
    with pytest.raises(BackendError, match=message):
        Layout(*numbers).owned(config, 0)


@pytest.mark.parametrize(("model", "error"), [("v3", CheckpointError), ("v3-w4a8", ArtifactError)])
@pytest.mark.parametrize(
    "tensor", ["self_attn.o_proj.weight", "self_attn.kv_b_proj.weight", "self_attn.q_b_proj.weight"]
)
def test_shapes_are_checked_before_a_rank_takes_its_part(
    models: Callable[[str], Path], model: str, error: type[Exception], tensor: str
) -> None:
    """A weight of another shape is refused, also where this rank's own part of it would be there."""
    name = f"model.layers.1.{tensor}"
    with Checkpoint.open(models(model)) as checkpoint:
        config, store = read_model_config(checkpoint), open_store(checkpoint, torch.float32)
        rows, columns = checkpoint.tensors[name].shape
        object.__setattr__(checkpoint.tensors[name], "shape", (rows * 2, columns // 2))
        ops = ReferenceOps(torch.float32)
        owned = Layout(2, 1, 2).owned(config, 0)
        attention = attention_of(config, 1.0, len(owned.heads))
        with pytest.raises(error, match=f"{tensor}.* is .*\\[{rows * 2}, {columns // 2}\\]"):
            load_weights(store, config, ops, attention, owned=owned)
