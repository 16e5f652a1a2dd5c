"""transformers in bfloat16 on a model of the same shape and random weights: a peer that benchmarks/runtime.py runs.

    python benchmarks/peers/transformers_runtime.py MODEL [--threads 2]

MODEL is a directory with the config.json. The routed experts of all layers share one layer's memory, which takes 3 GB
for 9. This does not speed up the peer: a layer's experts are far larger than any cache. Prints
tokens/s of prefill and decode as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=40, help="decode steps that are timed")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, of all threads together")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = json.loads((options.model / "config.json").read_text())
    clock = time.process_time if options.cpu_time else time.perf_counter
    prefill, decode = measure(random_model(settings), options.prompt, options.tokens, clock)
    print(json.dumps({"threads": options.threads, "prefill": prefill, "decode": decode}))


def random_model(settings: dict[str, object]) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV3Config(**settings)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    sparse = model.model.layers[config.first_k_dense_replace :]
    for layer in sparse[1:]:
        layer.mlp.experts = sparse[0].mlp.experts
    model = model.to_empty(device="cpu").eval()
    pool = torch.randn(1 << 22).mul_(0.02).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                flat = parameter.view(-1)
                for start in range(0, flat.numel(), pool.numel()):
                    part = flat[start : start + pool.numel()]
                    part.copy_(pool[: part.numel()])
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.zero_()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


@torch.inference_mode()
def measure(model: DeepseekV3ForCausalLM, prompt: int, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Measure tokens/s of a prompt and of decode (median step), after a short uncounted prompt."""
    vocabulary = model.config.vocab_size
    model(torch.randint(vocabulary, (1, 8)), use_cache=False)
    cache = DynamicCache(config=model.config)

    def run(count: int) -> float:
        ids = torch.randint(vocabulary, (1, count))
        started = clock()
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return clock() - started

    prefill = prompt / run(prompt)
    return prefill, 1 / statistics.median(run(1) for _ in range(tokens))


if __name__ == "__main__":
    main()
