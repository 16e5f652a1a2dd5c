"""Calibrate with a text of yours: GPTQ behind smoothing, beside plain rounding of the same weights.

python examples/calibrate.py examples/tiny-deepseek-v3-fp8 build/calibrated --text examples/eval.txt --samples 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import npuq
from npuq.convert import CalibrationText


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output", help="two artifacts are made in it: mse and smooth+gptq")
    parser.add_argument("--text", default="builtin", help="a .txt or .jsonl file, a directory of them, or builtin")
    parser.add_argument("--samples", type=int, default=128, help="more samples reach more experts")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    options = parser.parse_args()

    # The walk keeps one expert in memory, continues after an interruption, and costs nothing at run time.
    text = CalibrationText(options.text, options.samples, options.length)
    for method in ("mse", "smooth+gptq"):
        calibration = text if "gptq" in method else None
        path = Path(options.output) / method
        npuq.convert_checkpoint(options.source, path, method=method, calibration=calibration)
        # The error of weights grows with GPTQ; what it lowers is the error of outputs, which a text shows.
        measured = npuq.evaluate(path, SHORT_TEXT, options.source, context=64)
        print(f"{method:12} KL to the source {measured.kl_divergence:.5f}, perplexity {measured.perplexity:.2f}")


SHORT_TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be "
    "light: and there was light. And God saw the light, that it was good: and God divided the light from the darkness. "
) * 2


if __name__ == "__main__":
    main()
