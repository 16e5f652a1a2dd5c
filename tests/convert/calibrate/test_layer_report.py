"""What a calibrated walk keeps of each layer: read back to the bit, or refused."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch

from npuq.convert.calibrate.layer_report import Choice, LayerReport, Trials
from npuq.convert.calibrate.layers.kv_cache import LatentScale
from npuq.errors import ConversionError

REPORT = LayerReport(
    expert_tokens=(3, 0, 17),
    fallbacks={"1": "data-free"},
    output_error=0.1 + 0.2,
    linear_errors={"model.layers.1.mlp.gate.weight": 1 / 3},
    kv_cache=LatentScale(torch.tensor([0.1, 1e-4, 7.0]), 0.7),
    smoothing={"input_layernorm": 0.5},
    choice=Choice(True, Trials(0.1, 0.2)),
)


def test_a_report_is_read_back_to_the_bit():
    found = LayerReport.from_json(json.loads(json.dumps(REPORT.as_json())))
    assert torch.equal(found.kv_cache.scale, REPORT.kv_cache.scale)
    assert found.kv_cache.scale.dtype is torch.float32
    assert found.as_json() == REPORT.as_json()
    assert (found.choice, found.expert_tokens, found.linear_errors) == (
        REPORT.choice,
        REPORT.expert_tokens,
        REPORT.linear_errors,
    )


def test_the_manifest_has_neither_scales_nor_linears_of_a_layer():
    assert REPORT.manifest_entry() == {
        "smooth": True,
        "trials": {"smooth": 0.1, "not": 0.2},
        "expert_tokens": [3, 0, 17],
        "fallbacks": {"1": "data-free"},
        "output_error": 0.1 + 0.2,
        "kv_cache_error": 0.7,
        "smoothing": {"input_layernorm": 0.5},
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("expert_tokens", "fallbacks", "output_error", "linear_errors", "kv_cache_error")),
        ("expert_tokens", [1.5]),
        ("fallbacks", {"1": 1}),
        ("linear_errors", {"name": "0.1"}),
        ("kv_cache_scale", [1]),
        ("kv_cache_scale", [-0.5]),
        ("kv_cache_scale", "0.5"),
        ("smoothing", [0.5]),
        ("smooth", 1),
        ("trials", {"smooth": 0.1}),
    ],
)
def test_what_no_report_has_is_refused(key: str, value: Any):
    content = deepcopy(REPORT.as_json())
    content[key] = value
    with pytest.raises(ConversionError, match=key):
        LayerReport.from_json(content)


@pytest.mark.parametrize("key", ["expert_tokens", "linear_errors", "kv_cache_scale", "output_error"])
def test_what_a_report_lacks_is_named(key: str):
    content = REPORT.as_json()
    del content[key]
    with pytest.raises(ConversionError, match=key):
        LayerReport.from_json(content)
