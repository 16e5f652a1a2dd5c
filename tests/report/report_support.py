"""What evaluation and calibration leave in a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]

# Layer 0 is dense; in layer 2 the router sent nothing to expert 3.
CALIBRATION: Manifest = {
    "name": "calibration.txt",
    "sha256": "ab" * 32,
    "samples": 8,
    "sequence_length": 128,
    "tokens": 1024,
    "layers": {
        "0": {
            "expert_tokens": [],
            "fallbacks": {},
            "output_error": 0.011,
            "kv_cache_error": 0.006,
            "smoothing": {"input_layernorm": 0.5},
        },
        "1": {"expert_tokens": [128] * 16, "fallbacks": {}, "output_error": 0.021},
        "2": {
            "expert_tokens": [100, 1000, 128, 0, *[68] * 12],
            "fallbacks": {"3": "data-free", "0": "blended"},
            "output_error": 0.031,
            "smoothing": {"input_layernorm": 0.25, "mlp.experts.down_proj": 0.0},
        },
        "10": {
            "expert_tokens": [9, *[136] * 15],
            "fallbacks": {"0": "blended"},
            "output_error": 0.041,
            "kv_cache_error": 0.007,
        },
    },
}
EVALUATION: Manifest = {
    "text": "wiki & <b>more</b>.txt",
    "text_sha256": "cd" * 32,
    "context": 256,
    "tokens": 1000,
    "perplexity": 66.5,
    "source_perplexity": 66.0,
    "kl_divergence": 0.00131,
    "top1_agreement": 0.977,
    "layers": [
        {"layer": 0, "relative_error": 0.01, "cosine": 0.999, "own_relative_error": 0.01, "own_cosine": 0.999},
        {"layer": 1, "relative_error": 0.03, "cosine": 0.99, "own_relative_error": 0.02, "own_cosine": 0.995},
    ],
}


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
