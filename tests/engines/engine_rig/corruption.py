"""Copies of an artifact with one thing wrong, to show that the checks would see it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npuq.formats.artifact import DESCRIPTION_NAME

Tensors = dict[str, Tensor]
Tags = dict[str, str]
Corruption = Callable[[Tensors, Tags], None]

LAYER = "model.layers.1"
EXPERT = f"{LAYER}.mlp.experts.3"
MTP = "model.layers.2"  # the first after the model's own


def corrupt(artifact: Path, target: Path, how: Corruption) -> Path:
    """A copy of `artifact` at `target`, in one shard, after `how` changed its tensors and its description."""
    shutil.copytree(artifact, target)
    tensors: Tensors = {}
    for shard in target.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    description = json.loads((target / DESCRIPTION_NAME).read_text())
    how(tensors, description)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / DESCRIPTION_NAME).write_text(json.dumps(description))
    return target


def corruptions() -> Iterator[tuple[str, Corruption]]:
    """Every kind of tensor of a layer: renamed, of another shape, tagged otherwise, of another content."""
    linears = [f"{LAYER}.self_attn.{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj")]
    linears += [f"{LAYER}.mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    experts = [f"{EXPERT}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    for prefix in linears + experts:
        for leaf in ("weight", "weight_scale", "weight_offset", "scale_bias")[: 4 if prefix in experts else 3]:
            name = f"{prefix}.{leaf}"
            yield f"{name} renamed", _rename(name)
            yield f"{name} has a row more", _grow(name)
    floats = [f"{LAYER}.self_attn.{name}" for name in ("kv_b_proj", "q_a_layernorm", "kv_a_layernorm")]
    floats += [f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"]
    floats += ["model.norm", "model.embed_tokens", "lm_head"]
    for name in floats:
        yield f"{name} renamed", _rename(f"{name}.weight")
        yield f"{name} has a row more", _grow(f"{name}.weight")
    for name in (f"{LAYER}.mlp.gate.weight", f"{LAYER}.mlp.gate.e_score_correction_bias"):
        yield f"{name} renamed", _rename(name)
    for prefix in linears:
        yield f"{prefix} tagged FLOAT", _tag(f"{prefix}.weight", "FLOAT")
        yield f"{prefix}.weight_scale tagged FLOAT", _tag(f"{prefix}.weight_scale", "FLOAT")
    for prefix in experts:
        yield f"{prefix}.scale_bias tagged W8A8", _tag(f"{prefix}.scale_bias", "W8A8_DYNAMIC")
        yield f"{prefix}.weight_offset tagged FLOAT", _tag(f"{prefix}.weight_offset", "FLOAT")
    for name in floats:
        yield f"{name} tagged W8A8", _tag(f"{name}.weight", "W8A8_DYNAMIC")
    for name in ("gate_proj", "up_proj", "down_proj"):  # engines read the tags of a layer's first expert alone
        yield f"first expert's {name} tagged W8A8", _tag(f"{LAYER}.mlp.experts.0.{name}.weight", "W8A8_DYNAMIC")
    for prefix in experts:
        yield f"{prefix} nibbles swapped", _change(f"{prefix}.weight", _swap_nibbles)
        yield f"{prefix} bias of other codes", _change(f"{prefix}.scale_bias", lambda bias: bias.roll(1, 0))
        yield f"{prefix} bias of half the factor", _change(f"{prefix}.scale_bias", lambda bias: bias / 2)


def mtp_corruptions() -> Iterator[tuple[str, Corruption]]:
    """What only the draft model reads."""
    for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "self_attn.kv_b_proj"):
        yield f"{MTP}.{name} renamed", _rename(f"{MTP}.{name}.weight")
        yield f"{MTP}.{name} has a row more", _grow(f"{MTP}.{name}.weight")
    for name in (f"{MTP}.self_attn.q_a_proj", f"{MTP}.mlp.experts.15.down_proj"):
        for leaf in ("weight", "weight_scale"):
            yield f"{name}.{leaf} renamed", _rename(f"{name}.{leaf}")
            yield f"{name}.{leaf} has a row more", _grow(f"{name}.{leaf}")
    yield f"{MTP}.self_attn.q_a_proj tagged FLOAT", _tag(f"{MTP}.self_attn.q_a_proj.weight", "FLOAT")
    yield f"{MTP} first expert tagged W4A8", _tag(f"{MTP}.mlp.experts.0.down_proj.weight", "W4A8_DYNAMIC")


def static_corruptions() -> Iterator[tuple[str, Corruption]]:
    """Every tensor of two static linears, one of them fused with another: renamed, or of another content."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "weight": lambda codes: codes.roll(1, 0),
        "input_scale": lambda scale: scale * 2,
        "input_offset": lambda offset: offset + 1,
        "deq_scale": lambda scale: scale * 1.01,
        "quant_bias": lambda bias: bias.roll(1, 0),
    }
    for prefix in (f"{LAYER}.self_attn.q_a_proj", f"{LAYER}.self_attn.o_proj"):
        for leaf, change in changes.items():
            yield f"{prefix}.{leaf} renamed", _rename(f"{prefix}.{leaf}")
            yield f"{prefix}.{leaf} of another linear", _change(f"{prefix}.{leaf}", change)
        yield f"{prefix} tagged dynamic", _tag(f"{prefix}.weight", "W8A8_DYNAMIC")


def released_corruptions() -> Iterator[tuple[str, Corruption]]:
    """DeepSeek-V4: every kind of tensor missing, misnamed, of another shape or dtype, or tagged otherwise."""
    attention, experts = "layers.1.attn", "layers.1.ffn.experts"
    for name in (
        "hc_head_fn",
        "head.weight",
        "layers.0.ffn.gate.tid2eid",
        "layers.1.hc_attn_scale",
        "layers.1.ffn_norm.weight",
        "layers.1.ffn.gate.bias",
        "layers.1.ffn.shared_experts.w3.weight_scale",
        f"{attention}.attn_sink",
        f"{attention}.wq_a.weight_scale",
        f"{attention}.compressor.wgate.weight",
        f"{attention}.compressor.ape",
        f"{attention}.indexer.wq_b.weight_scale",
        f"{attention}.indexer.compressor.norm.weight",
        f"{experts}.3.w2.weight_scale",
        f"{experts}.3.w1.scale_bias",
    ):
        yield f"{name} missing", _drop(name)
    yield "wq_a as transformers calls it", _rename_to(f"{attention}.wq_a.weight", f"{attention}.q_a_proj.weight")
    yield (
        "a layer as transformers calls it",
        _rename_to("layers.1.attn_norm.weight", "layers.1.attention_norm.weight"),
    )
    yield "an expert's gate as its up", _rename_to(f"{experts}.3.w1.weight", f"{experts}.3.w4.weight")
    for name in ("layers.0.ffn.gate.tid2eid", "layers.2.attn.compressor.ape", "layers.1.hc_ffn_fn"):
        yield f"{name} transposed", _change(name, lambda tensor: tensor.mT)
    for name in (f"{attention}.attn_sink", f"{attention}.wkv.weight", "layers.1.ffn.gate.bias", "hc_head_base"):
        yield f"{name} has a row more", _grow(name)
    yield "tid2eid in float", _change("layers.0.ffn.gate.tid2eid", lambda table: table.float())
    yield "wo_a in int8", _change(f"{attention}.wo_a.weight", lambda weight: weight.mul(8).to(torch.int8))
    yield "wkv in bfloat16", _change(f"{attention}.wkv.weight", lambda codes: codes.bfloat16())
    yield "an expert unpacked", _change(f"{experts}.3.w1.weight", lambda codes: codes.repeat_interleave(2, 0))
    yield "an expert's nibbles swapped", _change(f"{experts}.3.w2.weight", _swap_nibbles)
    yield "an expert's bias of other codes", _change(f"{experts}.3.w2.scale_bias", lambda bias: bias.roll(1, 0))
    yield "wq_b tagged FLOAT", _tag(f"{attention}.wq_b.weight", "FLOAT")
    yield "wo_b tagged W8A8", _tag(f"{attention}.wo_b.weight", "W8A8_DYNAMIC")
    yield "indexer tagged FLOAT", _tag(f"{attention}.indexer.wq_b.weight", "FLOAT")
    yield "first expert tagged W8A8", _tag(f"{experts}.0.w2.weight", "W8A8_DYNAMIC")
    yield "no hc_head in the description", _untag("hc_head_fn", "hc_head_base", "hc_head_scale")


def released_mtp_corruptions() -> Iterator[tuple[str, Corruption]]:
    """What only DeepSeek-V4's draft reads."""
    for name in ("e_proj.weight", "hc_head_scale", "norm.weight", "attn.wkv.weight_scale", "ffn.experts.7.w2.weight"):
        yield f"mtp.0.{name} missing", _drop(f"mtp.0.{name}")
    for name in ("h_proj.weight", "attn.wq_a.weight", "hc_attn_base"):
        yield f"mtp.0.{name} has a row more", _grow(f"mtp.0.{name}")
    yield "mtp.0 first expert tagged W4A8", _tag("mtp.0.ffn.experts.0.w2.weight", "W4A8_DYNAMIC")


def _drop(name: str) -> Corruption:
    def how(tensors: Tensors, tags: Tags) -> None:
        del tensors[name], tags[name]

    return how


def _untag(*names: str) -> Corruption:
    def how(tensors: Tensors, tags: Tags) -> None:
        for name in names:
            del tags[name]

    return how


def _rename_to(name: str, new: str) -> Corruption:
    def how(tensors: Tensors, tags: Tags) -> None:
        tensors[new], tags[new] = tensors.pop(name), tags.pop(name)

    return how


def _rename(name: str) -> Corruption:
    def how(tensors: Tensors, tags: Tags) -> None:
        new = name.replace("proj", "prj").replace("norm", "nrm").replace("gate.", "gat.")
        _rename_to(name, new.replace("embed", "embd").replace("lm_head", "lm_hd"))(tensors, tags)

    return how


def _grow(name: str) -> Corruption:
    return _change(name, lambda tensor: torch.cat([tensor, tensor[:1]]))


def _tag(name: str, value: str) -> Corruption:
    def how(tensors: Tensors, tags: Tags) -> None:
        assert tags[name] != value
        tags[name] = value

    return how


def _change(name: str, change: Callable[[Tensor], Tensor]) -> Corruption:
    def how(tensors: Tensors, tags: Tags) -> None:
        changed = change(tensors[name])
        was = tensors[name]
        assert changed.shape != was.shape or changed.dtype != was.dtype or not torch.equal(changed, was)
        tensors[name] = changed

    return how


def _swap_nibbles(packed: Tensor) -> Tensor:
    values = packed.view(torch.uint8)
    return ((values << 4) | (values >> 4)).view(torch.int8)
