"""The two models that a walk computes are the runtime's: what it says a layer loses is what the runtime measures."""

from __future__ import annotations

import json

import pytest
import torch
from calibrated import add_tokenizer, text

from npuq.convert import CalibrationText, convert_checkpoint
from npuq.runtime.evaluation.layer_error import layer_errors
from npuq.verification import verify

CASES = {
    "v3": {},
    "kimi": {"family": "kimi"},
    "v2, no q_lora, softmax": {"family": "v2lite"},
    "v2, groups, scaled": {
        "family": "v2lite",
        "config": {"topk_method": "group_limited_greedy", "n_group": 2, "routed_scaling_factor": 2.5},
    },
    "no dense layers": {"config": {"first_k_dense_replace": 0}},
    # The checkpoint has (empty) tensors of the name all the same; they are copied.
    "no shared experts": {"config": {"n_shared_experts": 0}},
    "float16": {"dtype": torch.float16},
    "fp8": {"fp8_block": 16},
}


@pytest.mark.parametrize("method", ["gptq", "rotate+smooth+gptq"])
@pytest.mark.parametrize("case", list(CASES))
def test_a_layer_loses_what_the_runtime_measures(case, method, write, tmp_path):
    options = dict(CASES[case])
    # The runtime keeps rope keys in blocks of 16 channels.
    options["config"] = {"qk_rope_head_dim": 16} | options.get("config", {})
    directory = write(tmp_path / "source", **options)
    add_tokenizer(directory)
    file = tmp_path / "text.txt"
    file.write_text(text(120))
    convert_checkpoint(directory, tmp_path / "out", method=method, calibration=CalibrationText(file, 8, 16))
    assert verify(tmp_path / "out", directory).problems == ()
    layers = json.loads((tmp_path / "out" / "npuq" / "manifest.json").read_text())["calibration"]["layers"]
    measured = layer_errors(tmp_path / "out", file.read_text(), directory, context=16, backend="reference")
    # The windows are cut a little differently, and a token that is routed elsewhere counts for much among so few.
    for layer, error in zip(layers.values(), measured, strict=True):
        assert layer["output_error"] == pytest.approx(error.relative_error, rel=0.5)
