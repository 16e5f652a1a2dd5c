"""msmodelslim 26.1.0's own saver makes of the same codes and scales what npuq writes, and npuq reads what it saves."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_rig.models import EXAMPLE
from msmodelslim.core.quant_service.modelslim_v1.save.ascendv1 import (
    ASCENDV1_DESC_JSON_NAME,
    ASCENDV1_SAFETENSORS_NAME,
    AscendV1Saver,
    remove_quantization_config,
)
from msmodelslim.core.quant_service.modelslim_v1.save.utils.json import JsonWriter
from msmodelslim.core.quant_service.modelslim_v1.save.utils.pack import w4a8_pack_int4
from msmodelslim.core.quant_service.modelslim_v1.save.utils.safetensors import BufferedSafetensorsWriter
from msmodelslim.ir import W4A8DynamicFakeQuantLinear
from msmodelslim.ir.api import calculate_qparam, quantize
from msmodelslim.ir.qal import QDType, QParam, QScheme, QScope, QStorage
from torch import Tensor

import npuq
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.int4 import pack_int4, unpack_int4
from npuq.formats.schemes import Scheme, output_tensors, quantize_rows, scale_bias
from npuq.formats.sources.opening import open_weights
from npuq.formats.sources.weights import WeightSource
from npuq.formats.static_w8a8 import InputScale, static_tensors
from npuq.quant.scales import Method

ROWS, COLUMNS = 64, 1024
Written = dict[str, tuple[str, Tensor]]


def save(method: Callable[..., None], prefix: str, module: object, **attributes: object) -> Written:
    """What a method of the saver writes: name → (type in the description, tensor)."""
    written: Written = {}

    def write_tensor(name: str, kind: str, tensor: Tensor) -> None:
        written[name] = (kind, tensor)

    method(
        SimpleNamespace(write_tensor=write_tensor, update_quant_type=lambda kind: None, **attributes), prefix, module
    )
    return written


def w4a8_module(codes: Tensor, scale: Tensor) -> W4A8DynamicFakeQuantLinear:
    activation = QParam(scheme=QScheme(scope=QScope.PER_TOKEN, dtype=QDType.INT8, symmetric=True))
    weight = QParam(
        scheme=QScheme(scope=QScope.PER_CHANNEL, dtype=QDType.INT4, symmetric=True), ext={"scale": scale.flatten()}
    )
    return W4A8DynamicFakeQuantLinear(activation, weight, QStorage(QDType.INT4, codes), None)


def quantized(scheme: Scheme, row_parallel: bool = False) -> dict[str, Tensor]:
    rows = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    return dict(quantize_rows(rows, scheme, Method.MINMAX, row_parallel=row_parallel).tensors)


def test_packer():
    codes = torch.randint(-8, 8, (ROWS, COLUMNS), dtype=torch.int8)
    assert torch.equal(pack_int4(codes), w4a8_pack_int4(codes))


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_w4a8(projection):
    prefix = f"model.layers.3.mlp.experts.7.{projection}"
    row_parallel = projection == "down_proj"
    ours = quantized(Scheme.W4A8, row_parallel)
    theirs = save(AscendV1Saver.on_w4a8_dynamic, prefix, w4a8_module(unpack_int4(ours["weight"]), ours["weight_scale"]))
    expected = output_tensors(f"{prefix}.weight", Scheme.W4A8, (ROWS, COLUMNS), row_parallel=row_parallel)
    assert sorted(theirs) == sorted(output.name for output in expected)
    for output in expected:
        kind, tensor = theirs[output.name]
        mine = ours[output.name.rpartition(".")[2]]
        assert kind == Scheme.W4A8.value
        assert tensor.dtype == mine.dtype and tuple(tensor.shape) == output.shape
        if output.name.endswith("scale_bias"):
            # Theirs adds up rounded products, ours the integers: they agree to float32's rounding of such a sum.
            magnitude = 8 * (unpack_int4(ours["weight"]).abs().float() * ours["weight_scale"]).sum(dim=1, keepdim=True)
            assert bool(((mine - tensor).abs() <= 2**-20 * magnitude).all())
        else:
            assert torch.equal(mine, tensor)


@pytest.mark.parametrize("projection", ["gate_proj", "down_proj"])
def test_scale_bias_to_the_bit_where_products_are_exact(projection):
    codes = torch.randint(-8, 8, (ROWS, COLUMNS), dtype=torch.int8)
    scale = torch.exp2(torch.randint(-9, -3, (ROWS, 1)).float())
    prefix = f"model.layers.3.mlp.experts.7.{projection}"
    theirs = save(AscendV1Saver.on_w4a8_dynamic, prefix, w4a8_module(codes, scale))
    columns = 16 if projection == "down_proj" else 1
    assert torch.equal(scale_bias(codes, scale, columns), theirs[f"{prefix}.scale_bias"][1])


def test_w8a8():
    ours = quantized(Scheme.W8A8)
    module = SimpleNamespace(weight=ours["weight"], weight_scale=ours["weight_scale"].flatten(), bias=None)
    theirs = save(AscendV1Saver.on_w8a8_dynamic_per_channel, "model.layers.0.self_attn.o_proj", module)
    for leaf, mine in ours.items():
        kind, tensor = theirs.pop(f"model.layers.0.self_attn.o_proj.{leaf}")
        assert kind == Scheme.W8A8.value and tensor.dtype == mine.dtype
        assert torch.equal(mine, tensor)
    assert not theirs


@pytest.mark.parametrize("is_bf16", [True, False])
def test_static_w8a8(is_bf16):
    """Same range, same codes: the same grid before npuq rounds it up to bfloat16, and the same tensors on any grid."""
    low, high = -1.75, 6.5
    activation = calculate_qparam(torch.tensor([low]), torch.tensor([high]), QDType.INT8, QScope.PER_TENSOR, False)
    inputs = InputScale.of_range(low, high)
    assert activation.ext["scale"].item() <= inputs.scale <= activation.ext["scale"].item() * (1 + 2**-7)
    assert activation.ext["offset"].item() == inputs.offset
    for grid in (inputs, InputScale(activation.ext["scale"].item(), inputs.offset)):
        codes = quantized(Scheme.W8A8)
        ours = static_tensors(codes["weight"], codes["weight_scale"], grid, float16=not is_bf16)
        module = SimpleNamespace(
            weight=codes["weight"],
            weight_scale=codes["weight_scale"].flatten(),
            input_scale=torch.tensor(grid.scale),
            input_offset=torch.tensor(float(grid.offset)),
            bias=None,
        )
        prefix = "model.layers.0.self_attn.q_a_proj"
        theirs = save(AscendV1Saver.on_w8a8_static, prefix, module, _global_torch_dtype_is_bf16=is_bf16)
        assert len(theirs) == 5  # what ModelSlim leaves out: weight_scale and weight_offset
        for name, (kind, tensor) in theirs.items():
            mine = ours[name.rpartition(".")[2]]
            assert kind == Scheme.W8A8_STATIC.value
            assert (tensor.dtype, tensor.shape) == (mine.dtype, mine.shape) and torch.equal(mine, tensor), name


def write_directory(source: WeightSource, directory: Path) -> None:
    """The shipped example through msmodelslim's own arithmetic, saver and writers."""
    directory.mkdir()
    saver = object.__new__(AscendV1Saver)
    saver.json_writer = JsonWriter(str(directory), ASCENDV1_DESC_JSON_NAME)
    prefix = ASCENDV1_SAFETENSORS_NAME.removesuffix(".safetensors")
    saver.safetensors_writer = BufferedSafetensorsWriter(logging.getLogger("saver"), 1, str(directory), prefix)
    saver.safetensors_writer.max_size = 5_000_000
    saver._desc_transform, saver._global_torch_dtype_is_bf16, saver.model_quant_type = None, True, "Unknown"
    for name, weight in source.weights.items():
        rows = source.rows_float32(name)
        module = name.removesuffix(".weight")
        if len(weight.shape) != 2 or "_proj" not in name or module.endswith(("kv_b_proj", "eh_proj")):
            saver.write_tensor(name, "FLOAT", rows if name.endswith("bias") else rows.bfloat16())
            continue
        four = ".mlp.experts." in name and int(name.split(".")[2]) < 4
        kind = QDType.INT4 if four else QDType.INT8
        param = calculate_qparam(rows.amin(1), rows.amax(1), kind, QScope.PER_CHANNEL, True)
        codes = quantize(QStorage(QDType.FLOAT, rows.T), param).value.T.contiguous()
        scale = param.ext["scale"]
        if four:
            saver.on_w4a8_dynamic(module, w4a8_module(codes, scale))
        elif module.endswith(("q_a_proj", "kv_a_proj_with_mqa")):
            seen = calculate_qparam(torch.tensor([-5.0]), torch.tensor([7.0]), QDType.INT8, QScope.PER_TENSOR, False)
            ranges = {"input_scale": seen.ext["scale"], "input_offset": seen.ext["offset"]}
            saver.on_w8a8_static(module, SimpleNamespace(weight=codes, weight_scale=scale, bias=None, **ranges))
        else:
            saver.on_w8a8_dynamic_per_channel(module, SimpleNamespace(weight=codes, weight_scale=scale, bias=None))
    for key, value in {"version": "1.0.0", "model_quant_type": saver.model_quant_type, "metadata": {}}.items():
        saver.json_writer.write(key, value)
    saver.json_writer.write("group_size", 0)
    saver.json_writer.close()
    saver.safetensors_writer.close()
    for path in EXAMPLE.glob("*.json"):
        if not path.name.endswith("index.json"):
            shutil.copy(path, directory)
    remove_quantization_config(str(directory))


def test_what_it_saves_is_read_verified_run_and_converted(tmp_path):
    with Checkpoint.open(EXAMPLE) as checkpoint:
        write_directory(open_weights(checkpoint), tmp_path / "theirs")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert "quant_model_weights.safetensors.index.json" in names and "quant_model_description.json" in names
    assert any(name.startswith("quant_model_weights-00002-of-") for name in names)
    verdict = npuq.verify(tmp_path / "theirs", EXAMPLE)
    assert verdict.problems == ()
    assert {error.scheme for error in verdict.errors} == {"W4A8_DYNAMIC", "W8A8_DYNAMIC", "W8A8"}
    assert max(error.relative_error for error in verdict.errors) < 0.2
    npuq.convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert npuq.verify(tmp_path / "ours", EXAMPLE).problems == ()
    theirs, ours = Checkpoint.open(tmp_path / "theirs"), Checkpoint.open(tmp_path / "ours")
    for name in theirs.tensors:
        if not name.endswith("scale_bias"):  # see test_w4a8
            assert torch.equal(theirs.read(name).view(torch.uint8), ours.read(name).view(torch.uint8)), name
    prompt, options = [list(range(50, 90))], {"max_new_tokens": 8, "temperature": 0}
    done = [npuq.load(tmp_path / folder).generate(prompt, **options)[0].token_ids for folder in ("theirs", "ours")]
    assert done[0] == done[1]
