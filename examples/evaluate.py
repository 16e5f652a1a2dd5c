"""Measure what quantization costs: perplexity, divergence from the float model, and the layer where it comes from.

python examples/evaluate.py build/careful examples/tiny-deepseek-v3-fp8 --text examples/eval.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import npuq
from npuq.runtime import layer_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("source", help="the float checkpoint that it was converted from")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text that nothing was calibrated on")
    parser.add_argument("--characters", type=int, default=20_000, help="take the beginning of the text")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")[: options.characters]

    result = npuq.evaluate(options.artifact, text, options.source, context=256)
    print(f"{result.tokens} tokens: perplexity {result.perplexity:.3f}, of the source {result.source_perplexity:.3f}")
    print(f"KL divergence {result.kl_divergence:.5f} nats a token, top-1 agreement {result.top1_agreement:.2%}")

    # One layer of each model is in memory at a time. `own_…` is the error of a layer alone.
    for layer in layer_errors(options.artifact, text[:4000], options.source, context=256):
        print(f"layer {layer.layer}: {layer.relative_error:.3%} so far, {layer.own_relative_error:.3%} its own")


if __name__ == "__main__":
    main()
