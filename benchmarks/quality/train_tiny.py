"""Trains a small model with grouped-query attention, with the structure that random weights lack.

    python benchmarks/quality/train_tiny.py OUTPUT --family qwen3_moe --text TEXT
        --tokenizer examples/tiny-deepseek-v3-fp8

For `quality.py`: errors of random weights show little. A transformers model of 4 layers (256 channels, 16 experts of
which 4) learns the text for some minutes on one core and is saved in bfloat16 with the tokenizer. Experts are balanced
as in training of the real models: Qwen3-MoE by an auxiliary loss, GLM-4.5 by its correction bias.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

_COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 16,
            "norm_topk_prob": True,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.01,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
            "use_qk_norm": True,
            "num_mtp_layers": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
        },
    ),
}
# The step of DeepSeek-V3's correction bias (arXiv:2408.15664).
_BALANCE = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a checkpoint that has one")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=4, help="of each step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    text = arguments.text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    model = new_model(arguments.family, tokenizer.get_vocab_size())
    train(model, tokens, arguments)
    save(model, arguments.output, arguments.tokenizer)


def new_model(family: str, vocabulary: int) -> Any:
    import transformers

    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**_COMMON, **settings, vocab_size=vocabulary)
    return getattr(transformers, f"{name}ForCausalLM")(config).float().train()


def train(model: Any, tokens: Tensor, arguments: argparse.Namespace) -> None:
    """Learn samples that begin anywhere in the text, each led by the beginning-of-sequence token."""
    steps, length = arguments.steps, arguments.length
    if tokens.numel() < length:
        sys.exit(f"{arguments.text}: {tokens.numel()} tokens are less than a sample of {length}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
    )
    chosen = _watch_routers(model)
    start = torch.full((arguments.samples, 1), model.config.bos_token_id)
    began = time.monotonic()
    for step in range(steps):
        first = torch.randint(tokens.numel() - length + 1, (arguments.samples,))
        rows = torch.stack([tokens[begin : begin + length - 1] for begin in first.tolist()])
        batch = torch.cat([start, rows], dim=1)
        result = model(input_ids=batch, labels=batch)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        _balance(chosen)
        if step % 25 == 24:
            print(
                f"step {step + 1}: loss {float(result.loss.detach()):.3f}, {time.monotonic() - began:.0f} s", flush=True
            )


def _watch_routers(model: Any) -> dict[Any, Tensor]:
    """The experts that each router with a correction bias chose last."""
    chosen: dict[Any, Tensor] = {}

    def watch(module: Any, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen[module] = outputs[2]

    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(watch)
    return chosen


def _balance(chosen: dict[Any, Tensor]) -> None:
    """Raise the bias of experts that got less than their share, lower the others'."""
    for module, experts in chosen.items():
        bias = module.e_score_correction_bias
        load = torch.bincount(experts.flatten(), minlength=bias.numel()).float()
        bias += _BALANCE * (load.mean() - load).sign()


def save(model: Any, output: Path, tokenizer: Path) -> None:
    """Save as published: bfloat16, the correction bias in float32, and the tokenizer's files."""
    model.save_pretrained(output)
    path = output / "model.safetensors"
    tensors = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(tokenizer / name, output / name)


if __name__ == "__main__":
    main()
