"""msmodelslim 26.1.0's own saver makes of the same codes and scales what npuq writes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from msmodelslim.core.quant_service.modelslim_v1.save.ascendv1 import AscendV1Saver
from msmodelslim.core.quant_service.modelslim_v1.save.utils.pack import w4a8_pack_int4
from msmodelslim.ir import W4A8DynamicFakeQuantLinear
from msmodelslim.ir.qal import QDType, QParam, QScheme, QScope, QStorage
from torch import Tensor

from npuq.quant.int4 import pack_int4, unpack_int4
from npuq.quant.scales import Method
from npuq.quant.schemes import Scheme, output_tensors, quantize_rows, scale_bias

ROWS, COLUMNS = 64, 1024
Written = dict[str, tuple[str, Tensor]]


def save(method: Callable[..., None], prefix: str, module: object) -> Written:
    """What a method of the saver writes: name → (type in the description, tensor)."""
    written: Written = {}

    def write_tensor(name: str, kind: str, tensor: Tensor) -> None:
        written[name] = (kind, tensor)

    method(SimpleNamespace(write_tensor=write_tensor, update_quant_type=lambda kind: None), prefix, module)
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
