"""llama.cpp on a model of the same shape and random weights: the CPU peer that benchmarks/runtime.py runs.

    pip install llama-cpp-python gguf        in an environment of its own; builds from source, ten minutes on two cores
    python benchmarks/peers/llama_cpp_runtime.py [MODEL.gguf] [--shape qwen3] [--threads 2]

Writes the model once (2.6 or 2.2 GB: Q4_0 routed experts, Q8_0 elsewhere, float32 norms and router), then prints
tokens/s of prefill and decode as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf_shapes import SHAPES, VOCABULARY, Shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="default: build/random-small-SHAPE.gguf")
    parser.add_argument("--shape", choices=SHAPES, default="v3")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape's")
    parser.add_argument("--head", choices=("Q8_0", "BF16"), default="Q8_0", help="type of the output matrix")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=40, help="decode steps that are timed")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, of all threads together")
    parser.add_argument("--write-text", action="store_true", help="only write the model, with tokens that have texts")
    options = parser.parse_args()
    build = Path(__file__).resolve().parents[2] / "build"
    shape = SHAPES[options.shape]
    if options.layers:
        shape = replace(shape, layers=options.layers, settings={**shape.settings, "block_count": options.layers})
    shape = replace(shape, head=options.head)
    suffix = "-bf16-head" if options.head == "BF16" else ""
    parts = ["random-small", options.shape, *_number(options.layers)]
    model = options.model or build / f"{'-'.join(parts)}{suffix}.gguf"
    if not model.exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        write_model(model, shape, with_texts=options.write_text)
    if options.write_text:
        return
    clock = time.process_time if options.cpu_time else time.perf_counter
    prefill, decode = measure(model, options.threads, options.prompt, options.tokens, clock)
    print(json.dumps({"threads": options.threads, "prefill": prefill, "decode": decode}))


def _number(layers: int | None) -> list[str]:
    return [str(layers)] if layers else []


def write_model(path: Path, model: Shape, *, with_texts: bool = False) -> None:
    """Write a GGUF of random blocks, with small scales so that no activation overflows.

    with_texts: its tokens are the characters of GPT-2's alphabet of bytes, in order, then t256, t257, … (serve.py).
    """
    import gguf

    writer = gguf.GGUFWriter(path, model.architecture)
    for name, value in model.settings.items():
        getattr(writer, f"add_{name}")(gguf.ExpertGatingFuncType(value) if name == "expert_gating_func" else value)
    if with_texts:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(_token_texts())
        writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
        writer.add_token_merges(["t 2"])  # llama.cpp wants one; its result is no token
        writer.add_add_bos_token(False)
    else:
        writer.add_string("tokenizer.ggml.model", "no_vocab")
    generator = np.random.default_rng(0)
    pool = generator.integers(0, 256, 1 << 24, dtype=np.uint8)

    def add(name: str, shape: tuple[int, ...], kind: str) -> None:
        if kind == "F32":
            values = np.ones(shape) if "norm" in name else generator.standard_normal(shape) * 0.02
            writer.add_tensor(name, values.astype(np.float32))
            return
        code = gguf.GGMLQuantizationType[kind]
        if kind == "BF16":
            values = (generator.standard_normal(shape) * 0.02).astype(np.float32)
            writer.add_tensor(name, (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), raw_dtype=code)
            return
        block, nbytes = gguf.GGML_QUANT_SIZES[code]
        count = int(np.prod(shape)) // block
        blocks = np.resize(pool, count * nbytes).reshape(count, nbytes).copy()
        scale = np.float16(0.004 if kind == "Q4_0" else 0.0003)  # the first two bytes of a block
        blocks[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
        writer.add_tensor(name, blocks.reshape(*shape[:-1], shape[-1] // block * nbytes), raw_dtype=code)

    for name, shape, kind in model.tensors():
        add(name if name.endswith(".bias") else f"{name}.weight", shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _token_texts() -> list[str]:
    """Texts of the tokens: GPT-2 writes bytes without a printable character as those from U+0100 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = sorted([chr(byte) for byte in printed] + [chr(256 + n) for n in range(256 - len(printed))])
    return alphabet + [f"t{n}" for n in range(256, VOCABULARY)]


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
