"""benchmarks/quality/make_outliers.py: the same function to the bit, and much harder to quantize."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from npuq import convert_checkpoint, evaluate, load
from npuq.errors import CheckpointError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.opening import open_weights

SCRIPT = Path(__file__).parents[3] / "benchmarks/quality/make_outliers.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_outliers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain_bf16(script: ModuleType, example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with every factor 1: FP8 rounded to bf16, as the rewritten one is."""
    directory = tmp_path_factory.mktemp("plain") / "model"
    script.make_outliers(example_fp8, directory, script.Draw(seed=0, spread=0, outliers=0))
    return directory


@pytest.fixture(scope="module")
def outliers(script: ModuleType, example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("outliers") / "model"
    script.make_outliers(example_fp8, directory, script.Draw(seed=0))
    return directory


def test_logits_are_equal_to_the_bit(outliers: Path, plain_bf16: Path, eval_text: Path) -> None:
    plain, rewritten = load(plain_bf16), load(outliers)
    tokens = plain.tokenizer.encode(eval_text.read_text(encoding="utf-8")[:2000], special=False)[:200]
    (before,), (after,) = plain.logits([tokens]), rewritten.logits([tokens])
    assert torch.isfinite(before).all() and torch.equal(before, after)


def test_rounding_alone_becomes_many_times_worse(
    outliers: Path, plain_bf16: Path, eval_text: Path, tmp_path: Path
) -> None:
    text = eval_text.read_text(encoding="utf-8")[:4_000]
    results = {}
    for name, source in (("plain", plain_bf16), ("outliers", outliers)):
        convert_checkpoint(source, tmp_path / name, method="mse")
        results[name] = evaluate(tmp_path / name, text, source, context=256)
    plain, hard = results["plain"], results["outliers"]
    assert plain.source_perplexity == hard.source_perplexity
    assert plain.kl_divergence is not None and hard.kl_divergence is not None
    assert hard.kl_divergence > 10 * plain.kl_divergence


def test_channels_of_every_pair_are_moved(outliers: Path, example_fp8: Path) -> None:
    """A norm's gain, the router, v and o, up and down: each differs from the source by powers of two, some 16 or more
    times another; a multi-token-prediction layer as well."""
    with Checkpoint.open(example_fp8) as before, Checkpoint.open(outliers) as after:
        plain, moved = open_weights(before), open_weights(after)
        assert list(plain.weights) == list(moved.weights)
        for name in (
            "model.layers.0.input_layernorm.weight",
            "model.layers.1.self_attn.q_a_layernorm.weight",
            "model.layers.1.self_attn.kv_a_layernorm.weight",
            "model.layers.2.post_attention_layernorm.weight",
            "model.layers.2.mlp.gate.weight",
            "model.layers.2.self_attn.o_proj.weight",
            "model.layers.3.mlp.experts.7.down_proj.weight",
            "model.layers.4.mlp.shared_experts.down_proj.weight",
        ):
            old, new = plain.rows_float(name).double(), moved.rows_float(name).double()
            ratios = (new / old)[old != 0].log2()
            assert torch.equal(ratios, ratios.round()), name
            assert ratios.max() - ratios.min() >= 4, name
        for name in ("model.norm.weight", "lm_head.weight", "model.layers.4.eh_proj.weight"):
            assert torch.equal(plain.rows_float(name), moved.rows_float(name)), name


def test_the_same_seed_gives_the_same_files(
    script: ModuleType, outliers: Path, example_fp8: Path, tmp_path: Path
) -> None:
    script.make_outliers(example_fp8, tmp_path / "same", script.Draw(seed=0))
    script.make_outliers(example_fp8, tmp_path / "other", script.Draw(seed=1))
    (shard,) = outliers.glob("*.safetensors")
    assert (tmp_path / "same" / shard.name).read_bytes() == shard.read_bytes()
    assert (tmp_path / "other" / shard.name).read_bytes() != shard.read_bytes()


def test_factors_beyond_the_type_s_range_are_refused(script: ModuleType, example_fp8: Path, tmp_path: Path) -> None:
    draw = script.Draw(seed=0, outliers=0.5, outlier_power=140)
    with pytest.raises(CheckpointError, match="use a smaller spread"):
        script.make_outliers(example_fp8, tmp_path / "model", draw)


def test_an_existing_directory_is_left_alone(script: ModuleType, example_fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        script.make_outliers(example_fp8, tmp_path, script.Draw(seed=0))
    assert not any(tmp_path.iterdir())
