"""Codes in every form that other tools store them in, read row by row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from npuq.errors import CheckpointError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.schemes import Scheme
from npuq.formats.sources.stored_linear import Codes, StoredLinear

NAME = "a.weight"


def pack(codes: np.ndarray, form: Codes) -> torch.Tensor:
    if form is Codes.INT4_OUTPUTS:
        nibbles = codes & 15
        return torch.from_numpy((nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8)).view(torch.int8)
    if form is Codes.INT4_INPUTS:
        words = ((codes + 8).reshape(len(codes), -1, 8) << np.arange(0, 32, 4)).sum(2)
        return torch.from_numpy(words.astype(np.uint32)).view(torch.int32)
    return torch.from_numpy(codes.astype(np.int8))


def open_linear(folder: Path, codes: np.ndarray, scale: np.ndarray, form: Codes) -> StoredLinear:
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    tensors = {NAME: pack(codes, form), "a.weight_scale": torch.from_numpy(scale)}
    save_file(tensors, folder / "model.safetensors")
    scheme = Scheme.W8A8 if form is Codes.INT8 else Scheme.W4A8
    names = {"weight": NAME, "weight_scale": "a.weight_scale"}
    return StoredLinear(Checkpoint.open(folder), NAME, scheme, (codes.shape[0], codes.shape[1]), form, names)


@given(st.sampled_from(Codes), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1), st.data())
def test_any_rows_of_any_form(tmp_path_factory, form, pairs, words, seed, data):
    rng = np.random.default_rng(seed)
    rows, columns, limit = 2 * pairs, 16 * words, 128 if form is Codes.INT8 else 8
    codes = rng.integers(-limit, limit, (rows, columns))
    scale = rng.uniform(0.001, 1, (rows, 1)).astype(np.float32)
    linear = open_linear(tmp_path_factory.mktemp("stored"), codes, scale, form)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    expected = codes.astype(np.float32) * scale
    np.testing.assert_array_equal(linear.rows(start, stop).to_float32().numpy(), expected[start:stop])
    np.testing.assert_array_equal(linear.rows().to_float32().numpy(), expected)
    cut = 2 * data.draw(st.integers(0, pairs))
    whole = linear.quantized_rows(0, rows, row_parallel=True)
    parts = [linear.quantized_rows(*ends, row_parallel=True) for ends in ((0, cut), (cut, rows)) if ends[0] < ends[1]]
    for suffix, tensor in whole.tensors.items():
        assert torch.equal(torch.cat([part.tensors[suffix] for part in parts]), tensor)
    np.testing.assert_allclose(whole.squared_norm.numpy(), (expected.astype(np.float64) ** 2).sum(1), rtol=1e-6)
    assert not whole.squared_error.any()
    if form is not Codes.INT8:
        slices = codes.reshape(rows, 16, -1).sum(2)
        np.testing.assert_array_equal(whole.tensors["scale_bias"].numpy(), (8 * slices).astype(np.float32) * scale)
        np.testing.assert_array_equal(whole.tensors["weight"].numpy(), pack(codes, Codes.INT4_OUTPUTS).numpy())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none(tmp_path, bad):
    scale = np.array([[1.0], [bad]], np.float32)
    linear = open_linear(tmp_path, np.ones((2, 16), np.int64), scale, Codes.INT8)
    with pytest.raises(CheckpointError, match=r"'a\.weight_scale' holds a scale that is not a positive number"):
        linear.rows().to_float32()
    assert linear.rows(0, 1).to_float32().shape == (1, 16)
