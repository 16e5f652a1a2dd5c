"""A family's columns: prefixes, roots and paths of names, tensors that pass through, biases that a table allows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import published
import pytest
import torch
from safetensors.torch import load_file, save_file

import npuq
import npuq.runtime
from npuq.convert.calibrate.settings import CalibrationText
from npuq.engines.parameters import MODELS, parameter_problems, refused_names
from npuq.errors import CheckpointError
from npuq.formats.schemes import Scheme
from npuq.models import families
from npuq.models.block_draft import BlockDraft
from npuq.models.config import ModelConfig
from npuq.models.config_reader import ConfigReader
from npuq.models.family import Block, Entry, Family
from npuq.models.inventory import take_inventory
from npuq.models.roles import Role
from npuq.models.tensors import ModelTensors, expected_specs

V3 = families.FAMILIES["deepseek_v3"]
TOKENS = torch.randint(2, 320, (40,), generator=torch.Generator().manual_seed(4)).tolist()


@dataclass(frozen=True)
class Shape:
    shape: tuple[int, ...]


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Family]:
    """Put a variant of DeepSeek-V3's family in its place."""

    def install(**columns: object) -> Family:
        changed = replace(V3, **columns)
        monkeypatch.setitem(families.FAMILIES, "deepseek_v3", changed)
        return changed

    return install


@pytest.fixture(scope="module")
def config(example_fp8: Path) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((example_fp8 / "config.json").read_text()))


def shapes(config: ModelConfig) -> dict[str, Shape]:
    return {name: Shape(spec.shape) for name, spec in expected_specs(config, (config.num_hidden_layers,)).items()}


def renamed(name: str) -> str:
    name = name.replace("model.layers.", "decoder.").replace("mlp.experts.", "moe.each.")
    return f"language_model.{name}"


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=families.FAMILIES.keys())
def test_a_table_speaks_of_what_is_there(family: Family, config: ModelConfig, example_fp8: Path) -> None:
    if family.hyper_connections is None:
        raw = json.loads((example_fp8 / "config.json").read_text())
        attention = family.attention.read(ConfigReader(raw))
        model = replace(config, model_type=family.model_type, attention=attention)
    else:
        model = ModelConfig.from_dict(published.V4_FLASH_0731)
    sizes, known = ModelTensors(model).sizes_at(0), {activation.name for activation in family.activations}
    assert len(known) == len(family.activations)
    words = {
        "always",
        "mtp",
        "dense",
        "moe",
        *BlockDraft.KEYS,
        *model.attention.conditions(0),
        *(model.moe.conditions(0) if model.moe else ()),
    }
    assert {activation.size for activation in family.activations} <= {None, *sizes}
    assert all((activation.basis is None) == (activation.size is None) for activation in family.activations)
    for block, entries in family.blocks.items():
        parts = [entry.part for entry in entries]
        assert len(set(parts)) == len(parts)
        for entry in entries:
            assert {*entry.reads, *({entry.writes} if entry.writes else ())} <= known, (block, entry)
            assert {*entry.shape, *(entry.heads or ())} <= sizes.keys(), (block, entry)
            assert {entry.when, entry.optional} <= {*words, "never"}, (block, entry)
            assert entry.fused is None or entry.fused in parts, (block, entry)
            assert (len(entry.shape) == 2) == (entry.kind in ("linear", "lookup")), (block, entry)
            # Who reads a basis that is turned reads nothing else: one rotation turns its inputs.
            assert len({family.activation(name).basis for name in entry.reads}) <= 1, (block, entry)
    layers = {block: entries for block, entries in family.blocks.items() if block not in (Block.TOP, Block.EXPERT)}
    inside = [entry.name for entries in layers.values() for entry in entries]
    assert len(set(inside)) == len(inside)


def test_an_engine_that_is_not_known_to_read_a_family_says_so(
    config: ModelConfig, example_fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = replace(V3, model_type="new", architecture="NewForCausalLM")
    monkeypatch.setitem(families.FAMILIES, "new", family)
    raw = {**json.loads((example_fp8 / "config.json").read_text()), "model_type": "new"}
    for engine in MODELS:
        (line,) = parameter_problems(engine, raw, dict.fromkeys(shapes(config), Scheme.FLOAT))
        assert "does not know what it reads of a new" in line
        assert refused_names(engine, family, ["stray"]) == []


def test_every_name_has_its_prefix_root_and_expert_path(config: ModelConfig, family: Callable[..., Family]) -> None:
    before = shapes(config)
    changed = family(prefix="language_model.", layers="decoder.", experts="moe.each.")
    assert list(shapes(config)) == [renamed(name) for name in before]
    assert changed.layer_of("language_model.decoder.12.input_layernorm.weight", 61) == 12
    assert changed.layer_of("decoder.12.input_layernorm.weight", 61) is None
    assert changed.find("language_model.decoder.3.moe.each.17.up_proj.weight") == (
        Block.EXPERT, changed.entry(Block.EXPERT, "up"), 17,
    )  # fmt: skip


def test_a_checkpoint_under_other_names_converts_and_runs(
    config: ModelConfig, family: Callable[..., Family], example_fp8: Path, tmp_path: Path
) -> None:
    """The same bytes under the names, the same logits, a sound artifact: with a rotation and calibrated smoothing."""
    other = tmp_path / "other"
    shutil.copytree(example_fp8, other)
    (other / "model.safetensors.index.json").unlink()
    tensors: dict[str, torch.Tensor] = {}
    for shard in other.glob("*.safetensors"):
        tensors |= {renamed(name): tensor for name, tensor in load_file(shard).items()}
        shard.unlink()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    text = CalibrationText(samples=4, sequence_length=32)
    npuq.convert_checkpoint(example_fp8, tmp_path / "plain", method="rotate+smooth+minmax", calibration=text)
    plain = next(npuq.runtime.load(tmp_path / "plain", "cpu").logits([TOKENS]))

    family(prefix="language_model.", layers="decoder.", experts="moe.each.")
    npuq.convert_checkpoint(other, tmp_path / "out", method="rotate+smooth+minmax", calibration=text)
    assert npuq.verify(tmp_path / "out", source=other).ok
    assert torch.equal(next(npuq.runtime.load(tmp_path / "out", "cpu").logits([TOKENS])), plain)
    ours, theirs = ({}, {})
    for found, directory in ((theirs, tmp_path / "plain"), (ours, tmp_path / "out")):
        for shard in directory.glob("*.safetensors"):
            found.update(load_file(shard))
    assert {renamed(name) for name in theirs} == ours.keys()
    assert all(torch.equal(tensor, ours[renamed(name)]) for name, tensor in theirs.items())


def test_tensors_that_pass_through_are_no_surprise(config: ModelConfig, family: Callable[..., Family]) -> None:
    weights = shapes(config) | {"vision.patch.weight": Shape((3,)), "audio.weight": Shape((3,))}
    assert take_inventory(config, weights).unknown == ("vision.patch.weight", "audio.weight")
    family(passthrough=("vision.*",))
    inventory = take_inventory(config, weights)
    assert inventory.unknown == ("audio.weight",)
    assert inventory.specs["vision.patch.weight"].role is Role.OTHER


def test_only_biases_of_the_table_are_allowed(config: ModelConfig, family: Callable[..., Family]) -> None:
    bias = "model.layers.1.self_attn.q_a_proj.bias"
    with pytest.raises(CheckpointError, match=f"'{bias}'.*without biases"):
        take_inventory(config, shapes(config) | {bias: Shape((config.attention.q_lora_rank or 0,))})
    entry = Entry("q_a_bias", "self_attn.q_a_proj.bias", Role.ATTENTION, ("q_lora",), "vector", when="q_lora")
    family(blocks=V3.blocks | {Block.ATTENTION: (*V3.blocks[Block.ATTENTION], entry)})
    assert take_inventory(config, shapes(config)).specs[bias].entry is entry
    with pytest.raises(CheckpointError, match=r"'model\.norm\.bias'"):
        take_inventory(config, shapes(config) | {"model.norm.bias": Shape((config.hidden_size,))})


def test_conditions_hold_for_a_layer(config: ModelConfig) -> None:
    """The example's first layer is dense, its last one predicts several tokens."""
    specs = expected_specs(config, (config.num_hidden_layers,)).values()
    layers = {block: {spec.layer for spec in specs if spec.block is block} for block in Block}
    assert layers[Block.DENSE] == {0}
    assert layers[Block.EXPERT] == layers[Block.SHARED] == set(range(1, config.num_hidden_layers + 1))
    assert layers[Block.MTP] == {config.num_hidden_layers}
    assert layers[Block.ATTENTION] == set(range(config.num_hidden_layers + 1))


def test_a_family_may_lack_blocks(config: ModelConfig, family: Callable[..., Family]) -> None:
    """One without shared experts and without multi-token prediction has none of their parts, and says so."""
    family(blocks={key: V3.blocks[key] for key in V3.blocks if key not in (Block.SHARED, Block.MTP)})
    tensors = ModelTensors(config)
    layer = config.num_hidden_layers - 1
    assert tensors.has(Block.EXPERT, "down", layer) and not tensors.has(Block.SHARED, "down", layer)
    assert config.family.readers("mlp_input", Block.SHARED) == ()
    specs = list(tensors.unroll(()))
    assert not [spec for spec in specs if spec.block in (Block.SHARED, Block.MTP)]
    weights = {spec.name: Shape(spec.shape) for spec in specs}
    stray = config.name(Block.LAYER, "input_norm", config.num_hidden_layers)
    with pytest.raises(CheckpointError, match="no multi-token-prediction layer \\(this family has none\\)"):
        take_inventory(config, weights | {stray: Shape((config.hidden_size,))})


def test_a_family_may_have_no_experts(example_fp8: Path, config: ModelConfig, family: Callable[..., Family]) -> None:
    """Its keys of routing are not read, a stray expert is refused, and the engines' requirements speak of the rest."""
    family(
        moe=None,
        blocks={
            block: V3.blocks[block] for block in (Block.TOP, Block.LAYER, Block.ATTENTION, Block.DENSE, Block.EXPERT)
        },
    )
    raw = json.loads((example_fp8 / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    dense = ModelConfig.from_dict(raw | {"topk_method": "unheard of"})
    assert (dense.moe, dense.n_routed_experts) == (None, 0)
    weights = {name: Shape(spec.shape) for name, spec in expected_specs(dense, ()).items()}
    assert not [name for name in weights if ".experts." in name]
    assert set(take_inventory(dense, weights).specs) == set(weights)
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.up_proj\.weight' is there, but config\.json has no experts"
    ):
        take_inventory(dense, weights | {"model.layers.1.mlp.experts.0.up_proj.weight": Shape((8, 8))})
    for engine in MODELS:
        assert list(parameter_problems(engine, raw, dict.fromkeys(weights, Scheme.FLOAT))) == []


def test_a_family_says_what_its_blocks_compute(example_fp8: Path, family: Callable[..., Family]) -> None:
    raw = json.loads((example_fp8 / "config.json").read_text())
    with pytest.raises(CheckpointError, match="attention_bias true is not supported"):
        ModelConfig.from_dict(raw | {"attention_bias": True})
    family(fixed={"hidden_act": "gelu", "attention_bias": True})
    ModelConfig.from_dict(raw | {"hidden_act": "gelu", "attention_bias": True, "rope_interleave": False})
    ModelConfig.from_dict(raw | {"hidden_act": None, "attention_bias": None})
    with pytest.raises(CheckpointError, match="attention_bias false is not supported"):
        ModelConfig.from_dict(raw | {"hidden_act": "gelu", "attention_bias": False})
    with pytest.raises(CheckpointError, match="hidden_act 'silu' is unknown; npuq knows gelu"):
        ModelConfig.from_dict(raw | {"hidden_act": "silu"})
