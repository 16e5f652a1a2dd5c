"""Timing of a peer's quantizer in the peer's own environment, for convert_peers.py.

    python peers/quantizers.py llmcompressor|msmodelslim METHOD INPUT.safetensors OUTPUT.safetensors THREADS SECONDS

INPUT holds bf16 matrices [N, K]; OUTPUT gets NAME.codes int8 and NAME.scale float32 [N, 1]. Prints the seconds of a
pass from matrices to codes and scales, both in memory, over all matrices but the first, which only warms up. Passes
repeat until SECONDS have gone by, at least one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def llmcompressor(method: str) -> Quantizer:
    """Quantize to symmetric int4 per channel as its recipes do: scale by an observer, codes by compressed-tensors."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from llmcompressor.observers import Observer

    observer = {"mse": "memoryless_mse", "minmax": "memoryless_minmax"}[method]

    def run(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel", observer=observer)
        found = Observer.load_from_registry(observer, base_name="weight", args=args)(weight).get_qparams()
        codes = quantize(weight, found["scale"], found["zero_point"], args, dtype=torch.int8)
        return codes, found["scale"]

    return run


def msmodelslim(method: str) -> Quantizer:
    """Quantize to int4 per channel by "ssz", the iterative search of its W4A8 recipes, or by "minmax"."""
    from msmodelslim.core.quantizer.base import AutoWeightQuantizer, QConfig
    from msmodelslim.ir.qal import QDType, QStorage

    config: dict[str, Any] = {"dtype": "int4", "scope": "per_channel", "symmetric": True}
    config["method"] = {"mse": "ssz", "minmax": "minmax"}[method]

    def run(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantizer = AutoWeightQuantizer.from_config(QConfig(**config))
        quantizer.init_weight(QStorage(dtype=QDType.FLOAT, value=weight))
        quantizer()
        codes, scale = quantizer.get_q_storage().value, quantizer.get_q_param().ext["scale"]
        return (codes if codes.shape == weight.shape else codes.T).to(torch.int8), scale.reshape(-1, 1)

    return run


def main() -> None:
    peer, method, source, target, threads, least = sys.argv[1:]
    torch.set_num_threads(int(threads))
    run = {"llmcompressor": llmcompressor, "msmodelslim": msmodelslim}[peer](method)
    first, *weights = sorted(load_file(source).items())
    result, passes = {}, 0
    with torch.no_grad():
        run(first[1])
        started = time.perf_counter()
        while not passes or time.perf_counter() - started < float(least):
            done = {name: run(weight) for name, weight in weights}
            passes += 1
        seconds = (time.perf_counter() - started) / passes
    for name, (codes, scale) in done.items():
        result[name + ".codes"] = codes.contiguous()
        result[name + ".scale"] = scale.float().contiguous()
    save_file(result, target)
    print(seconds)


if __name__ == "__main__":
    main()
