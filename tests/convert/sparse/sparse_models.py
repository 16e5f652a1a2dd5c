"""Small checkpoints with sparse attention, made by transformers, whose own implementation is the golden one."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from calibrated import VOCABULARY, add_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

# More tokens than a query selects; and at least 16 index heads, so that no two keys score the same zero.
TOKENS = torch.randint(2, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(6))

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
MODELS: dict[str, dict[str, Any]] = {
    "v32": {"model_type": "deepseek_v32", "rope_parameters": PLAIN},
    "v32-yarn": {"model_type": "deepseek_v32", "rope_parameters": YARN, "n_group": 4, "topk_group": 2},
    "glm": {
        "model_type": "glm_moe_dsa",
        "rope_parameters": PLAIN,
        "indexer_types": ["full", "full", "shared", "shared"],
    },
}
_CLASSES = {"deepseek_v32": "DeepseekV32", "glm_moe_dsa": "GlmMoeDsa"}


@dataclass(frozen=True)
class Sparse:
    """A checkpoint, and transformers' model of the same weights."""

    directory: Path
    golden: Any

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.directory / "model.safetensors")

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "config.json").read_text()))

    def write(self, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, self.directory / "model.safetensors", {"format": "pt"})

    def set_config(self, **changes: Any) -> None:
        """Change keys of config.json; None takes one out."""
        config = {**self.config, **changes}
        kept = {key: value for key, value in config.items() if value is not None}
        (self.directory / "config.json").write_text(json.dumps(kept))


def logits(directory: Path, tokens: Tensor = TOKENS) -> Tensor:
    """The logits of a float checkpoint by transformers, float32 [T, vocab]."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        return model.eval()(tokens).logits[0]


def make_sparse(directory: Path, name: str, mtp: bool = False, **changes: Any) -> Sparse:
    """Save a random float32 checkpoint; with `mtp` with a multi-token-prediction layer without embedding and head."""
    import transformers

    settings = {**_COMMON, **MODELS[name], **changes}
    family = _CLASSES[settings.pop("model_type")]
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(20260512)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            norm = "norm" in parameter_name and not parameter_name.endswith("bias")
            wide = max(1, parameter.shape[-1]) ** -0.5
            # Wide enough that every part of the model moves the logits; norms away from one.
            parameter.normal_(1.0, 0.2) if norm else parameter.normal_(0.0, 2 * wide)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.save_pretrained(directory)
    made = Sparse(directory, model)
    if mtp:
        made.write(made.tensors | _mtp_tensors(made.tensors))
        made.set_config(num_nextn_predict_layers=1)
    add_tokenizer(directory)
    return made


def _mtp_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer 4 with an indexer of its own and an MTP layer's norms and projection, as GLM ships it."""
    generator, mtp = torch.Generator().manual_seed(8), {}
    shapes = {name: tensor.shape for name, tensor in tensors.items() if ".layers.3." in name and "indexer" not in name}
    shapes |= {name: tensor.shape for name, tensor in tensors.items() if ".layers.0.self_attn.indexer" in name}
    for name, shape in shapes.items():
        layer = name.replace(".layers.3.", ".layers.4.").replace(".layers.0.", ".layers.4.")
        mtp[layer] = torch.randn(shape, generator=generator) * 0.1 + (1.0 if "norm.weight" in name else 0.0)
    hidden = tensors["model.norm.weight"].shape[0]
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        mtp[f"model.layers.4.{norm}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)
    mtp["model.layers.4.eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * 0.1
    return mtp


def to_fp8_checkpoint(made: Sparse, dequantized: Path, block: int = 8) -> None:
    """Store a checkpoint's linears as its FP8 release does, and beside it the values that those codes stand for."""
    shutil.copytree(made.directory, dequantized)
    stored, plain = {}, {}
    for name, tensor in made.tensors.items():
        linear = any(part in name for part in ("_proj.", "_with_mqa.", "wq_b", "indexer.wk."))
        if not linear or "weights_proj" in name or "eh_proj" in name:
            stored[name] = plain[name] = tensor
            continue
        blocks = tensor.unflatten(1, (-1, block)).unflatten(0, (-1, block))
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name], stored[name + "_scale_inv"] = codes.reshape(tensor.shape), scale
        plain[name] = (codes.float() * scale[:, None, :, None]).reshape(tensor.shape)
    made.write(stored)
    made.set_config(quantization_config={"quant_method": "fp8", "weight_block_size": [block, block]})
    save_file(plain, dequantized / "model.safetensors", {"format": "pt"})
