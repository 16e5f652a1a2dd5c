"""Rewriting of a DeepSeek checkpoint with the channel outliers of large models, and the same logits.

    python benchmarks/quality/make_outliers.py SOURCE OUT [--seed 0] [--spread 0.9] [--outliers 0.02]
        [--outlier-power 4]

Scale moves between tensors with nothing nonlinear between them: a norm's gain and the linears behind it (the router
too), the v rows of kv_b and o, up_proj and down_proj of every MLP. Every factor is a power of two, drawn log-normally
with a few large ones. So products and sums are exactly the same in any binary float arithmetic: logits are equal to the
bit. Quantization sees activations with channels 16 times the rest and weights whose columns
differ as much. The output is stored in the model's float type; FP8 sources are dequantized. Rows are streamed: memory
does not grow with the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from npuq.convert.finish.side_files import side_files
from npuq.dtypes import ITEM_BYTES
from npuq.errors import CheckpointError, NpuqError
from npuq.formats.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint
from npuq.formats.safetensors import encode_header
from npuq.formats.sources.opening import open_weights
from npuq.formats.sources.weights import WeightSource
from npuq.models.config import ModelConfig

_SHARD_BYTES = 4 << 30
_CHUNK_BYTES = 64 << 20
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)\.weight")


@dataclass(frozen=True)
class Draw:
    """The distribution of a channel's factor 2^n: n is normal with standard deviation `spread`, rounded; a share
    `outliers` of the channels gets `outlier_power` more."""

    seed: int
    spread: float = 0.9
    outliers: float = 0.02
    outlier_power: int = 4

    def factors(self, place: str, size: int) -> Tensor:
        """Factors of one place in the model, float32 `[size]`: the same for every tensor that meets there."""
        digest = hashlib.sha256(f"{self.seed}:{place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        powers = (torch.randn(size, generator=generator) * self.spread).round()
        chosen = torch.rand(size, generator=generator) < self.outliers
        return torch.exp2(powers + chosen * self.outlier_power)


@dataclass(frozen=True)
class Rewrite:
    """Factors of a tensor's rows `[R]` and columns `[K]`; None for 1."""

    rows: Tensor | None = None
    columns: Tensor | None = None


def rewrite_of(name: str, config: ModelConfig, draw: Draw) -> Rewrite:
    """Factors of a tensor by its place in DeepSeek's layer (main and multi-token-prediction layers alike)."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return Rewrite()
    layer, place = match.groups()
    hidden, lora, heads = config.hidden_size, config.attention.kv_lora_rank, config.attention.heads

    def factors(what: str, size: int) -> Tensor:
        return draw.factors(layer + what, size)

    if place == "input_layernorm":
        return Rewrite(rows=factors("attention_in", hidden))
    if place in ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"):
        return Rewrite(columns=1 / factors("attention_in", hidden))
    if place == "self_attn.q_a_layernorm" and config.attention.q_lora_rank is not None:
        return Rewrite(rows=factors("q_lora", config.attention.q_lora_rank))
    if place == "self_attn.q_b_proj" and config.attention.q_lora_rank is not None:
        return Rewrite(columns=1 / factors("q_lora", config.attention.q_lora_rank))
    if place == "self_attn.kv_a_layernorm":
        return Rewrite(rows=factors("kv_lora", lora))
    if place == "self_attn.kv_b_proj":
        value = factors("value", heads * config.attention.v_head_dim).view(heads, config.attention.v_head_dim)
        rows = torch.cat([torch.ones(heads, config.attention.qk_nope_head_dim), value], dim=1).flatten()
        return Rewrite(rows, 1 / factors("kv_lora", lora))
    if place == "self_attn.o_proj":
        return Rewrite(columns=1 / factors("value", heads * config.attention.v_head_dim))
    if place == "post_attention_layernorm":
        return Rewrite(rows=factors("mlp_in", hidden))
    if place == "mlp.gate" or place.endswith("gate_proj"):
        return Rewrite(columns=1 / factors("mlp_in", hidden))
    if place.endswith(("up_proj", "down_proj")):
        mlp, _, projection = place.rpartition(".")
        width = config.intermediate_size
        if mlp != "mlp":
            assert config.moe is not None
            shared = mlp == "mlp.shared_experts"
            width = config.moe.shared_intermediate_size if shared else config.moe.moe_intermediate_size
        middle = factors(f"{mlp}.up", width)
        if projection == "down_proj":
            return Rewrite(columns=1 / middle)
        return Rewrite(middle, 1 / factors("mlp_in", hidden))
    return Rewrite()


def rescaled(source: WeightSource, name: str, rewrite: Rewrite) -> Iterator[Tensor]:
    """Rescale a tensor in its float type, some rows at a time. Raises CheckpointError beyond the type's range."""
    shape = source.weights[name].shape
    if not shape:
        yield source.checkpoint.read(name)
        return
    row_bytes = 4 * torch.Size(shape[1:]).numel()
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        stop = min(shape[0], start + step)
        rows = source.rows_float(name, start, stop)
        scaled = rows.double()
        if rewrite.rows is not None:
            scaled *= rewrite.rows[start:stop].double().view(-1, *[1] * (len(shape) - 1))
        if rewrite.columns is not None:
            scaled *= rewrite.columns.double()
        result = scaled.to(rows.dtype)
        if not torch.equal(result.double(), scaled):
            raise CheckpointError(f"{name}: rescaled weights do not fit {rows.dtype}; use a smaller spread")
        yield result


def make_outliers(source_directory: Path, output: Path, draw: Draw) -> None:
    """Write the rewritten checkpoint into a new directory. Raises CheckpointError for a model of another family."""
    output.mkdir(parents=True)
    with Checkpoint.open(source_directory) as checkpoint:
        source = open_weights(checkpoint)
        config = ModelConfig.from_dict(checkpoint.config)
        weight_map: dict[str, str] = {}
        shards = list(_shards(source))
        progress = tqdm(total=len(source.weights), unit=" tensors", file=sys.stderr)
        for number, names in enumerate(shards, start=1):
            file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            entries = [(name, source.weights[name].float_code, source.weights[name].shape) for name in names]
            with (output / file_name).open("wb") as file:
                file.write(encode_header(entries, {"format": "pt"}))
                for name in names:
                    for rows in rescaled(source, name, rewrite_of(name, config, draw)):
                        file.write(rows.contiguous().view(torch.uint8).numpy().data)
                    progress.update()
            weight_map |= dict.fromkeys(names, file_name)
        progress.close()
        settings = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (output / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name in side_files(source_directory):
        shutil.copyfile(source_directory / name, output / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (output / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(source: WeightSource) -> Iterator[list[str]]:
    """Split names, in checkpoint order, into shards of at most _SHARD_BYTES, or of one larger tensor."""
    names: list[str] = []
    size = 0
    for name, weight in source.weights.items():
        nbytes = torch.Size(weight.shape).numel() * ITEM_BYTES[source.weights[name].float_code]
        if names and size + nbytes > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--spread", type=float, default=1.0, help="standard deviation of the factors' base-2 logarithms"
    )
    parser.add_argument("--outliers", type=float, default=0.02, help="share of channels that are outliers")
    parser.add_argument("--outlier-power", type=int, default=4, help="base-2 logarithm of an outlier's factor")
    arguments = parser.parse_args()
    draw = Draw(arguments.seed, arguments.spread, arguments.outliers, arguments.outlier_power)
    try:
        make_outliers(arguments.source, arguments.output, draw)
    except FileExistsError:
        raise SystemExit(f"{arguments.output}: exists already; give a new directory") from None
    except NpuqError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
