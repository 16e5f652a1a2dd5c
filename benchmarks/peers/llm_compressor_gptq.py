"""llm-compressor's GPTQ, run as its users run it: `oneshot` on the transformers model, saved in compressed-tensors.

    python llm_compressor_gptq.py SOURCE OUTPUT TOKENS.json

For an environment with llmcompressor and transformers. Routed experts: int4, one scale a channel, symmetric; the other
linears but kv_b, the router and the head: int8; activations: int8, dynamic, per token. Everything else is the tool's
default: bf16 weights, `moe_calibrate_all_experts` (every expert sees every token), min-max scales, static activation
order, damping of 0.01, blocks of 128 columns, sequential layer by layer. TOKENS.json holds the calibration samples.
transformers does not load multi-token-prediction layers, so OUTPUT has none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.conversion_mappings import get_linearize_load_mappings, set_save_conversion_mapping
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM

ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def group(targets: list[str], bits: int) -> dict[str, object]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return {"targets": targets, "weights": weights, "input_activations": ACTIVATIONS}


def main(source: str, output: str, tokens: str) -> None:
    samples = json.loads(Path(tokens).read_text())
    dataset = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(sample) for sample in samples]})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    # load_quantizable_moe() does both in one step, but patches classes by listing every module of transformers, some of
    # which fail to import where torchvision is not installed.
    linearize_moe(model)
    set_save_conversion_mapping(model, get_linearize_load_mappings(model.config.model_type)[2])
    experts = [r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"]
    others = [
        r"re:.*self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)$",
        r"re:.*mlp\.(shared_experts\.)?(gate|up|down)_proj$",
    ]
    recipe = GPTQModifier(config_groups={"experts": group(experts, 4), "others": group(others, 8)})
    oneshot(
        model=model,
        tokenizer=source,
        dataset=dataset,
        recipe=recipe,
        num_calibration_samples=len(samples),
        max_seq_length=len(samples[0]),
        shuffle_calibration_samples=False,
        batch_size=16,
        output_dir=output,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
