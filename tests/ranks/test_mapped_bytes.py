"""A rank has its own part of a model's files in memory, and nothing else of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny

import npuq
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.safetensors import TensorInfo

RANKS = 4
# Where a page is read, the kernel maps those around it that it has: 64 KB at each end of what is read.
AROUND = 128 << 10
# The page cache may hold pieces of this size, and the kernel maps such a piece whole.
HUGE = 2 << 20
NOISE = 32 << 20
DIVIDED_ROWS = ("q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
DIVIDED_COLUMNS = ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random W4A8 artifact whose tensors are large beside a page."""
    folder = tmp_path_factory.mktemp("wide")
    widths = {"hidden_size": 512, "vocab_size": 8192, "intermediate_size": 2048, "moe_intermediate_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 256}
    tiny.make_checkpoint(folder / "source", "v3", **widths, **heads, num_hidden_layers=2, num_nextn_predict_layers=0)
    npuq.convert_checkpoint(folder / "source", folder / "w4a8", recipe="w4a8", method="minmax", workers=1)
    return folder / "w4a8"


@pytest.fixture(scope="module")
def resident(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Bytes of the shards in each rank's memory, after loading and after a step that reads everything."""
    out = tmp_path_factory.mktemp("resident")
    job = [str(Path(__file__).parent / "mapping.py"), str(model), f"ep={RANKS},tp={RANKS}", str(out)]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), *job],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


def share(name: str, info: TensorInfo, rank: int, experts: int) -> int:
    """Bytes of a tensor that a rank maps. Columns of codes are copied; scales are checked as a whole."""
    module, kind = name.split(".")[-2:]
    nbytes = math.prod(info.shape) * info.torch_dtype.itemsize
    if ".experts." in name:
        expert = int(name.split(".experts.")[1].split(".")[0])
        return nbytes if expert // (experts // RANKS) == rank else 0
    if kind != "weight" or info.shape[0] < RANKS or len(info.shape) < 2:
        return nbytes
    if module in DIVIDED_COLUMNS:
        return 0
    return nbytes // RANKS if module in DIVIDED_ROWS else nbytes


def shares(tensors: Mapping[str, TensorInfo], rank: int) -> tuple[int, int]:
    """A rank's bytes, and those around its parts that the kernel may map beside them."""
    parts = [share(name, info, rank, 16) for name, info in tensors.items()]
    around = sum(2 * HUGE if part >= HUGE else AROUND // 4 for part in parts if part)
    return sum(parts), around


def test_each_rank_has_its_own_bytes_in_memory(model: Path, resident: list[dict[str, int]]) -> None:
    with Checkpoint.open(model) as checkpoint:
        tensors = checkpoint.tensors
    whole = sum(math.prod(info.shape) * info.torch_dtype.itemsize for info in tensors.values())
    for rank, found in enumerate(resident):
        wanted, around = shares(tensors, rank)
        assert 0.9 * wanted < found["ran"] < wanted + around, (rank, whole)
        assert found["ran"] < 0.45 * whole


def test_loading_reads_scales_alone(model: Path, resident: list[dict[str, int]]) -> None:
    with Checkpoint.open(model) as checkpoint:
        whole = sum(math.prod(info.shape) * info.torch_dtype.itemsize for info in checkpoint.tensors.values())
    assert all(found["loaded"] < 0.2 * whole for found in resident)


def test_a_rank_has_what_is_planned(resident: list[dict[str, Any]]) -> None:
    """Mapped bytes within what the kernel maps around them; of its own no more than a step was planned to take."""
    for found in resident:
        plan = found["planned"]
        assert plan["mapped"] * 0.9 < found["ran"] < plan["mapped"] * 1.6
        # Beside it: allocators, buffers of gloo, threads.
        assert found["own_loaded"] < plan["copied"] + NOISE
        assert found["own_most"] < plan["copied"] + plan["step"] + NOISE
