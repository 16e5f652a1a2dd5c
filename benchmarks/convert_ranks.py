"""Processor time of a calibrated conversion: two workers of one process, beside two ranks of one worker.

    python benchmarks/convert_ranks.py [--method gptq] [--layers 4] [--experts 16] [--samples 16] [--width 1]
                                       [--rounds 1]

The model is random, in DeepSeek-V3's form, with the example's tokenizer. Seconds are those of all processes together,
the least of all rounds; a dry run of each has the start of Python, torch and the ranks, which is subtracted. The ranks
are started by their variables, as srun does: torchrun's own process, which looks at them ten times a second, is not
counted. Both artifacts must be the same to the byte. A busy machine adds to these figures too, though far less than to
times of a clock.

--width multiplies every size of a linear. Ranks send each other rows of experts and hidden states, 4 bytes for each
value: a byte sent costs the same in any model, and the work behind it grows with the width.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import shutil
import socket
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
NARROW = {"num_experts_per_tok", "n_group", "topk_group", "num_nextn_predict_layers", "qk_rope_head_dim"}
"""Settings that are no sizes, and the one that models of any width share."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="npuq-") as name:
        folder = Path(name)
        source = folder / "model"
        wide = {name: size if name in NARROW else size * options.width for name, size in SHAPE.items()}
        make(source, wide | {"num_hidden_layers": options.layers, "n_routed_experts": options.experts})
        arguments = ["--method", options.method, "--samples", str(options.samples), "--sequence-length", "512"]
        found = []
        for kind, ranks, words in (("one", 1, "two workers of one process"), ("two", 2, "two ranks of one worker")):
            command = [
                "-m",
                "npuq",
                "convert",
                str(source),
                str(folder / kind),
                *arguments,
                "--workers",
                str(3 - ranks),
            ]
            start, whole = [], []
            for _ in range(options.rounds):
                shutil.rmtree(folder / kind, ignore_errors=True)
                start.append(processor_seconds([*command, "--dry-run"], ranks))
                whole.append(processor_seconds(command, ranks))
            found.append(min(whole) - min(start))
            print(f"{words:27} {found[-1]:7.1f} s, and {min(start):.1f} s to start", flush=True)
        print(f"ranks take {100 * (found[1] / found[0] - 1):+.1f} %")
        names = [path.name for path in (folder / "one").iterdir() if path.is_file()]
        _, other, missing = filecmp.cmpfiles(folder / "one", folder / "two", names, shallow=False)
    if other or missing:
        print(f"not the same bytes: {other + missing}")
    return 1 if other or missing else 0


def processor_seconds(command: list[str], ranks: int) -> float:
    """Seconds of a Python command on each of some ranks."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if ranks > 1:
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(subprocess.Popen([sys.executable, *command], env=env | place, stdout=subprocess.DEVNULL))
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit(f"failed: {' '.join(command)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make(directory: Path, settings: dict[str, Any]) -> None:
    """Write a checkpoint of random bf16 weights."""
    directory.mkdir()
    for path in EXAMPLE.glob("*token*"):
        shutil.copy(path, directory)
    config = json.loads((EXAMPLE / "config.json").read_text())
    config.pop("quantization_config", None)
    config |= settings | {"first_k_dense_replace": 1}
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
