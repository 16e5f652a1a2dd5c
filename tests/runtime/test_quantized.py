"""An artifact runs as its format says: against transformers on the stored weights with simulated int8 activations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npuq.runtime
from npuq.errors import ArtifactError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.schemes import Scheme, dequantize

TEXT = "And the LORD said unto him, I have surely seen the whale. The Congress of the United States will be asked "


def fake_quant(x: Tensor) -> Tensor:
    """What an int8 activation with one scale a token stands for."""
    scale = x.abs().amax(-1, keepdim=True).double() / 127
    return (torch.round(x.double() / scale) * scale).float()


def simulated(directory: Path) -> Any:
    """transformers' model with the artifact's weights dequantized, and activations rounded before quantized linears."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = json.loads((directory / "config.json").read_text())
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config)).float().eval()
    with Checkpoint.open(directory) as checkpoint:
        schemes = json.loads((directory / "quant_model_description.json").read_text())

        def weight(prefix: str) -> Tensor:
            scheme = Scheme(schemes[f"{prefix}.weight"])
            if scheme is Scheme.FLOAT:
                return checkpoint.read(f"{prefix}.weight").float()
            stored = {part: checkpoint.read(f"{prefix}.{part}") for part in ("weight", "weight_scale")}
            return dequantize(stored, scheme)

        with torch.no_grad():
            for name, module in model.named_modules():
                if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
                    for expert in range(config["n_routed_experts"]):
                        parts = [weight(f"{name}.{expert}.{part}_proj") for part in ("gate", "up", "down")]
                        module.gate_up_proj[expert] = torch.cat(parts[:2])
                        module.down_proj[expert] = parts[2]
                    module.forward = _experts_forward(module)
                elif isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                    module.weight.copy_(weight(name))
                    if schemes[f"{name}.weight"] == Scheme.W8A8.value:
                        module.register_forward_pre_hook(lambda _, inputs: (fake_quant(inputs[0]),))
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_(checkpoint.read(name))
    return model


def _experts_forward(module: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for token in range(hidden.shape[0]):
            for expert, factor in zip(ids[token].tolist(), weights[token], strict=True):
                gate, up = (module.gate_up_proj[expert] @ fake_quant(hidden[token])).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                out[token] += factor * (module.down_proj[expert] @ fake_quant(inner))
        return out

    return forward


@pytest.fixture(scope="module")
def tokens(example: npuq.runtime.LanguageModel) -> list[int]:
    return [0, *example.tokenizer.encode(TEXT, special=False)]


@pytest.fixture(scope="module")
def golden(artifact: Path, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = simulated(artifact)(torch.tensor([tokens])).logits[0]
        return logits


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_logits_are_those_of_the_stored_weights(
    artifact: Path, example: npuq.runtime.LanguageModel, tokens: list[int], golden: Tensor, backend: str
) -> None:
    ours = next(npuq.runtime.load(artifact, backend).logits([tokens]))
    error = (ours - golden).norm() / golden.norm()
    effect = (next(example.logits([tokens])) - golden).norm() / golden.norm()
    # A rounding that falls the other way moves a code by one: far less than what quantization does.
    assert error < 2e-3 < 1e-2 < effect


def test_backends_generate_the_same(artifact: Path) -> None:
    texts = {
        npuq.runtime.load(artifact, backend).generate("The whale", max_new_tokens=24, temperature=0).text
        for backend in ("reference", "cpu")
    }
    assert len(texts) == 1


def test_bf16_follows_float32(artifact: Path, tokens: list[int], golden: Tensor) -> None:
    for backend in ("reference", "cpu"):
        ours = next(npuq.runtime.load(artifact, backend, torch.bfloat16).logits([tokens]))
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - golden).norm() / golden.norm() < 0.05


def test_loading_copies_no_quantized_weight(artifact: Path) -> None:
    """What the operators hold of a quantized weight is the memory map itself."""
    weights = npuq.runtime.load(artifact, "reference").engine.model.weights
    expert = weights.layers[1].moe.gate_up.linears[3].parts[1]
    mapped = expert.weight.untyped_storage()
    with Checkpoint.open(artifact) as checkpoint:
        info = checkpoint.info("model.layers.1.mlp.experts.3.up_proj.weight")
        file_size = info.file.stat().st_size
    assert mapped.nbytes() >= info.nbytes
    assert mapped.nbytes() == info.nbytes or mapped.nbytes() <= file_size
    assert f"{info.file}" in Path("/proc/self/maps").read_text()
    start, end = _mapping_of(expert.weight.data_ptr())
    assert start <= expert.weight.data_ptr() < end


def _mapping_of(address: int) -> tuple[int, int]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            assert line.endswith(".safetensors"), line
            return start, end
    raise AssertionError("address is not mapped")


@pytest.fixture
def broken(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact to damage."""
    return Path(shutil.copytree(artifact, tmp_path / "broken"))


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("quant_model_description.json", {EXPERT: "W2A2"}, "unknown type 'W2A2'"),
        ("quant_model_description.json", {EXPERT: None}, f"no entry for '{EXPERT}'"),
        ("quant_model_description.json", {EXPERT: "W8A8_DYNAMIC"}, f"'{EXPERT}' is I8 "),
        ("quant_model_description.json", {EXPERT: "FLOAT"}, f"'{EXPERT}' is I8 .* say BF16 or F16 or F32"),
        ("config.json", {"moe_intermediate_size": 64}, r"gate_proj.* is I8 .* config.json says \[64, 256\]"),
        ("config.json", {"vocab_size": 5000}, r"embed_tokens.* say .*\[5000, 256\]"),
        ("config.json", {"num_hidden_layers": 6}, r"layers\.5\."),
    ],
)
def test_damaged_artifact_is_refused(broken: Path, file: str, changes: dict[str, object], message: str) -> None:
    edit_json(broken / file, **changes)
    with pytest.raises(ArtifactError, match=message) as error:
        npuq.runtime.load(broken, "cpu")
    assert "\n" not in str(error.value)


def test_unfinished_artifact_is_refused(broken: Path) -> None:
    (broken / "npuq" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="no finished npuq artifact"):
        npuq.runtime.load(broken, "cpu")


def test_missing_rope_tables_are_refused(broken: Path) -> None:
    (broken / "npuq" / "rope.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"rope\.safetensors: .*missing"):
        npuq.runtime.load(broken, "cpu")
