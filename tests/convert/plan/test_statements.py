"""Every pair of statements of a checkpoint that can contradict each other: one counts and a note says so, or it is
refused; nothing is preferred in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npuq.convert import convert_checkpoint
from npuq.convert.plan.prepare import prepare
from npuq.engines.placement import ENGINES, check_placement
from npuq.errors import CheckpointError
from npuq.verification import verify

Tensors = dict[str, Tensor]
MTP = "model.layers.3."


@dataclass(frozen=True)
class Case:
    """A v3 checkpoint of 3 layers and an MTP layer, changed. `refused` or `note` is said; `artifact` holds of the
    artifact's config.json, `dropped` names what it does not have."""

    config: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Tensors], None] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    note: str | None = None
    artifact: dict[str, Any] = field(default_factory=dict)
    dropped: str | None = None


def without(*parts: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return edit


def add(*names: str, shape: tuple[int, ...] = (4, 64)) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors.update({name: torch.ones(shape).bfloat16() for name in names})

    return edit


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


def as_float32(tensors: Tensors) -> None:
    tensors.update({name: tensor.float() for name, tensor in tensors.items()})


def grow(name: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    return edit


def by_channel(tensors: Tensors) -> None:
    """FP8 by channel, as compressed-tensors stores it."""
    for name in [name for name in tensors if "_proj" in name]:
        scale = tensors[name].float().abs().amax(1, keepdim=True) / 448
        tensors[name + "_scale"] = scale
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)


def static(tensors: Tensors) -> None:
    by_channel(tensors)
    scales = [name for name in tensors if name.endswith(".weight_scale")]
    tensors.update({name.replace("weight_scale", "input_scale"): torch.ones(1) for name in scales})


def share_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale": 1.0}
INT8 = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
CASES = {
    # The head: see tests/runtime/test_tied.py for what is computed.
    "tied, and a head stored": Case(TIED, note="and the checkpoint stores both", artifact=UNTIED),
    "tied, and the same head stored": Case(
        TIED, share_head, note="and the checkpoint stores both", artifact=UNTIED
    ),
    "tied, and no head": Case(TIED, without("lm_head"), note="a second time as 'lm_head.weight'", artifact=UNTIED),
    "tied, and no embedding": Case(
        TIED, without("model.embed"), note="a second time as 'model.embed_tokens.weight'", artifact=UNTIED
    ),
    "untied, and no head": Case({}, without("lm_head"), refused="'lm_head.weight' is missing"),
    # Layers.
    "a layer more than are stored": Case(
        {"num_hidden_layers": 5, "num_nextn_predict_layers": 0}, refused="config.json has num_hidden_layers 5"
    ),
    "a layer less than are stored": Case(
        {"num_hidden_layers": 2, "num_nextn_predict_layers": 0},
        without(MTP),
        refused="num_hidden_layers 2, but the checkpoint has layer 2, which is no multi-token",
    ),
    "an MTP layer among the decoder's": Case(
        {"num_hidden_layers": 4, "num_nextn_predict_layers": 0}, refused="config.json has num_hidden_layers 4"
    ),
    "an MTP layer that is not counted": Case(
        {"num_nextn_predict_layers": 0},
        note=r"MTP layers \(3\) that config.json does not count",
        artifact={"num_nextn_predict_layers": 1},
    ),
    "an MTP layer and a count of null": Case(
        {"num_nextn_predict_layers": None},
        note=r"MTP layers \(3\) that config.json does not count",
        artifact={"num_nextn_predict_layers": 1},
    ),
    "a count of null alone": Case(
        {"num_nextn_predict_layers": None}, without(MTP), artifact={"num_nextn_predict_layers": 0}
    ),
    "half an MTP layer that is not counted": Case(
        {"num_nextn_predict_layers": 0},
        without(MTP + "self_attn"),
        note="layers 3 are MTP layers behind a gap, or neither whole nor counted",
        artifact={"num_nextn_predict_layers": 0},
        dropped=MTP,
    ),
    "half an MTP layer that is counted": Case(
        {}, without(MTP + "self_attn"), refused=r"layers\.3\.self_attn.* missing"
    ),
    "a counted MTP layer that is not there": Case(
        {}, without(MTP), note=r"counts MTP layers that the checkpoint does not have \(layer 3\)",
        artifact={"num_nextn_predict_layers": 0},
    ),
    "an MTP layer behind a gap": Case(
        {"num_nextn_predict_layers": 0},
        rename(MTP, "model.layers.4."),
        note="layers 4 are MTP layers behind a gap",
        artifact={"num_nextn_predict_layers": 0},
        dropped="model.layers.4.",
    ),
    "a counted MTP layer behind a gap": Case(
        {"num_nextn_predict_layers": 2},
        rename(MTP, "model.layers.4."),
        note="layers 4 are MTP layers behind a gap",
        artifact={"num_nextn_predict_layers": 0},
        dropped="model.layers.4.",
    ),
    # Experts and attention.
    "an expert more than config.json has": Case(
        {"n_routed_experts": 2, "n_group": 1}, refused="config.json has n_routed_experts 2"
    ),
    "an expert less than config.json has": Case(
        {}, without("experts.3."), refused=r"'model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight' and .* missing"
    ),
    "shared experts that config.json has not": Case(
        {"n_shared_experts": 0}, refused="config.json has n_shared_experts 0"
    ),
    "no shared experts where it has them": Case({}, without("shared_experts"), refused="shared_experts.* missing"),
    "experts in a dense layer": Case(
        {"first_k_dense_replace": 2}, refused="config.json has first_k_dense_replace 2 and moe_layer_freq 1"
    ),
    "a dense layer with experts": Case(
        {"first_k_dense_replace": 0}, refused="config.json has first_k_dense_replace 0 and moe_layer_freq 1"
    ),
    "a latent of q that config.json has not": Case({"q_lora_rank": None}, refused="config.json has q_lora_rank null"),
    "two ways to q": Case(
        {}, add("model.layers.0.self_attn.q_proj.weight", shape=(48, 64)), refused="config.json has q_lora_rank 48"
    ),
    "a correction bias under greedy": Case(
        {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
        refused="config.json has topk_method greedy",
    ),
    "a vocabulary of other rows": Case({}, grow("lm_head.weight"), refused=r"shape \[101, 64\], but config"),
    "two counts of experts": Case({"num_local_experts": 8}, refused="n_routed_experts is 4 and num_local_experts 8"),
    "two counts of MTP layers": Case({"num_mtp_layers": 2}, refused="is 1 and num_mtp_layers 2"),
    "groups under greedy": Case(
        {"n_group": 2},
        options={"family": "v2lite"},
        note="n_group 2, and topk_method greedy, which has no groups",
        artifact={"n_group": 1},
    ),
    "groups of null": Case(
        {"n_group": None, "topk_group": None},
        note="n_group null: read as one group of all experts",
        artifact={"n_group": 1, "topk_group": 1},
    ),
    "no groups, of which some count": Case(
        {"n_group": None}, note="n_group null", artifact={"n_group": 1, "topk_group": 1}
    ),
    "one group, and null of it": Case(
        {"n_group": 1, "topk_group": None}, note="topk_group null: read as one group", artifact={"topk_group": 1}
    ),
    "two groups, and null of them": Case({"topk_group": None}, refused="topk_group is null"),
    "two groups of one": Case({"n_group": 1, "topk_group": 2}, refused="groups must divide the experts and hold"),
    "q without a latent": Case({}, options={"config": {"q_lora_rank": None}}),
    # Dtypes and quantization.
    "another dtype than is stored": Case({}, as_float32, note=r"stored in another dtype than config.json's bfloat16"),
    "two dtypes": Case(
        {"dtype": "bfloat16", "torch_dtype": "float16"},
        note="has dtype bfloat16 and torch_dtype 'float16': dtype counts",
        artifact={"torch_dtype": "bfloat16"},
    ),
    "FP8 named, and nothing quantized": Case(
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        note=r"quantization_config \('fp8'\), and no weight is quantized",
    ),
    "compressed-tensors named, and nothing quantized": Case(
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
        note=r"quantization_config \('compressed-tensors'\), and no weight is quantized",
    ),
    "FP8, and another method named": Case(
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        options={"fp8_block": 128},
        note=r"FP8 \(68 128x128\), and config.json's quantization_config \('awq'\) says otherwise",
    ),
    "FP8, and integers named": Case(
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": INT8}}},
        options={"fp8_block": 128},
        note=r"FP8 \(68 128x128\), and config.json's quantization_config \('compressed-tensors'\) says otherwise",
    ),
    "FP8, and no size of blocks": Case(
        {"quantization_config": {"quant_method": "fp8"}},
        options={"fp8_block": 16},
        note="has no weight_block_size: the shapes of their scales tell the blocks",
    ),
    "FP8 in blocks of another size": Case(
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        options={"fp8_block": 16},
        refused="blocks of 128x128 over",
    ),
    "FP8 by channel, and blocks named": Case(
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        by_channel,
        note="has FP8 blocks of 128x128, and 69 weights have scales by channel, first",
    ),
    "FP8 with scales of its inputs": Case(
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
        static,
        note="scales of FP8 activations are left out",
        dropped="input_scale",
    ),
    "another method named, and nothing quantized": Case(
        {"quantization_config": {"quant_method": "awq"}}, note=r"quantization_config \('awq'\), and no weight is"
    ),
    # Rotary parameters.
    "two objects of rope parameters": Case(
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, note="rope_scaling counts, as in transformers"
    ),
    "rope parameters under their new name": Case(
        {"rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 10000}}
    ),
    "rope parameters under both names": Case({"rope_parameters": YARN}),
    "two rope types": Case(
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
        refused="rope_type is 'yarn' and type 'linear'",
    ),
    "two thetas": Case(
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        note="rope_theta 10000 beside the rope parameters' 50000.0: theirs counts",
    ),
    "two original lengths": Case({"original_max_position_embeddings": 128}, refused="loaders differ on which counts"),
    # Names.
    "another family's class": Case(
        {"architectures": ["DeepseekV2ForCausalLM"]}, note="model_type 'deepseek_v3', and architectures"
    ),
    "two ends of a text": Case({"eos_token_id": 7}, note="ends texts at token 7, generation_config.json at 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_contradictions(name, make_checkpoint, tmp_path):
    case = CASES[name]
    source = make_checkpoint(edit=case.edit, **case.options)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 1} | case.config))
    if case.refused is not None:
        with pytest.raises(CheckpointError, match=case.refused) as caught:
            convert_checkpoint(source, tmp_path / "out", method="minmax")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
        return
    notes = convert_checkpoint(source, tmp_path / "out", method="minmax").notes
    if case.note is not None:
        with pytest.raises(AssertionError, match=case.note):
            raise AssertionError("\n".join(notes))
    else:
        assert not any("config.json" in note for note in notes)
    assert verify(tmp_path / "out", source).problems == ()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written | case.artifact == written
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert case.dropped is None or not any(case.dropped in tensor for tensor in names)
    # What the artifact's config.json says now, both engines read as npuq does.
    for engine in ENGINES:
        assert not [line for line in check_placement(tmp_path / "out", engine, 1, True) if "rope" not in line]


def test_a_plain_checkpoint_contradicts_nothing(make_checkpoint):
    prepared = prepare(make_checkpoint(config={"eos_token_id": 1}), None, None, 10**9)
    with prepared.checkpoint:
        assert prepared.statements == ()


@pytest.mark.parametrize("block", [128, 16])
def test_fp8_without_a_quantization_config(block, make_checkpoint, tmp_path):
    """The shapes of the scales tell the blocks."""
    source = make_checkpoint(fp8_block=block)
    convert_checkpoint(source, tmp_path / "expected", method="minmax")
    path = source / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    notes = convert_checkpoint(source, tmp_path / "out", method="minmax").notes
    assert any(f"{block}x{block}), and config.json has no quantization_config" in note for note in notes)
    shards = sorted(path.name for path in (tmp_path / "expected").glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "expected" / shard).read_bytes()


def shard_of(source: Path, name: str) -> Path:
    return source / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name]


def test_a_tensor_that_the_index_does_not_list_counts_as_elsewhere(make_checkpoint, tmp_path):
    """The stored head of a tied model, which transformers and the engines find in its shard."""
    source = make_checkpoint(config=TIED)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    head = load_file(source / index["weight_map"].pop("lm_head.weight"))["lm_head.weight"]
    path.write_text(json.dumps(index))
    notes = convert_checkpoint(source, tmp_path / "out", recipe="float").notes
    assert any("does not list 1 tensors that the shards have, first 'lm_head.weight'" in note for note in notes)
    assert torch.equal(load_file(shard_of(tmp_path / "out", "lm_head.weight"))["lm_head.weight"], head)


@pytest.mark.parametrize("last", [True, False])
def test_a_tensor_in_two_shards(last, make_checkpoint, tmp_path):
    """Other loaders read shards in the order of their names, and keep what they read last."""
    source, name = make_checkpoint(), "model.norm.weight"
    shards = sorted(source.glob("*.safetensors"))
    listed = shard_of(source, name)
    other = shards[0] if last else shards[-1]
    if other == listed:
        other = shards[1]
    if (other < listed) != last:
        listed, other = other, listed
        index = json.loads((source / "model.safetensors.index.json").read_text())
        index["weight_map"][name] = listed.name
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in (listed, other):
        save_file(load_file(shard) | {name: torch.ones(64).bfloat16()}, shard, metadata={"format": "pt"})
    if last:
        convert_checkpoint(source, tmp_path / "out", dry_run=True)
        return
    with pytest.raises(
        CheckpointError, match=f"'{name}' is in {listed.name}, which the index names, and in {other.name}"
    ):
        convert_checkpoint(source, tmp_path / "out", dry_run=True)


def test_an_unknown_tensor_is_announced_to_whom_it_stops(make_checkpoint, tmp_path):
    notes = convert_checkpoint(make_checkpoint(edit=add("model.extra.weight")), tmp_path / "out", method="minmax").notes
    (line,) = [note for note in notes if "no parameter for tensor 'model.extra.weight' and will not load" in note]
    assert line.startswith("vllm-ascend")
    assert check_placement(tmp_path / "out", "sglang", 1, True) == ()
    (problem,) = check_placement(tmp_path / "out", "vllm-ascend", 1, True)
    assert "no parameter for tensor 'model.extra.weight'" in problem
