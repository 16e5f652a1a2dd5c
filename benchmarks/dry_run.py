"""Time and memory of `npuq convert --dry-run` and `npuq inspect` at the shapes of released models.

    python benchmarks/dry_run.py                          every release below
    python benchmarks/dry_run.py DeepSeek-V3 Kimi-K2 --as  the recognition of an unknown model_type too

Writes checkpoints with every tensor of a release, whose data are holes: some 30 MB on the disk. Each command runs in a
process of its own; peak memory is that process's, with torch's share (some 200 MB). Other work on the machine moves the
seconds, hardly those of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/checkpoints"))
import kimi_k25_full

from npuq.formats.safetensors import ITEM_BYTES, encode_header
from npuq.models.config import ModelConfig
from npuq.models.family import Block
from npuq.models.tensors import Spec, expected_specs

SHARD_BYTES = 4_300_000_000
FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    **MLA,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 129280,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0},
    "torch_dtype": "bfloat16",
}
KIMI: dict[str, Any] = V3 | {
    "model_type": "kimi_k2",
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "vocab_size": 163840,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": {"type": "yarn", "factor": 32, "original_max_position_embeddings": 4096, "mscale": 1.0},
}
GLM_FLASH: dict[str, Any] = V3 | {
    "model_type": "glm4_moe_lite",
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "vocab_size": 154880,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 202752,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
}
GLM_5: dict[str, Any] = GLM_FLASH | {
    "model_type": "glm_moe_dsa",
    "architectures": ["GlmMoeDsaForCausalLM"],
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 1048576,
    "index_n_heads": 32,
    "indexer_types": ["full" if layer < 3 or layer % 4 == 2 else "shared" for layer in range(78)],
}
V2_LITE: dict[str, Any] = V3 | {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "vocab_size": 102400,
}
RELEASES: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": V2_LITE,
    "DeepSeek-V3": V3 | FP8,
    "DeepSeek-V3.2": V3 | FP8 | {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]},
    "GLM-4.7-Flash": GLM_FLASH,
    "GLM-5.2-FP8": GLM_5 | FP8,
    "Kimi-K2": KIMI | FP8,
    "Kimi-K2.5": kimi_k25_full.CONFIG,
}
Tensor = tuple[str, str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"of {', '.join(RELEASES)}")
    parser.add_argument("--as", dest="unknown", action="store_true", help="also under an unknown model_type")
    parser.add_argument("--directory", type=Path, help="where the checkpoints are written")
    options = parser.parse_args()
    print(f"{'release':17} {'tensors':>8} {'bytes':>8}  {'command':16} {'seconds':>8} {'CPU':>6} {'peak memory':>12}")
    for release in options.releases or RELEASES:
        with tempfile.TemporaryDirectory(prefix="npuq-", dir=options.directory) as folder:
            source = Path(folder) / release
            tensors = write_release(source, RELEASES[release])
            nbytes = sum(ITEM_BYTES[dtype] * prod(shape) for _, dtype, shape in tensors)
            for command, result in measured(source, options.unknown):
                print(
                    f"{release:17} {len(tensors):8} {nbytes / 1e9:5.0f} GB  {command:16} {result.seconds:8.2f} "
                    f"{result.cpu_seconds:6.2f} {result.peak_bytes / 1e6:9.0f} MB",
                    flush=True,
                )


def write_release(directory: Path, config: dict[str, Any]) -> list[Tensor]:
    """Write config, index and shards of a release; returns its tensors."""
    directory.mkdir(parents=True)
    tensors = list(_tensors(config))
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += ITEM_BYTES[tensor[1]] * prod(tensor[2])
    placed = {}
    for number, part in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        header = encode_header(part)
        with (directory / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(ITEM_BYTES[dtype] * prod(shape) for _, dtype, shape in part))
        placed |= {tensor: name for tensor, _, _ in part}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return tensors


def _tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    if config is kimi_k25_full.CONFIG:
        yield from kimi_k25_full.headers()
        return
    model = ModelConfig.from_dict(config)
    # GLM-5's releases leave out what their MTP layer shares with the model.
    shared = config["model_type"] == "glm_moe_dsa"
    mtp = range(model.num_hidden_layers, model.num_hidden_layers + model.num_nextn_predict_layers)
    for name, spec in expected_specs(model, mtp).items():
        if shared and spec.optional:
            continue
        if "quantization_config" in config and _is_fp8(spec):
            yield name, "F8_E4M3", spec.shape
            yield f"{name}_scale_inv", "F32", (-(-spec.shape[0] // 128), -(-spec.shape[1] // 128))
        else:
            yield name, spec.kept_dtype or "BF16", spec.shape


def _is_fp8(spec: Spec) -> bool:
    """True for the weights that DeepSeek's FP8 releases store in FP8."""
    inside = (Block.ATTENTION, Block.DENSE, Block.SHARED, Block.EXPERT)
    return spec.block in inside and len(spec.shape) == 2 and not spec.name.endswith("weights_proj.weight")


@dataclass(frozen=True)
class Measured:
    """Wall and processor time, and peak memory of a process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measured(source: Path, unknown: bool) -> Iterator[tuple[str, Measured]]:
    """Run the commands on a checkpoint, and yield what each took."""
    output = source.parent / "output"
    yield "convert --dry-run", run("convert", source, output, "--dry-run", "--force")
    yield "inspect", run("inspect", source)
    if unknown:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"model_type": "unknown"}))
        yield "unknown", run("convert", source, output, "--dry-run", fails=True)


def run(*arguments: object, fails: bool = False) -> Measured:
    """Run the command line in a process of its own."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "npuq", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if (os.waitstatus_to_exitcode(status) != 0) != fails:
        raise SystemExit(said)
    return Measured(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    main()
