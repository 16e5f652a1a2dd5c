"""Calibrated conversion of numbers that are none, or that become none on the way: refused, and named."""

from __future__ import annotations

import pytest
from calibrated import STATIC, add_tokenizer, convert

from npuq.errors import CalibrationError, CheckpointError, NpuqError


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_a_layernorm.weight",
        "model.layers.0.self_attn.q_b_proj.weight",
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.3.down_proj.weight",
        "model.layers.1.mlp.shared_experts.gate_proj.weight",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.hnorm.weight",
        "model.layers.3.mlp.experts.0.up_proj.weight",
    ],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_no_numbers_are_named(name, value, write, texts, tmp_path):
    directory = write(tmp_path / "source", edit=lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    add_tokenizer(directory)
    with pytest.raises(CheckpointError, match=f"'{name}' holds infinities or NaN"):
        convert(directory, tmp_path / "out", texts)


@pytest.mark.parametrize("method", ["smooth+mse", "smooth+gptq", "auto"])
def test_weights_that_outgrow_float32_are_refused(method, write, texts, tmp_path):
    """Finite as they are stored, infinite somewhere on the way."""
    for name in ("mlp.experts.0.up_proj", "mlp.experts.1.down_proj", "self_attn.q_b_proj", "post_attention_layernorm"):
        directory = write(
            tmp_path / f"source {name}",
            edit=lambda tensors, name=name: tensors[f"model.layers.1.{name}.weight"].fill_(3e38),
        )
        add_tokenizer(directory)
        with pytest.raises(NpuqError) as caught:
            convert(directory, tmp_path / f"out {name}", texts, method=method)
        assert str(caught.value).isprintable()


def test_static_scheme_of_inputs_that_are_no_numbers(write, texts, tmp_path):
    def damage(tensors):
        tensors["model.layers.0.input_layernorm.weight"].fill_(3e38)  # times anything above 1: no float32

    directory = write(tmp_path / "source", edit=damage)
    add_tokenizer(directory)
    (tmp_path / "static.yaml").write_text(STATIC)
    with pytest.raises(CalibrationError, match=r"inputs of 'model.layers.0.self_attn.q_a_proj.weight'"):
        convert(directory, tmp_path / "out", texts, recipe=tmp_path / "static.yaml", method=None)
