"""Configs of the supported families, and what is wrong with broken ones."""

from typing import Any

import pytest
import torch
from transformers import Glm4MoeLiteConfig, GlmMoeDsaConfig

from npuq.errors import CheckpointError
from npuq.formats.checkpoint import read_config
from npuq.models.config import ModelConfig

YARN = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 512}
LLAMA3 = {
    "type": "llama3",
    "factor": 2,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 512,
}


@pytest.fixture
def config(example_fp8) -> dict[str, Any]:
    return read_config(example_fp8)


def test_the_shipped_config(config: dict[str, Any]) -> None:
    model = ModelConfig.from_dict(config)
    assert (model.attention.qk_head_dim, model.attention.kv_lora_rank, model.attention.q_lora_rank) == (192, 512, 256)
    assert [model.moe_at(layer) is not None for layer in range(5)] == [False, True, True, True, True]
    assert (model.moe.scoring_func, model.moe.topk_method, model.moe.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    assert model.dtype is torch.bfloat16
    assert (model.rope.rope_type, model.rope.factor, model.rope.original_max_position) == ("yarn", 8.0, 512)


def test_deepseek_v2_lite_defaults(config: dict[str, Any]) -> None:
    lite = {**config, "model_type": "deepseek_v2", "q_lora_rank": None, "n_group": None, "topk_group": None}
    for key in ("scoring_func", "topk_method", "norm_topk_prob", "num_nextn_predict_layers"):
        lite.pop(key)
    model = ModelConfig.from_dict(lite)
    assert (model.moe.scoring_func, model.moe.topk_method, model.moe.norm_topk_prob) == ("softmax", "greedy", False)
    assert (model.attention.q_lora_rank, model.moe.n_group, model.moe.topk_group, model.num_nextn_predict_layers) == (
        None,
        1,
        1,
        0,
    )


def test_kimi_k2_reads_like_v3(config: dict[str, Any]) -> None:
    kimi = {**config, "model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "dtype": "bfloat16"}
    model = ModelConfig.from_dict(kimi)
    assert (model.moe.scoring_func, model.moe.topk_method, model.moe.n_group) == ("sigmoid", "noaux_tc", 1)


def flash(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """GLM-4.7-Flash's keys, as transformers leaves them: no scoring_func, topk_method or first_k_dense_replace."""
    left_out = ("scoring_func", "topk_method", "first_k_dense_replace", "moe_layer_freq", "rms_norm_eps", "n_group")
    kept = {key: value for key, value in config.items() if key not in left_out and key != "topk_group"}
    return {**kept, "model_type": "glm4_moe_lite", **changes}


def test_glm_reads_like_transformers(config: dict[str, Any]) -> None:
    model, theirs = (
        ModelConfig.from_dict(flash(config)),
        Glm4MoeLiteConfig(num_hidden_layers=config["num_hidden_layers"]),
    )
    assert (model.moe.scoring_func, model.moe.topk_method) == ("sigmoid", "noaux_tc")
    assert (model.moe.n_group, model.moe.topk_group) == (theirs.n_group, theirs.topk_group)
    assert model.rms_norm_eps == theirs.rms_norm_eps
    kinds = ["sparse" if model.moe_at(layer) else "dense" for layer in range(model.num_hidden_layers)]
    assert kinds == theirs.mlp_layer_types


def test_glm_lists_its_dense_layers(config: dict[str, Any]) -> None:
    listed = flash(config, mlp_layer_types=["dense", "dense", "sparse", "sparse"])
    assert ModelConfig.from_dict(listed).moe.layers.first_k_dense_replace == 2
    assert ModelConfig.from_dict({**listed, "first_k_dense_replace": 2}).moe.layers.first_k_dense_replace == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types must be 4 words"),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, "engines read no other order"),
        ({"mlp_layer_types": "dense"}, "mlp_layer_types must be a list of texts, not 'dense'"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace 3 .* transformers has 1 dense layers"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2 count for the engines"),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is unknown"),
    ],
)
def test_glm_where_transformers_and_engines_differ(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict(flash(config, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is unknown"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "256"}, "hidden_size must be a whole number"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        # What verify, its --engine and report enumerate: minutes and all memory without a bound.
        ({"n_routed_experts": 1 << 24, "num_hidden_layers": 1000}, "experts are more than any model has"),
        ({"n_routed_experts": 1 << 18, "num_hidden_layers": 1}, "2 layers of 262144 experts"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a finite number"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"scoring_func": "tanh"}, "scoring_func 'tanh' is unknown"),
        ({"topk_method": "beam"}, "topk_method 'beam' is unknown"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"n_group": 3}, "groups must divide"),
        ({"num_experts_per_tok": 9}, "exceeds the experts"),
        ({"qk_rope_head_dim": 63}, "is odd"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope type 'longrope' is unknown"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "needs original_max_position_embeddings"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": "yarn"}, "must be an object"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope type .* is unknown"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"factor must be from 1 to 1e\+06, not 0"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-310}}, r"factor must be from 1 to 1e\+06, not 1e-310"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.001}}, r"factor must be from 1 to 1e\+06, not 0.001"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor must be a finite number"),
        ({"rope_scaling": {**YARN, "beta_slow": 0}}, "rope beta_slow must be above 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e5}}, "409600000 positions .* make tables of 100000 MiB"),
        ({"qk_rope_head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}}, "more than two rotary dimensions"),
        ({"max_position_embeddings": 1 << 24}, "max_position_embeddings 16777216 is more than any model has"),
        ({"max_position_embeddings": 1 << 21, "qk_rope_head_dim": 66}, "make tables of 528 MiB"),
        ({"qk_rope_head_dim": 10**10}, "qk_rope_head_dim 10000000000 is more than any model has"),
        ({"qk_nope_head_dim": 10**400}, "qk_nope_head_dim a number of 1329 bits is more"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number, not a number of 1329 bits"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 10**400}}, "a number of 1329 bits is more"),
        ({"rope_scaling": {**YARN, "mscale": 1e299}}, "mscale must be a finite number"),
        ({"rope_scaling": {**YARN, "mscale": 101, "mscale_all_dim": 1}}, "mscale must be from 0 to 100"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": -7.2}}, "mscale_all_dim must be from 0 to 100"),
        (
            {"rope_scaling": {**YARN, "mscale_all_dim": 1.0}},
            "is 1 in DeepSeek's code and the engines and 1.069",
        ),
        ({"rope_scaling": {**YARN, "mscale": 0.5}}, "is 1.035 in DeepSeek's code"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "give no rotary tables"),
        ({"rope_scaling": {**YARN, "rope_type": "linear"}}, "rope_type is 'linear' and type 'yarn'"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 64}, "loaders differ on which counts"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"rope_theta": 1e13}, r"rope_theta must be from 0 to 1e\+12"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "high_freq_factor must be above"),
        ({"rope_theta": 1}, "rope_theta must be above 1"),
        ({"rope_theta": float("inf")}, "rope_theta must be a finite number"),
        ({"rope_interleave": False}, "rope_interleave false is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is unknown"),
        ({"max_position_embeddings": 10**15}, "max_position_embeddings .* is more than any model has"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .* is more than any model has"),
        ({"num_nextn_predict_layers": 10**12}, "num_nextn_predict_layers .* is more than any model has"),
    ],
)
def test_broken_configs_are_refused_by_key(change: dict[str, Any], message: str, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelConfig.from_dict({**config, **change})
    assert str(caught.value).startswith("config.json: ")


INDEX = {"index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048}


def sparse(config: dict[str, Any], model_type: str = "glm_moe_dsa", **changes: Any) -> dict[str, Any]:
    """A sparse model's keys of four layers; a change to None leaves the key out."""
    full = {**config, "model_type": model_type, **INDEX, "num_hidden_layers": 4, **changes}
    return {key: value for key, value in full.items() if value is not None}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"index_topk_freq": 4},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"index_topk_freq": 2, "index_skip_topk_offset": 1},
        {"index_topk_pattern": "FSFSSFFS", "index_topk_freq": 3},
        {"indexer_types": ["full"] * 3 + ["shared"] * 5, "index_topk_pattern": "F" * 8, "index_topk_freq": 2},
    ],
    ids=str,
)
def test_which_layers_select_by_themselves_reads_like_transformers(config: dict[str, Any], keys: Any) -> None:
    attention = ModelConfig.from_dict(sparse(config, num_hidden_layers=8, **keys)).attention
    theirs = GlmMoeDsaConfig(num_hidden_layers=8, **keys)
    assert list(attention.indexer.types) == theirs.indexer_types
    assert attention.indexer.is_full(8)  # a multi-token-prediction layer
    assert attention.indexer.types_listed == ("indexer_types" in keys)


def test_glm_52_shares_57_of_78_layers(config: dict[str, Any]) -> None:
    keys = {"index_topk_freq": 4, "index_skip_topk_offset": 3, "num_hidden_layers": 78}
    types = ModelConfig.from_dict(sparse(config, **keys)).attention.indexer.types
    assert [layer for layer, kind in enumerate(types) if kind == "full"] == [0, 1, *range(2, 78, 4)]


@pytest.mark.parametrize(("model_type", "interleaved"), [("deepseek_v32", False), ("glm_moe_dsa", True)])
def test_the_indexer_s_rope_is_the_family_s_where_no_key_says_it(
    config: dict[str, Any], model_type: str, interleaved: bool
) -> None:
    attention = ModelConfig.from_dict(sparse(config, model_type)).attention
    assert attention.indexer.rope_interleave is interleaved
    stated = ModelConfig.from_dict(sparse(config, model_type, indexer_rope_interleave=True, head_dim=192)).attention
    assert stated.indexer.rope_interleave and stated.qk_head_dim == 192


@pytest.mark.parametrize(("listed", "stated", "dense"), [(None, 2, 2), (["dense"] + ["sparse"] * 3, None, 1)])
def test_sparse_models_state_their_dense_layers_either_way(
    config: dict[str, Any], listed: Any, stated: Any, dense: int
) -> None:
    keys = {"mlp_layer_types": listed, "first_k_dense_replace": stated}
    assert ModelConfig.from_dict(sparse(config, **keys)).moe.layers.first_k_dense_replace == dense


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"q_lora_rank": None}, "q_lora_rank is missing"),
        ({"index_topk": 0}, "index_topk must be at least 1"),
        ({"index_topk": 10**30}, "index_topk .* is more than any model has"),
        ({"index_topk": "2048"}, "index_topk must be a whole number"),
        ({"index_n_heads": -1}, "index_n_heads must be a whole number"),
        ({"index_head_dim": 32}, "index_head_dim 32 cannot hold the qk_rope_head_dim 64"),
        ({"indexer_rope_interleave": "yes"}, "indexer_rope_interleave must be true or false"),
        ({"indexer_types": ["full"] * 3}, "indexer_types is for 3 layers, and num_hidden_layers is 4"),
        ({"indexer_types": ["full"] * 5}, "indexer_types is for 5 layers"),
        ({"indexer_types": []}, "indexer_types is for 0 layers"),
        ({"indexer_types": ["full", "shared", "none", "full"]}, "indexer_types has 'none'"),
        ({"indexer_types": [["full"]] * 4}, "indexer_types must be a list of texts"),
        ({"indexer_types": "full"}, "indexer_types must be a list of texts"),
        ({"indexer_types": ["shared"] + ["full"] * 3}, "layer 0 shares"),
        ({"index_topk_pattern": "SFFF"}, "layer 0 shares"),
        ({"index_topk_pattern": "FF"}, "index_topk_pattern is for 2 layers"),
        ({"index_topk_pattern": "FFXF"}, "index_topk_pattern has 'X'"),
        ({"index_topk_pattern": ["F"] * 4}, "index_topk_pattern must be a text"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 0}, "layer 0 shares"),
        ({"index_topk_freq": 0}, "index_topk_freq must be at least 1"),
        ({"index_topk_freq": 1.5}, "index_topk_freq must be a whole number"),
        ({"index_skip_topk_offset": -3}, "index_skip_topk_offset must be a whole number"),
        ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2}, "keep one of both"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers .* more than any model"),
    ],
    ids=str,
)
def test_hostile_keys_of_the_index(config: dict[str, Any], changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=why) as caught:
        ModelConfig.from_dict(sparse(config, **changes))
    assert "\n" not in str(caught.value)
