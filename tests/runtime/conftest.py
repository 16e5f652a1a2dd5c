"""Small checkpoints of every family, made by transformers, whose own implementation is the golden one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import npuq
import npuq.runtime
from npuq.cli.main import main
from npuq.formats.artifact import KV_CACHE_NAME
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.kv_cache import save_scales, storable_scale
from npuq.models.config import ModelConfig
from npuq.runtime.backend import make_ops
from npuq.runtime.ops import Ops
from npuq.runtime.ops.cpu import CpuOps
from npuq.runtime.ops.reference import ReferenceOps

SEED = 20240807

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 48,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "v2-lite": {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "v2": {
        "model_type": "deepseek_v2",
        "q_lora_rank": 48,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "v3": {
        "model_type": "deepseek_v3",
        "q_lora_rank": 48,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "moonlight": {
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    },
    "kimi-k2": {
        "model_type": "kimi_k2",
        "q_lora_rank": 48,
        "n_routed_experts": 24,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "rope_parameters": {**_YARN, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    # Heads that are no power of two, values wider than keys without position; two dense layers, as a list alone says.
    "glm-flash": {
        "model_type": "glm4_moe_lite",
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "q_lora_rank": 48,
        "v_head_dim": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "first_k_dense_replace": None,
        "mlp_layer_types": ["dense", "dense", "sparse"],
    },
}


# Of a model_type other than DeepSeek-V3's.
_CLASSES = {"deepseek_v2": "DeepseekV2", "glm4_moe_lite": "Glm4MoeLite"}


def _make_checkpoint(directory: Path, family: str, **changes: Any) -> Any:
    """Save a random float32 checkpoint of a family; the transformers model that holds the same weights."""
    import transformers

    settings = {**_COMMON, **FAMILIES[family], **changes}
    settings = {key: value for key, value in settings.items() if value is not None or key == "q_lora_rank"}
    model_type = settings.pop("model_type")
    name = _CLASSES.get(model_type, "DeepseekV3")
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(SEED)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide enough that every part of the model moves the logits; norms away from one.
            parameter.normal_(1.0, 0.2) if "norm" in name else parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.save_pretrained(directory)
    path = directory / "config.json"
    saved = json.loads(path.read_text())
    saved["model_type"] = model_type
    if name != "Glm4MoeLite":  # which leaves its own config as transformers writes it
        saved["topk_method"] = settings.get("topk_method", "noaux_tc")
    path.write_text(json.dumps(saved))
    return model


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["npuq", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Any]:
    """`make_checkpoint(directory, family, **config changes)`: a random checkpoint, and transformers' model of it."""
    return _make_checkpoint


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """For each family a transformers model and the directory of its checkpoint."""
    directory = tmp_path_factory.mktemp(request.param)
    return _make_checkpoint(directory, request.param), directory


@pytest.fixture(scope="session")
def artifact(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint as a W4A8 artifact. The fast method: what is tested here is running it."""
    directory = tmp_path_factory.mktemp("artifact") / "w4a8"
    npuq.convert_checkpoint(example_fp8, directory, method="minmax", workers=1)
    return directory


@pytest.fixture(scope="module")
def example(example_fp8: Path) -> npuq.runtime.LanguageModel:
    """The shipped checkpoint, loaded."""
    return npuq.runtime.load(example_fp8, "cpu")


@pytest.fixture(scope="session")
def int8_artifact(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with scales for an int8 KV cache, such as calibration finds: a few times the norm's gain at code 127."""
    directory = tmp_path_factory.mktemp("int8-cache") / "w4a8"
    shutil.copytree(artifact, directory)
    with Checkpoint.open(directory) as checkpoint:
        config = ModelConfig.from_dict(checkpoint.config)
        gains = [
            checkpoint.view(f"model.layers.{layer}.self_attn.kv_a_layernorm.weight").float().abs()
            for layer in range(config.num_hidden_layers)
        ]
    save_scales([storable_scale(4 * gain / 127) for gain in gains], directory / KV_CACHE_NAME)
    return directory


# The last runs on native kernels where they are built.
OPERATOR_SETS: dict[str, Callable[[], Ops]] = {
    "reference": ReferenceOps,
    "torch": CpuOps,
    "cpu": lambda: make_ops("cpu"),
}


@pytest.fixture(scope="session", params=OPERATOR_SETS)
def ops(request: pytest.FixtureRequest) -> Ops:
    """Each CPU set of operators, in float32."""
    return OPERATOR_SETS[request.param]()
