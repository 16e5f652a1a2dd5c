"""Rope tables against transformers' own initializers and DeepSeek's mscale rule."""

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from npuq.formats.checkpoint import read_config
from npuq.models.config import ModelConfig
from npuq.models.rope import inverse_frequencies, rope_tables

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
    "deepseek-yarn": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "deepseek-v2-lite": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "uneven-mscale": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    # The softmax's temperature counts under every type.
    "linear-mscale": {"rope_type": "linear", "factor": 4.0, "mscale_all_dim": 1.0},
    "dynamic-mscale": {"rope_type": "dynamic", "factor": 3.0, "mscale_all_dim": 0.5},
    "yarn-factor-1": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 256, "mscale": 0.5},
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "attention_factor": 1.25,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


@pytest.fixture
def config(example_fp8) -> dict[str, Any]:
    return {**read_config(example_fp8), "max_position_embeddings": 2048, "rope_scaling": None}


def peer(config: dict[str, Any], scaling: dict[str, Any]) -> DeepseekV3Config:
    names = set(DeepseekV3Config().to_dict()) - {"rope_parameters", "rope_scaling", "model_type"}
    kept = {key: value for key, value in config.items() if key in names}
    parameters = {"rope_type": "default", **scaling, "rope_theta": float(config["rope_theta"])}
    if "type" in parameters:
        parameters["rope_type"] = parameters.pop("type")
    return DeepseekV3Config(**kept, rope_parameters=parameters)


def ulps(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest distance in units of the last place of theirs, float32."""
    theirs = theirs.float()
    spacing = torch.from_numpy(np.spacing(theirs.abs().numpy()))
    return float(((ours.double() - theirs.double()).abs() / spacing).max())


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_mscale_are_those_of_transformers(name: str, config: dict[str, Any]) -> None:
    scaling = SCALINGS[name]
    model = ModelConfig.from_dict({**config, "rope_scaling": scaling or None})
    theirs = peer(config, scaling)
    tables = rope_tables(model)
    length = tables.cos.shape[0]
    if name == "default":
        frequencies, factor = DeepseekV3RotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        function = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]]
        frequencies, factor = function(theirs, device=torch.device("cpu"), seq_len=length)
    # transformers computes in float32: base ** x, 1 / x and the ramp's products each round, some ulps together.
    assert ulps(torch.from_numpy(inverse_frequencies(model.rope, length)), frequencies) <= 6
    assert float(tables.metadata["mscale"]) == pytest.approx(factor, rel=1e-12)
    assert tables.softmax_scale == pytest.approx(DeepseekV3Attention(theirs, 0).scaling, rel=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_float64_trigonometry_rounded_once(name: str, config: dict[str, Any]) -> None:
    model = ModelConfig.from_dict({**config, "rope_scaling": SCALINGS[name] or None})
    tables = rope_tables(model)
    length = tables.cos.shape[0]
    angles = torch.arange(length)[:, None] * torch.from_numpy(inverse_frequencies(model.rope, length))
    mscale = float(tables.metadata["mscale"])
    for table, function in ((tables.cos, torch.cos), (tables.sin, torch.sin)):
        assert table.dtype == np.float32
        assert ulps((function(angles) * mscale).float(), torch.from_numpy(table)) <= 1
        assert tuple(table.shape) == (length, model.attention.qk_rope_head_dim // 2)


def test_dynamic_tables_reach_as_far_as_the_scaling_is_meant_to(config: dict[str, Any]) -> None:
    tables = rope_tables(ModelConfig.from_dict({**config, "rope_scaling": SCALINGS["dynamic"]}))
    assert tables.cos.shape[0] == 3 * config["max_position_embeddings"]


def test_deepseek_attention_temperature(config: dict[str, Any]) -> None:
    tables = rope_tables(ModelConfig.from_dict({**config, "rope_scaling": SCALINGS["deepseek-yarn"]}))
    temperature = 0.1 * math.log(40) + 1
    assert tables.softmax_scale == pytest.approx(192**-0.5 * temperature**2, rel=1e-12)
    assert float(tables.metadata["mscale"]) == 1.0


@pytest.mark.parametrize("name", SCALINGS)
def test_both_config_dialects_give_the_same_tables(name: str, config: dict[str, Any]) -> None:
    old = {**config, "rope_scaling": SCALINGS[name] or None}
    new = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**SCALINGS[name], "rope_theta": config["rope_theta"]}
    first, second = (rope_tables(ModelConfig.from_dict(value)) for value in (old, new))
    assert torch.equal(first.cos, second.cos)
    assert torch.equal(first.sin, second.sin)
    assert first.metadata == second.metadata


def test_a_base_of_null_hides_none_beside_it(config: dict[str, Any]) -> None:
    scaling = {**SCALINGS["linear"], "rope_theta": None}
    assert ModelConfig.from_dict({**config, "rope_theta": 50000.0, "rope_scaling": scaling}).rope.theta == 50000.0


def test_rope_scaling_counts_where_both_dialects_are_there(config: dict[str, Any]) -> None:
    """As in transformers, whichever is written first."""
    both = {**config, "rope_scaling": SCALINGS["linear"], "rope_parameters": SCALINGS["yarn"]}
    theirs = DeepseekV3Config(rope_scaling=dict(SCALINGS["linear"]), rope_parameters=dict(SCALINGS["yarn"]))
    assert ModelConfig.from_dict(both).rope.rope_type == theirs.rope_parameters["rope_type"] == "linear"
    assert ModelConfig.from_dict({**both, "rope_scaling": None}).rope.rope_type == "yarn"


def test_the_longest_tables_take_little_more_memory_than_themselves(config: dict[str, Any]) -> None:
    """In a process of its own: the peak of its memory, before and after."""
    code = (
        "import json, resource, sys; from npuq.models.config import ModelConfig; "
        "from npuq.models.rope import rope_tables; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "model = ModelConfig.from_dict(json.loads(sys.argv[1])); before = peak(); tables = rope_tables(model); "
        "print(tables.cos.nbytes + tables.sin.nbytes, (peak() - before) * 1024)"
    )
    longest = {**config, "max_position_embeddings": 1 << 20}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(longest)], capture_output=True, text=True, check=True)
    held, grown = map(int, done.stdout.split())
    assert held == (1 << 20) * 64 * 4
    assert grown < held + (64 << 20)
