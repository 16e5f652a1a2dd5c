"""Scales of an int8 KV cache: the search, what a calibrated conversion stores, and what verify says of damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import Artifact

from npuq.convert import CalibrationText, convert_checkpoint
from npuq.convert.calibrate.layers.kv_cache import FRACTIONS, search_scale
from npuq.convert.calibrate.texts import read_calibration
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.kv_cache import load_scales, scale_name
from npuq.models.config import ModelConfig
from npuq.parallel.pool import Pool
from npuq.runtime.engine_config import EngineConfig
from npuq.runtime.llm import load
from npuq.verification import verify

SAMPLES, LENGTH = 8, 16
SCALES = "npuq/kv_cache.safetensors"


def best(latent: np.ndarray) -> tuple[np.ndarray, float]:
    """[T, L] → the candidate of least squared error for each channel, in float64, and the relative error of all."""
    scales, lost = [], 0.0
    for channel in latent.astype(np.float64).T:
        largest = np.abs(channel).max()
        found = []
        for fraction in FRACTIONS:
            wanted = np.float32(fraction * largest / 127)
            scale = np.frombuffer(np.uint32((wanted.view(np.uint32) + 0xFFFF) & 0xFFFF0000).tobytes(), np.float32)[0]
            codes = np.clip(np.rint(channel / np.float64(scale)), -128, 127)
            found.append((((codes * scale - channel) ** 2).sum(), scale))
        error, scale = min(found, key=lambda pair: pair[0])
        scales.append(scale)
        lost += error
    return np.array(scales), float(np.sqrt(lost / (latent.astype(np.float64) ** 2).sum()))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_search_finds_the_candidate_of_least_error(workers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(20000, 16, generator=generator) * torch.logspace(-2, 2, 16)
    latent[:, 5] = latent[:, 5].clamp(-0.098, 0.098)
    latent[77, 5] = 0.105  # one in twenty thousand, which it pays to clip
    latent[3, 6] = 500 * latent[:, 6].abs().max()
    batches = [slice(start, start + 3000) for start in range(0, 20000, 3000)]
    pool = Pool(workers)
    found = search_scale(lambda batch: latent[batch], batches, pool)
    pool.close()
    scales, error = best(latent.numpy())
    assert np.array_equal(found.scale.numpy(), scales)
    assert found.error == pytest.approx(error, rel=1e-5)
    assert found.scale[5] * 127 < 0.102


def test_channels_without_values() -> None:
    pool = Pool(1)
    latent = torch.zeros(4, 3)
    assert search_scale(lambda batch: latent[batch], [slice(0, 4)], pool).error == 0
    latent[1, 0], latent[2, 1] = 12.7, -1.27
    scale = search_scale(lambda batch: latent[batch], [slice(0, 4)], pool).scale
    pool.close()
    assert scale[2] == scale[0] > scale[1] > 0


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Chapter {number} has {number * 7919} words, and no more. " for number in range(200)))
    return path


@pytest.fixture(scope="module")
def calibrated(example_fp8, texts, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("calibrated") / "out"
    convert_checkpoint(example_fp8, output, method="smooth+mse", calibration=CalibrationText(texts, SAMPLES, LENGTH))
    return output


def test_they_fit_what_the_runtime_puts_into_the_cache(calibrated: Path, texts: Path) -> None:
    """The runtime's own forward of the artifact on the calibration windows, and the same search in numpy."""
    with Checkpoint.open(calibrated) as checkpoint:
        config = ModelConfig.from_dict(checkpoint.config)
    windows = read_calibration(texts, calibrated, config.vocab_size, 4096, SAMPLES, LENGTH).tokens
    model = load(calibrated, "reference", engine=EngineConfig(max_num_batched_tokens=SAMPLES * LENGTH))
    ops, latents = model.engine.model.ops, []
    write = ops.mla.kv_rmsnorm_rope_cache

    def recording(*args):
        written = write(*args)
        latents.append(written[1])
        return written

    ops.mla.kv_rmsnorm_rope_cache = recording
    assert len(list(model.logits(windows.tolist()))) == SAMPLES
    stored = load_scales(calibrated / SCALES, config.num_hidden_layers, config.attention.kv_lora_rank)
    layers = json.loads((calibrated / "npuq" / "manifest.json").read_text())["calibration"]["layers"]
    assert len(latents) == len(stored) == len(layers) == 4
    for latent, scale, report in zip(latents, stored, layers.values(), strict=True):
        golden, error = best(latent.numpy())
        # Float32 in another order, and near a tie between two candidates the next one.
        assert np.mean(np.abs(scale.numpy() / golden - 1) < 0.01) > 0.9
        assert report["kv_cache_error"] == pytest.approx(error, rel=0.02)
        assert "kv_cache_scale" not in report


def test_an_artifact_without_calibration_has_none(write, tmp_path) -> None:
    convert_checkpoint(write(tmp_path / "source"), tmp_path / "out", method="minmax")
    assert not (tmp_path / "out" / SCALES).exists()
    assert "int8 KV cache" not in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out").problems == ()


def test_verify_names_damage(calibrated: Path, tmp_path: Path) -> None:
    artifact = Artifact(Path(shutil.copytree(calibrated, tmp_path / "copy")))
    assert artifact.problems() == ""
    assert "scales for an int8 KV cache (`--kv-cache-dtype int8`" in (artifact.directory / "README.md").read_text()
    path = artifact.directory / SCALES
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00\x00\x00\x00"
    path.write_bytes(content)
    assert "kv_cache.safetensors" in artifact.problems()  # another sha256
    artifact.seal()
    assert f"tensor {scale_name(3)!r} holds scales outside" in artifact.problems()
    path.write_bytes(b"nonsense")
    artifact.seal()
    assert "npuq/kv_cache.safetensors: malformed safetensors file" in artifact.problems()
    path.unlink()
    assert "kv_cache.safetensors" in artifact.problems()
