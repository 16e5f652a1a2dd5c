"""Small checkpoints of every family, written with the safetensors library, and ways to run the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from npuq.cli.main import main
from npuq.convert import convert_checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from killable import Rig, tree_bytes

Tensors = dict[str, Tensor]
MakeCheckpoint = Callable[..., Path]

BASE_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 2,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 100,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale": 1.0},
    "torch_dtype": "bfloat16",
}
ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}
_INDEXER = {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 16}
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "v3": {},
    "kimi": {"model_type": "kimi_k2", "n_group": 1, "n_routed_experts": 6},
    "glm": {"model_type": "glm4_moe_lite", "n_group": 1, "num_attention_heads": 5, "v_head_dim": 24},
    "v32": {"model_type": "deepseek_v32", **_INDEXER},
    "glm5": {
        "model_type": "glm_moe_dsa",
        "n_group": 1,
        "v_head_dim": 24,
        "indexer_types": ["full", "full", "shared"],
        "indexer_rope_interleave": True,
        **_INDEXER,
    },
    "v2lite": {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_group": 1,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "num_nextn_predict_layers": 0,
        "n_shared_experts": 2,
    },
}


def model_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model, spelled out from the families' published layouts, not from npuq's tables."""
    h, width = config["hidden_size"], config["moe_intermediate_size"]
    experts = config["num_experts"] if config["model_type"] == "qwen3_moe" else config["n_routed_experts"]
    main_layers, vocab = config["num_hidden_layers"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, h),
        "model.norm.weight": (h,),
        "lm_head.weight": (vocab, h),
    }

    def mlp(prefix: str, size: int) -> None:
        shapes[prefix + "gate_proj.weight"] = shapes[prefix + "up_proj.weight"] = (size, h)
        shapes[prefix + "down_proj.weight"] = (h, size)

    for layer in range(main_layers + config.get("num_nextn_predict_layers", 0)):
        p = f"model.layers.{layer}."
        a = p + "self_attn."
        shapes[p + "input_layernorm.weight"] = shapes[p + "post_attention_layernorm.weight"] = (h,)
        shapes |= {a + name: shape for name, shape in _attention(config).items()}
        if "index_topk" in config and (layer >= main_layers or _has_indexer(config, layer)):
            n, d = config["index_n_heads"], config["index_head_dim"]
            shapes[a + "indexer.wq_b.weight"] = (n * d, config["q_lora_rank"])
            shapes[a + "indexer.wk.weight"] = (d, h)
            shapes[a + "indexer.k_norm.weight"] = shapes[a + "indexer.k_norm.bias"] = (d,)
            shapes[a + "indexer.weights_proj.weight"] = (n, h)
        if layer < config.get("first_k_dense_replace", 0):
            mlp(p + "mlp.", config["intermediate_size"])
        else:
            shapes[p + "mlp.gate.weight"] = (experts, h)
            if config["model_type"] == "glm4_moe" or config.get("topk_method") == "noaux_tc":
                shapes[p + "mlp.gate.e_score_correction_bias"] = (experts,)
            if config["model_type"] != "qwen3_moe":
                mlp(p + "mlp.shared_experts.", width * config["n_shared_experts"])
            for expert in range(experts):
                mlp(p + f"mlp.experts.{expert}.", width)
        if layer >= main_layers:
            shapes[p + "eh_proj.weight"] = (h, 2 * h)
            shapes[p + "enorm.weight"] = shapes[p + "hnorm.weight"] = shapes[p + "shared_head.norm.weight"] = (h,)
            if config["model_type"] != "glm_moe_dsa":
                shapes[p + "embed_tokens.weight"] = shapes[p + "shared_head.head.weight"] = (vocab, h)
    return shapes


def _attention(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, heads = config["hidden_size"], config["num_attention_heads"]
    if config["model_type"] in ("qwen3_moe", "glm4_moe"):
        d, kv = config["head_dim"], config["num_key_value_heads"]
        widths = {"q_proj": heads * d, "k_proj": kv * d, "v_proj": kv * d}
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (width, h) for name, width in widths.items()}
        if config["attention_bias"]:
            shapes |= {f"{name}.bias": (width,) for name, width in widths.items()}
        if config["model_type"] == "qwen3_moe" or config["use_qk_norm"]:
            shapes["q_norm.weight"] = shapes["k_norm.weight"] = (d,)
        return shapes | {"o_proj.weight": (h, heads * d)}
    nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    kv = config["kv_lora_rank"]
    shapes = {
        "kv_a_proj_with_mqa.weight": (kv + rope, h),
        "kv_a_layernorm.weight": (kv,),
        "kv_b_proj.weight": (heads * (nope + v), kv),
        "o_proj.weight": (h, heads * v),
    }
    q = config["q_lora_rank"]
    if q is None:
        return {"q_proj.weight": (heads * (nope + rope), h), **shapes}
    return {
        "q_a_proj.weight": (q, h),
        "q_a_layernorm.weight": (q,),
        "q_b_proj.weight": (heads * (nope + rope), q),
        **shapes,
    }


def _has_indexer(config: dict[str, Any], layer: int) -> bool:
    return "indexer_types" not in config or config["indexer_types"][layer] == "full"


def quantizes_to_fp8(name: str) -> bool:
    """Whether DeepSeek's FP8 releases store this weight in FP8."""
    parts = ("_proj", "indexer.wq_b", "indexer.wk")
    return any(part in name for part in parts) and "eh_proj" not in name and "weights_proj" not in name


def to_fp8(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn codes and float32 block scales of a matrix."""
    rows, columns = -(-weight.shape[0] // block), -(-weight.shape[1] // block)
    padded = torch.zeros(rows * block, columns * block)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(rows, block, columns, block)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return codes.to(torch.float8_e4m3fn), scale


def write_checkpoint(
    directory: Path,
    family: str = "v3",
    dtype: torch.dtype = torch.bfloat16,
    fp8_block: int | None = None,
    shards: int = 3,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    edit: Callable[[Tensors], None] | None = None,
) -> Path:
    """A random checkpoint; `edit` may change its tensors before they are written. Scales go one shard further."""
    full = {**BASE_CONFIG, **FAMILY_CONFIGS[family], **(config or {})}
    full.setdefault("architectures", [ARCHITECTURES.get(full["model_type"], "DeepseekV3ForCausalLM")])
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, shape in model_tensors(full).items():
        values = torch.randn(shape, generator=generator) * 0.1
        if name.endswith("e_score_correction_bias") or (full["model_type"] == "deepseek_v32" and "k_norm" in name):
            tensors[name] = values
        elif fp8_block and quantizes_to_fp8(name):
            tensors[name], tensors[name + "_scale_inv"] = to_fp8(values, fp8_block)
        else:
            tensors[name] = values.to(dtype)
    if fp8_block:
        full["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [fp8_block, fp8_block]}
    if edit is not None:
        edit(tensors)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(full))
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "tokenizer.model").write_text("words\n")
    (directory / "LICENSE").write_text("none\n")
    (directory / "configuration_model.py").write_text("# remote code\n")
    names = list(tensors)
    placed: dict[str, str] = {}
    for number in range(shards):
        shard = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {}
        for position, name in enumerate(names):
            if (position * shards // len(names) + name.endswith("_scale_inv")) % shards == number:
                part[name] = tensors[name].contiguous()
                placed[name] = shard
        save_file(part, directory / shard, metadata={"format": "pt"})
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return directory


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """`write_checkpoint` into tmp_path / "source" by default."""

    def make(directory: Path | None = None, **options: Any) -> Path:
        return write_checkpoint(directory or tmp_path / "source", **options)

    return make


@pytest.fixture(scope="session")
def write() -> MakeCheckpoint:
    """`write_checkpoint`, for fixtures that outlive one test."""
    return write_checkpoint


@pytest.fixture(scope="session")
def model_shapes() -> Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]:
    """`model_tensors`, for tests that write their own files."""
    return model_tensors


@pytest.fixture(scope="session")
def in_fp8() -> Callable[[str], bool]:
    """`quantizes_to_fp8`, for tests that write their own files."""
    return quantizes_to_fp8


@pytest.fixture(scope="session")
def v3_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3-shaped FP8 checkpoint in blocks of 16. Read only."""
    return write_checkpoint(tmp_path_factory.mktemp("v3") / "source", fp8_block=16)


@pytest.fixture(scope="session")
def v3_artifact(v3_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`v3_source` converted with the default recipe, in several shards. Read only."""
    output = tmp_path_factory.mktemp("artifact") / "output"
    convert_checkpoint(v3_source, output, method="minmax", max_shard_size=60_000)
    return output


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left behind."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture
def npuq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Run the command line in this process; an error that is not npuq's own fails the test."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["npuq", *map(str, arguments)])
        status = 0
        capsys.readouterr()
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        assert status != 70, captured.err
        return Outcome(status, captured.out, captured.err)

    yield run


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    return tree_bytes


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    running = Rig()
    yield running
    running.close()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of 2000 words."""
    from calibrated import text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text(2000))
    return path
