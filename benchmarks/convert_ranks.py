"""Processor time of a calibrated conversion: two workers of one process, beside two ranks of one worker.

    python benchmarks/convert_ranks.py [--method gptq] [--layers 4] [--experts 16] [--samples 16]

The model is random, in DeepSeek-V3's form, with the example's tokenizer. Seconds are those of all processes together;
a dry run of each has the start of Python, torch and the ranks, which is subtracted. Both artifacts must be the same to
the byte. Other work on the machine hardly changes these figures, unlike times of a clock.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from npuq.models.config import ModelConfig
from npuq.models.tensors import ModelTensors

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-deepseek-v3-fp8"
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "num_nextn_predict_layers": 0,
}
NPUQ = ["-m", "npuq", "convert"]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="npuq-") as name:
        folder = Path(name)
        source = folder / "model"
        make(source, {"num_hidden_layers": options.layers, "n_routed_experts": options.experts})
        arguments = ["--method", options.method, "--samples", str(options.samples), "--sequence-length", "512"]
        found = []
        for kind, launch, workers in (("one", [], 2), ("two", LAUNCH, 1)):
            command = [*launch, *NPUQ, str(source), str(folder / kind), *arguments, "--workers", str(workers)]
            start = processor_seconds([*command, "--dry-run"])
            found.append(processor_seconds(command) - start)
            words = "two workers of one process" if kind == "one" else "two ranks of one worker"
            print(f"{words:27} {found[-1]:7.1f} s, and {start:.1f} s to start", flush=True)
        print(f"ranks take {100 * (found[1] / found[0] - 1):+.1f} %")
        names = [path.name for path in (folder / "one").iterdir() if path.is_file()]
        _, other, missing = filecmp.cmpfiles(folder / "one", folder / "two", names, shallow=False)
    if other or missing:
        print(f"not the same bytes: {other + missing}")
    return 1 if other or missing else 0


def processor_seconds(command: list[str]) -> float:
    """Seconds of a Python command and all its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, env=env, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make(directory: Path, settings: dict[str, Any]) -> None:
    """Write a checkpoint of random bf16 weights."""
    directory.mkdir()
    for path in EXAMPLE.glob("*token*"):
        shutil.copy(path, directory)
    config = json.loads((EXAMPLE / "config.json").read_text())
    config.pop("quantization_config", None)
    config |= SHAPE | settings | {"first_k_dense_replace": 1}
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors = {}
    for spec in ModelTensors(ModelConfig.from_dict(config)).unroll(()):
        if "norm" in spec.name:
            tensor = torch.ones(spec.shape)
        elif spec.name.endswith("bias"):
            tensor = torch.zeros(spec.shape)
        else:
            tensor = torch.randn(spec.shape) * spec.shape[-1] ** -0.5
        tensors[spec.name] = tensor.bfloat16()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())
