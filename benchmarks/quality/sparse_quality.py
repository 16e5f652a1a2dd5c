"""Quality of a sparse model's W4A8 artifact below and above the limit of the selection.

    python benchmarks/quality/sparse_quality.py SOURCE --text TEXT [--calibration TEXT] [--topk N] [--methods …]

SOURCE is a DeepSeek-V3 checkpoint without rotation of its own, such as `examples/tiny-deepseek-v3-fp8`. It becomes a
DeepSeek-V3.2 with a random indexer in every layer: its language gets worse where tokens are selected, but source and
artifact are compared with each other. A random indexer has no clear favourites, so that small errors change what it
selects more than a trained one's; the row `float`, with nothing quantized and weights rounded to bfloat16, shows how
much. Contexts of N tokens are dense, those of 2 N and 4 N select N tokens a query. `selected` is the share of the
source's selected tokens that the artifact selects, the lowest of all layers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HEADS, WIDTH = 16, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--topk", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=["float", "mse", "rotate+smooth+gptq"])
    arguments = parser.parse_args()
    print("| method | context | perplexity | source | KL | agreement | selected |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = write_sparse(arguments.source, Path(folder, "source"), arguments.topk)
        for method in arguments.methods:
            artifact = Path(folder, method)
            chosen = ["--recipe", "float"] if method == "float" else ["--method", method]
            if {"gptq", "smooth"} & {*method.split("+")}:
                chosen += ["--calibration", arguments.calibration]
            npuq("convert", source, artifact, *chosen, "--quiet")
            for context in (arguments.topk, 2 * arguments.topk, 4 * arguments.topk):
                print(f"| `{method}` | {context} | {row(artifact, source, arguments.text, context)} |", flush=True)


def row(artifact: Path, source: Path, text: str, context: int) -> str:
    """Evaluate the artifact against its source on contexts of that length."""
    result = json.loads(
        npuq("evaluate", artifact, "--source", source, "--text", text, "--context", context, "--layers", "--json")
    )
    agreements = [layer["own_selection_agreement"] for layer in result["layers"]]
    shares = [share for share in agreements if share is not None]
    selected = f"{min(shares):.2%}" if shares else ""
    return (
        f"{result['perplexity']:.3f} | {result['source_perplexity']:.3f} | {result['kl_divergence']:.6f} | "
        f"{result['top1_agreement']:.2%} | {selected}"
    )


def write_sparse(dense: Path, directory: Path, topk: int) -> Path:
    """Write a DeepSeek-V3 checkpoint as a DeepSeek-V3.2 with a random indexer in every layer."""
    shutil.copytree(dense, directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
        "index_n_heads": HEADS,
        "index_head_dim": WIDTH,
        "index_topk": topk,
    }
    (directory / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}.self_attn.indexer."
        shapes = {
            "wq_b": (HEADS * WIDTH, config["q_lora_rank"]),
            "wk": (WIDTH, config["hidden_size"]),
            "weights_proj": (HEADS, config["hidden_size"]),
        }
        for part, shape in shapes.items():
            values = torch.randn(shape, generator=random) * shape[1] ** -0.5
            tensors[f"{prefix}{part}.weight"] = values.to(torch.bfloat16)
        tensors[f"{prefix}k_norm.weight"] = torch.ones(WIDTH)
        tensors[f"{prefix}k_norm.bias"] = torch.zeros(WIDTH)
    save_file(tensors, directory / "indexers.safetensors")
    index = directory / "model.safetensors.index.json"
    listed: dict[str, Any] = json.loads(index.read_text())
    listed["weight_map"] |= dict.fromkeys(tensors, "indexers.safetensors")
    index.write_text(json.dumps(listed))
    return directory


def npuq(*arguments: object) -> str:
    """Run a command of npuq; its stdout."""
    command = [sys.executable, "-m", "npuq", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
