"""Rotation leaves the function of a model as it is: the same logits, through npuq's runtime and by hand for MTP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibrated import VOCABULARY, add_tokenizer

from npuq.convert import convert_checkpoint
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.opening import open_weights
from npuq.formats.sources.rewritten import rewritten
from npuq.formats.sources.rotated import rotated
from npuq.models.config import ModelConfig
from npuq.models.inventory import take_inventory
from npuq.quant.rotation import rotation
from npuq.runtime.evaluation.layer_error import layer_errors
from npuq.runtime.llm import load

# The runtime keeps rope keys in blocks of 16 channels.
RUNNABLE = {"qk_rope_head_dim": 16}


def gains(tensors):
    """Norms with gains of their own: those of a fresh model are all alike, and folding them would prove nothing."""
    generator = torch.Generator().manual_seed(9)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor[:] = torch.rand(tensor.shape, generator=generator) * 4 + 0.2


@pytest.fixture(params=["v3", "kimi", "v2lite", "glm"])
def source(request, write, tmp_path) -> Path:
    directory = write(tmp_path / "source", family=request.param, dtype=torch.float32, edit=gains, config=RUNNABLE)
    add_tokenizer(directory)
    return directory


def test_logits_before_and_after(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out", recipe="float", method="rotate")
    tokens = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(4)).tolist()
    before, after = (
        torch.cat(list(load(directory, "reference").logits(tokens))) for directory in (source, tmp_path / "out")
    )
    stored = Checkpoint.open(tmp_path / "out")
    assert torch.equal(stored.read("model.norm.weight"), torch.ones(64))
    assert not torch.equal(stored.read("lm_head.weight"), Checkpoint.open(source).read("lm_head.weight"))
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))


def test_layer_errors_compare_in_one_basis(source, tmp_path):
    """Without quantization the layers of a rotated model are those of its source, in the rotated basis."""
    convert_checkpoint(source, tmp_path / "out", recipe="float", method="rotate")
    text = " ".join(f"w{index % 90}" for index in range(60))
    for error in layer_errors(tmp_path / "out", text, source, context=16, backend="reference"):
        assert error.relative_error < 1e-4 and error.own_relative_error < 1e-4
        assert error.cosine > 0.99999


def normed(x, gain):
    return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * gain


def test_mtp_reads_the_rotated_stream_as_it_read_the_other(write, tmp_path):
    """eh_proj over enorm(embedding) and hnorm(final norm's output), as vLLM and SGLang run it, up to one positive
    factor a token on the second half (hnorm measures a vector that has lost the final norm's gain)."""
    directory = write(tmp_path / "source", dtype=torch.float32, edit=gains)
    checkpoint = Checkpoint.open(directory)
    config, plain = ModelConfig.from_dict(checkpoint.config), open_weights(checkpoint)
    inventory = take_inventory(config, plain.weights)
    turned = rewritten(plain, rotated(config, inventory))
    generator = torch.Generator().manual_seed(2)
    embedding, hidden = (torch.randn(5, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    q = rotation(64)

    def halves(source, embedding, hidden):
        read = lambda name: source.rows_float32(name).double()  # noqa: E731
        prefix = "model.layers.3."
        final = normed(hidden, read("model.norm.weight"))
        first = normed(embedding, read(prefix + "enorm.weight"))
        second = normed(final, read(prefix + "hnorm.weight"))
        weight = read(prefix + "eh_proj.weight")
        return first @ weight[:, :64].T, second @ weight[:, 64:].T

    first, second = halves(plain, embedding, hidden)
    turned_first, turned_second = halves(turned, q.rows(embedding), q.rows(hidden))
    torch.testing.assert_close(turned_first, q.rows(first), rtol=1e-5, atol=1e-5)
    expected = q.rows(second)
    factor = (turned_second * expected).sum(1, keepdim=True) / expected.square().sum(1, keepdim=True)
    assert bool((factor > 0).all())
    torch.testing.assert_close(turned_second, factor * expected, rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_how_they_are_read(write, tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path / "source", fp8_block=16))
    config, plain = ModelConfig.from_dict(checkpoint.config), open_weights(checkpoint)
    rewrites = rotated(config, take_inventory(config, plain.weights))
    turned = rewritten(plain, rewrites)
    for name in rewrites.keys() & turned.weights.keys():
        whole = turned.rows_float32(name)
        parts = [turned.rows_float32(name, start, min(start + 7, len(whole))) for start in range(0, len(whole), 7)]
        assert torch.equal(torch.cat(parts), whole), name


def test_held_bytes_are_those_of_the_largest_weight_with_rotated_outputs(write, tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path / "source", config={"hidden_size": 512, "intermediate_size": 640}))
    config, plain = ModelConfig.from_dict(checkpoint.config), open_weights(checkpoint)
    rewrites = rotated(config, take_inventory(config, plain.weights))
    turned = rewritten(plain, rewrites)
    assert turned.held_bytes == 4 * 512 * 1024  # eh_proj's
    # Panels of rows and columns: what a float64 matrix product gives.
    name, q, v = (
        "model.layers.1.self_attn.o_proj.weight",
        rotation(512).matrix(),
        rotation(config.attention.v_head_dim).matrix(),
    )
    blocks = torch.block_diag(*[v] * config.attention.heads)
    expected = q.T @ plain.rows_float32(name).double() @ blocks
    torch.testing.assert_close(turned.rows_float32(name).double(), expected, rtol=1e-6, atol=1e-6)


def test_memory_counts_the_weight_that_each_worker_holds(write, tmp_path):
    directory = write(tmp_path / "source")
    for method, more in (("minmax", 0), ("rotate+minmax", 2 * 4 * 64 * 128)):
        plans = [
            convert_checkpoint(directory, tmp_path / "out", method=m, workers=2, dry_run=True)
            for m in (method, "minmax")
        ]
        assert plans[0].memory_bytes - plans[1].memory_bytes == more
