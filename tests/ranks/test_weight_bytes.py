"""Planned bytes of weights against the tensors that each backend holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from held import held_bytes
from tiny import FAMILIES, make_source

import npuq
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.model_config import read_model_config
from npuq.formats.sources.opening import open_weights
from npuq.runtime.attention.kinds import attention_of
from npuq.runtime.memory.stored import StoredModel, stored_model
from npuq.runtime.memory.weights import KINDS, Bytes, CpuMemory, weight_bytes
from npuq.runtime.ops import Ops
from npuq.runtime.ops.cpu import CpuOps
from npuq.runtime.ops.native import NativeOps
from npuq.runtime.ranks.group import Alone
from npuq.runtime.ranks.layout import Layout
from npuq.runtime.step import RopeRows
from npuq.runtime.store import open_store
from npuq.runtime.weights import load_rope_tables, load_weights

ALONE = Layout()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, example_fp8: Path) -> dict[str, Path]:
    """A bfloat16 checkpoint of each family, "-w4a8" and "-w8a8" artifacts of some, and the shipped FP8 checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    made = {"example": example_fp8}
    for family in FAMILIES:
        make_source(folder / family, family)
        made[family] = folder / family
        recipe = "w8a8" if family == "v3" else "w4a8"
        npuq.convert_checkpoint(made[family], folder / f"{family}-{recipe}", recipe=recipe, method="minmax")
        made[f"{family}-artifact"] = folder / f"{family}-{recipe}"
    return made


class Place(Alone):
    """A place in a group whose other ranks are not there: loading needs none of them."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


def loaded(directory: Path, ops: Ops, layout: Layout = ALONE) -> tuple[StoredModel, tuple[int, int]]:
    """The model as it is stored, and the bytes mapped and copied once the rank of `ops` has loaded its part."""
    with Checkpoint.open(directory) as checkpoint:
        config = read_model_config(checkpoint)
        model = stored_model(config, open_weights(checkpoint).weights)
        tables = load_rope_tables(checkpoint, config)
        owned = layout.owned(config, ops.group.rank)
        weights = load_weights(
            open_store(checkpoint, ops.dtype), config, ops, attention_of(config, 1.0, len(owned.heads)), owned=owned
        )
        files = checkpoint.files
    # On the CPU nothing reads scale_bias.
    return model, held_bytes((weights, RopeRows.of(tables, ops)), files, unread=("scale_bias",))


@pytest.mark.parametrize("name", ["example", *FAMILIES, *(f"{family}-artifact" for family in FAMILIES)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [NativeOps, CpuOps], ids=["native", "torch"])
def test_the_cpu_holds_what_is_planned(name: str, dtype: torch.dtype, make: type[Ops], models: dict[str, Path]) -> None:
    model, held = loaded(models[name], make(dtype))
    planned = weight_bytes(model, ALONE.owned(model.config, 0), CpuMemory(dtype))
    assert set(planned) == set(KINDS)
    assert total(planned) == held


@pytest.mark.parametrize(
    "name", ["example", "v2-lite-artifact", "v3", "v3-artifact", "kimi-k2-artifact", "v32-artifact"]
)
@pytest.mark.parametrize("layout", [Layout(2, 2, 1), Layout(4, 4, 4), Layout(2, 1, 2)], ids=str)
def test_every_rank_holds_what_is_planned(name: str, layout: Layout, models: dict[str, Path]) -> None:
    for rank in range(layout.ranks):
        model, held = loaded(models[name], NativeOps(group=Place(rank, layout.ranks)), layout)
        planned = weight_bytes(model, layout.owned(model.config, rank), CpuMemory())
        assert total(planned) == held


def total(planned: dict[str, Bytes]) -> Bytes:
    return Bytes(sum(held.mapped for held in planned.values()), sum(held.copied for held in planned.values()))
