"""llm-compressor's GPTQ on the three linears of one expert, for `benchmarks/calibrate.py`.

    python llm_compressor_expert.py EXPERT.pt FOUND.pt THREADS

EXPERT.pt: name → (weight float32 [N, K], inputs float32 [T, K]). Writes FOUND.pt, name → dequantized weight, and prints
one line of JSON. Its defaults: int4, one min-max scale a channel, symmetric, static activation order, damping of 0.01,
blocks of 128 columns. It has no Hessian for two linears together: gate and up have one each, as in the tool.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight


def main(expert: str, found: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    arguments = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="channel", actorder=ActivationOrdering.WEIGHT
    )
    tensors, results = torch.load(expert, weights_only=True), {}
    wall, cpu = time.perf_counter(), time.process_time()
    for name, (weight, inputs) in tensors.items():
        hessian = 2 / inputs.shape[0] * inputs.T @ inputs
        scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), arguments)
        rounded, _, _ = quantize_weight(weight[None].clone(), hessian[None], scale[None], zero[None], None, arguments)
        results[name] = rounded[0]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    torch.save(results, found)
    print(json.dumps({"version": version("llmcompressor"), "cpu_s": cpu, "wall_s": wall, "threads": int(threads)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
