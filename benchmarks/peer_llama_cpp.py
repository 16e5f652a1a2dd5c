"""llama.cpp on a model of the same shape and random weights: the CPU peer that benchmarks/runtime.py runs.

    pip install llama-cpp-python gguf        in an environment of its own; builds from source, ten minutes on two cores
    python benchmarks/peer_llama_cpp.py [MODEL.gguf] [--threads 2]

Writes the model once (2.6 GB: Q4_0 routed experts, Q8_0 elsewhere, float32 norms and router), then prints tokens/s of
prefill and decode as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, HEADS, LAYERS, VOCABULARY = 2048, 16, 8, 32768
Q_LORA, KV_LORA, NOPE, ROPE, VALUE = 1536, 512, 128, 64, 128
DENSE, EXPERTS, EXPERT, SHARED, TOP_K = 8192, 64, 1408, 2, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent / "build" / "random-small-v3.gguf"
    parser.add_argument("model", nargs="?", type=Path, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=40, help="decode steps that are timed")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, of all threads together")
    options = parser.parse_args()
    if not options.model.exists():
        options.model.parent.mkdir(parents=True, exist_ok=True)
        write_model(options.model)
    clock = time.process_time if options.cpu_time else time.perf_counter
    prefill, decode = measure(options.model, options.threads, options.prompt, options.tokens, clock)
    print(json.dumps({"threads": options.threads, "prefill": prefill, "decode": decode}))


def write_model(path: Path) -> None:
    """Write a deepseek2 GGUF of random blocks, with small scales so that no activation overflows."""
    import gguf

    writer = gguf.GGUFWriter(path, "deepseek2")
    _write_settings(writer, gguf)
    generator = np.random.default_rng(0)
    pool = generator.integers(0, 256, 1 << 24, dtype=np.uint8)

    def add(name: str, shape: tuple[int, ...], kind: str) -> None:
        if kind == "F32":
            values = np.ones(shape) if "norm" in name else generator.standard_normal(shape) * 0.02
            writer.add_tensor(name, values.astype(np.float32))
            return
        code = gguf.GGMLQuantizationType[kind]
        block, nbytes = gguf.GGML_QUANT_SIZES[code]
        count = int(np.prod(shape)) // block
        blocks = np.resize(pool, count * nbytes).reshape(count, nbytes).copy()
        scale = np.float16(0.004 if kind == "Q4_0" else 0.0003)  # the first two bytes of a block
        blocks[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
        writer.add_tensor(name, blocks.reshape(*shape[:-1], shape[-1] // block * nbytes), raw_dtype=code)

    for name, shape, kind in _tensors():
        add(name if name.endswith(".bias") else f"{name}.weight", shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_settings(writer: Any, gguf: Any) -> None:
    settings = {
        "block_count": LAYERS,
        "context_length": 4096,
        "embedding_length": HIDDEN,
        "feed_forward_length": DENSE,
        "head_count": HEADS,
        "head_count_kv": 1,
        "rope_freq_base": 10000.0,
        "layer_norm_rms_eps": 1e-6,
        "vocab_size": VOCABULARY,
        "leading_dense_block_count": 1,
        "q_lora_rank": Q_LORA,
        "kv_lora_rank": KV_LORA,
        "key_length": KV_LORA + ROPE,
        "value_length": KV_LORA,
        "key_length_mla": NOPE + ROPE,
        "value_length_mla": VALUE,
        "rope_dimension_count": ROPE,
        "expert_count": EXPERTS,
        "expert_used_count": TOP_K,
        "expert_feed_forward_length": EXPERT,
        "expert_shared_count": SHARED,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
        "expert_group_count": 8,
        "expert_group_used_count": 4,
    }
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_string("tokenizer.ggml.model", "no_vocab")


def _tensors() -> list[tuple[str, tuple[int, ...], str]]:
    """Names without `.weight`, shapes and types, in llama.cpp's naming."""
    found: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd", (VOCABULARY, HIDDEN), "Q8_0"),
        ("output", (VOCABULARY, HIDDEN), "Q8_0"),
        ("output_norm", (HIDDEN,), "F32"),
    ]
    attention = [
        ("attn_norm", (HIDDEN,), "F32"),
        ("attn_q_a_norm", (Q_LORA,), "F32"),
        ("attn_kv_a_norm", (KV_LORA,), "F32"),
        ("ffn_norm", (HIDDEN,), "F32"),
        ("attn_q_a", (Q_LORA, HIDDEN), "Q8_0"),
        ("attn_q_b", (HEADS * (NOPE + ROPE), Q_LORA), "Q8_0"),
        ("attn_kv_a_mqa", (KV_LORA + ROPE, HIDDEN), "Q8_0"),
        ("attn_k_b", (HEADS, KV_LORA, NOPE), "Q8_0"),
        ("attn_v_b", (HEADS, VALUE, KV_LORA), "Q8_0"),
        ("attn_output", (HIDDEN, HEADS * VALUE), "Q8_0"),
    ]
    dense = [
        ("ffn_gate", (DENSE, HIDDEN), "Q8_0"),
        ("ffn_up", (DENSE, HIDDEN), "Q8_0"),
        ("ffn_down", (HIDDEN, DENSE), "Q8_0"),
    ]
    sparse = [
        ("ffn_gate_inp", (EXPERTS, HIDDEN), "F32"),
        ("exp_probs_b.bias", (EXPERTS,), "F32"),
        ("ffn_gate_exps", (EXPERTS, EXPERT, HIDDEN), "Q4_0"),
        ("ffn_up_exps", (EXPERTS, EXPERT, HIDDEN), "Q4_0"),
        ("ffn_down_exps", (EXPERTS, HIDDEN, EXPERT), "Q4_0"),
        ("ffn_gate_shexp", (SHARED * EXPERT, HIDDEN), "Q8_0"),
        ("ffn_up_shexp", (SHARED * EXPERT, HIDDEN), "Q8_0"),
        ("ffn_down_shexp", (HIDDEN, SHARED * EXPERT), "Q8_0"),
    ]
    for layer in range(LAYERS):
        block = attention + (dense if layer == 0 else sparse)
        found += [(f"blk.{layer}.{name}", shape, kind) for name, shape, kind in block]
    return found


def measure(path: Path, threads: int, prompt: int, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Measure tokens/s of a prompt in one batch and of decode (median step)."""
    import llama_cpp as llama

    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch = prompt + tokens + 16, prompt
    params.n_ubatch = min(prompt, 2048)  # the memory of a longer one would be gigabytes
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(model, params)
    generator = np.random.default_rng(0)

    def decode(count: int, position: int) -> float:
        batch = llama.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for index, token in enumerate(generator.integers(0, VOCABULARY, count).tolist()):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position + index, 1
            batch.seq_id[index][0], batch.logits[index] = 0, index == count - 1
        started = clock()
        if llama.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        llama.llama_synchronize(context)
        seconds = clock() - started
        llama.llama_batch_free(batch)
        return seconds

    warm = 8
    decode(warm, 0)
    prefill = (prompt - warm) / decode(prompt - warm, warm)
    steps = [decode(1, prompt + step) for step in range(tokens + 3)]
    return prefill, 1 / statistics.median(steps[3:])


if __name__ == "__main__":
    main()
