"""The device of calibration: the same code on every device of torch, and what is refused.

No accelerator is at hand. Fake tensors of torch have shapes, dtypes and devices, and refuse operators on two devices.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from calibrated import CHAIN, LENGTH, add_tokenizer, convert
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from npuq.convert import CalibrationText
from npuq.convert.calibrate import walk
from npuq.convert.calibrate.devices import Device, arithmetic_on
from npuq.errors import ConversionError, NpuqError, RecipeError
from npuq.native.library import levels
from npuq.parallel.pool import Inline
from npuq.quant import refine
from npuq.quant.arithmetic import LANES, TorchArithmetic
from npuq.quant.gptq import gptq
from npuq.quant.hessian import Factor, Hessian

INLINE = Inline(threading.Event())


@pytest.fixture(scope="module")
def source(write, tmp_path_factory) -> Path:
    directory = write(tmp_path_factory.mktemp("devices") / "source")
    add_tokenizer(directory)
    return directory


def layers_of(output: Path) -> dict:
    return json.loads((output / "npuq" / "manifest.json").read_text())["calibration"]["layers"]


def test_everything_large_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npuq.quant.gptq.PANEL", 8)
    arithmetic, columns = TorchArithmetic("meta"), 12
    mode = FakeTensorMode()
    mode.allow_meta = True  # as a device like others: torch without CUDA fakes no other one
    with mode:
        inputs, rows = torch.empty(40, columns), torch.empty(2 * LANES, columns, device="meta")
        hessian = Hessian(columns, arithmetic)
        hessian.add(inputs, INLINE)
        matrix = hessian.symmetric()
        vector, order = torch.empty(columns, device="meta"), torch.empty(columns, device="meta", dtype=torch.int64)
        factored = Factor(matrix, matrix.clone(), vector, order, 0.01)
        codes, sums = gptq(rows.T.contiguous(), factored, rows[:, 0].contiguous(), 4, arithmetic)
        products, scaled = refine._scaled_sums(rows.T.contiguous(), sums, factored, arithmetic)
        gradient = refine._gradient(sums, factored, arithmetic)
        step = rows[:, 0].contiguous()
        small = refine._row_sums(rows, codes.T, step, gradient, gradient)
        assert arithmetic.linear(inputs, torch.empty(7, columns)).device.type == "cpu"
        found: list[Tensor] = [matrix, codes, sums, scaled, gradient]
        assert {tensor.device.type for tensor in found} == {"meta"}
        assert codes.dtype is torch.int8 and gradient.shape == rows.shape
        # float64 is for the processor alone: accelerators are slow at it, or have none.
        assert {tensor.dtype for tensor in found} == {torch.float32, torch.int8}
        assert {tensor.device.type for tensor in (products.ww, *small)} == {"cpu"}


@pytest.mark.skipif(not levels(), reason="the native library is not built here (no C compiler)")
def test_torchs_arithmetic_converts_as_the_kernels_do(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "native", texts, method="gptq", workers=1)
    monkeypatch.setattr(walk, "arithmetic_on", lambda device: TorchArithmetic())
    convert(source, tmp_path / "torch", texts, method="gptq", workers=1)
    one, other = layers_of(tmp_path / "native"), layers_of(tmp_path / "torch")
    assert one.keys() == other.keys()
    for index, layer in one.items():
        assert other[index]["output_error"] == pytest.approx(layer["output_error"], rel=0.05)
        assert other[index]["expert_tokens"] == layer["expert_tokens"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused_before_the_work(source: Path, texts: Path, tmp_path: Path) -> None:
    text = CalibrationText(texts, 8, LENGTH, device=Device.CUDA)
    for dry_run in (True, False):
        with pytest.raises(ConversionError, match="--device cuda: torch finds no such device here"):
            convert(source, tmp_path / "out", texts, calibration=text, dry_run=dry_run)
    with pytest.raises(NpuqError, match="torch_npu"):
        arithmetic_on(Device.NPU)


def test_a_device_is_for_calibration_alone(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--device is for methods that calibrate, and mse does not"):
        convert(source, tmp_path / "out", None, method="mse", calibration=CalibrationText(device=Device.NPU))


def test_a_dry_run_tells_the_time_it_expects(source: Path, texts: Path, tmp_path: Path) -> None:
    short = convert(source, tmp_path / "out", texts, method="gptq", dry_run=True)
    assert short.expected_seconds is not None and 0 < short.expected_seconds < 60
    long = convert(
        source, tmp_path / "out", texts, method=CHAIN, calibration=CalibrationText(texts, 64, LENGTH), dry_run=True
    )
    assert long.expected_seconds is not None and long.expected_seconds > short.expected_seconds / 3
    assert (
        convert(source, tmp_path / "out", None, method="mse", calibration=None, dry_run=True).expected_seconds is None
    )
