"""msmodelslim 26.1's recipe `deepseek_w4a8_per_channel`, its own classes on a transformers model, on a CPU.

    python msmodelslim_w4a8.py SOURCE OUTPUT TOKENS.json

For an environment with msmodelslim and transformers. The tool as a program moves DeepSeek's layers to an NPU by name,
so it does not run on a CPU. This script runs the recipe's two steps with the tool's code, in the tool's bf16:

1. `flex_smooth_quant` on norm-linear and o-v pairs: its FlexSmoothQuantProcessor with the subgraphs of its own DeepSeek
   adapter, fed with the inputs that the calibration samples give the linears of the float model;
2. its weight quantizers: `ssz` at int4, one scale a channel, for routed experts; `minmax` at int8 for the other linears
   but kv_b, the router and the head. Activations are quantized per token at run time: there is nothing to calibrate.

Codes and scales are written unchanged, in compressed-tensors' `int-quantized` format. Multi-token-prediction layers
are left out: transformers does not load them, and no smoothing of the recipe touches them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from msmodelslim.core.base.protocol import BatchProcessRequest
from msmodelslim.core.quantizer.base import AutoWeightQuantizer, QConfig
from msmodelslim.ir.qal import QDType, QStorage
from msmodelslim.model.deepseek_v3.model_adapter import DeepSeekV3ModelAdapter
from msmodelslim.model.interface_hub import FlexSmoothQuantInterface
from msmodelslim.processor.anti_outlier.flex_smooth.processor import (
    FlexSmoothQuantProcessor,
    FlexSmoothQuantProcessorConfig,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

INT8 = QConfig(dtype="int8", scope="per_channel", symmetric=True, method="minmax")
INT4 = QConfig(dtype="int4", scope="per_channel", symmetric=True, method="ssz")
BATCH = 16
ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")


class Subgraphs(FlexSmoothQuantInterface):
    """Smoothing pairs of msmodelslim's DeepSeek adapter. The adapter counts the MTP layer into `num_hidden_layers` and
    then leaves it out."""

    get_adapter_config_for_subgraph = DeepSeekV3ModelAdapter.get_adapter_config_for_subgraph

    def __init__(self, config: object):
        self.config = config


def smooth(model: nn.Module, samples: list[list[int]]) -> None:
    """Smooth layer by layer as the tool does (step 1). A layer's function stays the same."""
    model.config.num_hidden_layers += 1
    adapter = Subgraphs(model.config)
    subgraphs = adapter.get_adapter_config_for_subgraph()
    model.config.num_hidden_layers -= 1
    adapter.get_adapter_config_for_subgraph = lambda: subgraphs
    config = FlexSmoothQuantProcessorConfig(enable_subgraph_type=["norm-linear", "ov"], include=["*"])
    for number, layer in enumerate(model.model.layers):
        processor = FlexSmoothQuantProcessor(model, config, adapter)
        request = BatchProcessRequest(name=f"model.layers.{number}", module=layer)
        processor.preprocess(request)
        for start in range(0, len(samples), BATCH):
            run_layers(model, torch.tensor(samples[start : start + BATCH]), number)
        processor.postprocess(request)


class LayerReached(Exception):  # noqa: N818
    """Raised behind the requested layer, to skip the layers after it."""


def run_layers(model: nn.Module, tokens: Tensor, last: int) -> None:
    def stop(*_: object) -> None:
        raise LayerReached

    handle = model.model.layers[last].register_forward_hook(stop)
    try:
        model.model(tokens, use_cache=False)
    except LayerReached:
        pass
    finally:
        handle.remove()


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor, QConfig | None]]:
    """Weights by their checkpoint names, with the quantizer that the recipe gives each."""
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, fused in enumerate(tensor):
                gate, up = fused.chunk(2)
                yield f"{name.removesuffix('gate_up_proj')}{expert}.gate_proj.weight", gate, INT4
                yield f"{name.removesuffix('gate_up_proj')}{expert}.up_proj.weight", up, INT4
        elif name.endswith("mlp.experts.down_proj"):
            for expert, down in enumerate(tensor):
                yield f"{name.removesuffix('down_proj')}{expert}.down_proj.weight", down, INT4
        else:
            module = name.removesuffix(".weight").rpartition(".")[2]
            linear = module in ATTENTION or (".mlp." in name and module in ("gate_proj", "up_proj", "down_proj"))
            yield name, tensor, INT8 if linear else None


def quantize(weight: Tensor, config: QConfig) -> tuple[Tensor, Tensor]:
    """Quantize with the tool's quantizer (step 2): int8 codes `[N, K]` and scales `[N, 1]`."""
    quantizer = AutoWeightQuantizer.from_config(config)
    quantizer.init_weight(QStorage(QDType.FLOAT, weight.contiguous()), None)
    quantizer(None)
    codes, scale = quantizer.get_q_storage().value, quantizer.get_q_param().ext["scale"]
    low, high = (-8, 7) if config is INT4 else (-128, 127)
    if not low <= codes.min() <= codes.max() <= high:
        raise SystemExit(f"codes from {codes.min()} to {codes.max()}: is this another msmodelslim?")
    return codes.to(torch.int8).contiguous(), scale.reshape(-1, 1).contiguous()


def group(targets: list[str], bits: int) -> dict[str, object]:
    symmetric = {"type": "int", "symmetric": True}
    return {
        "targets": targets,
        "weights": {**symmetric, "num_bits": bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**symmetric, "num_bits": 8, "strategy": "token", "dynamic": True},
    }


@torch.no_grad()
def main(source: str, output: str, tokens: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    smooth(model, json.loads(Path(tokens).read_text()))
    tensors: dict[str, Tensor] = {}
    targets: dict[int, list[str]] = {4: [], 8: []}
    for name, weight, config in weights(model):
        if config is None:
            tensors[name] = weight.contiguous()
            continue
        tensors[name], tensors[name.removesuffix("weight") + "weight_scale"] = quantize(weight, config)
        targets[4 if config is INT4 else 8].append(name.removesuffix(".weight"))
    settings = json.loads((Path(source) / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"experts": group(targets[4], 4), "others": group(targets[8], 8)},
        "ignore": [],
    }
    directory = Path(output)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(settings, indent=2))
    for path in (*Path(source).glob("tokenizer*"), Path(source) / "generation_config.json"):
        shutil.copyfile(path, directory / path.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
