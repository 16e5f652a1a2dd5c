"""What a checkpoint of each family must contain: the role and shape of every tensor, as one table a family.

The only file that knows model families. From a config the table is unrolled forwards into names, so that checking a
checkpoint is a dictionary lookup a tensor, however many there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import chain

from ..errors import CheckpointError
from .config import ModelConfig


class Role(str, Enum):
    """What a tensor does in the model; recipes choose by it. `mtp_…` roles sit in layers >= num_hidden_layers."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    KV_B = "kv_b"
    ATTENTION = "attention"
    DENSE_MLP = "dense_mlp"
    SHARED_EXPERT = "shared_expert"
    ROUTED_EXPERT = "routed_expert"
    MTP_EMBEDDING = "mtp_embedding"
    MTP_HEAD = "mtp_head"
    MTP_NORM = "mtp_norm"
    MTP_PROJECTION = "mtp_projection"
    MTP_ROUTER = "mtp_router"
    MTP_ROUTER_BIAS = "mtp_router_bias"
    MTP_KV_B = "mtp_kv_b"
    MTP_ATTENTION = "mtp_attention"
    MTP_DENSE_MLP = "mtp_dense_mlp"
    MTP_SHARED_EXPERT = "mtp_shared_expert"
    MTP_ROUTED_EXPERT = "mtp_routed_expert"
    OTHER = "other"

    __str__ = str.__str__

    @property
    def in_mtp(self) -> Role:
        """The same role inside a multi-token-prediction layer."""
        return self if self.value.startswith("mtp_") else Role("mtp_" + self.value)


ROUTED = frozenset({Role.ROUTED_EXPERT, Role.MTP_ROUTED_EXPERT})
ROUTER_BIASES = frozenset({Role.ROUTER_BIAS, Role.MTP_ROUTER_BIAS})
# The linears that a recipe may quantize. Everything else stays float in every loader.
QUANTIZABLE = ROUTED | {
    Role.ATTENTION,
    Role.DENSE_MLP,
    Role.SHARED_EXPERT,
    Role.MTP_ATTENTION,
    Role.MTP_DENSE_MLP,
    Role.MTP_SHARED_EXPERT,
}


@dataclass(frozen=True)
class Entry:
    """One line of a family's table. `shape` and `when` use the words of `_dimensions` and `_traits`."""

    name: str
    role: Role
    shape: tuple[str, ...]
    when: str = "always"  # the tensor exists only in models with this trait
    optional: str = "never"  # … and may be absent from those with this one
    row_parallel: bool = False  # tensor-parallel ranks split K: W4A8 keeps one scale_bias a slice


@dataclass(frozen=True)
class Family:
    """The tensors of one model family, and which linears its loaders fuse into one parameter."""

    model_types: tuple[str, ...]
    top: tuple[Entry, ...]
    layer: tuple[Entry, ...]
    dense: tuple[Entry, ...]
    moe: tuple[Entry, ...]
    expert: tuple[Entry, ...]
    mtp: tuple[Entry, ...]
    fused: tuple[tuple[str, ...], ...]  # sibling projections that must share a scheme


def _mlp(prefix: str, role: Role, width: str, when: str = "always") -> tuple[Entry, ...]:
    return (
        Entry(f"{prefix}gate_proj.weight", role, (width, "hidden"), when),
        Entry(f"{prefix}up_proj.weight", role, (width, "hidden"), when),
        Entry(f"{prefix}down_proj.weight", role, ("hidden", width), when, row_parallel=True),
    )


DEEPSEEK = Family(
    model_types=("deepseek_v2", "deepseek_v3", "kimi_k2"),
    top=(
        Entry("model.embed_tokens.weight", Role.EMBEDDING, ("vocab", "hidden")),
        Entry("model.norm.weight", Role.NORM, ("hidden",)),
        Entry("lm_head.weight", Role.HEAD, ("vocab", "hidden")),
    ),
    layer=(
        Entry("input_layernorm.weight", Role.NORM, ("hidden",)),
        Entry("post_attention_layernorm.weight", Role.NORM, ("hidden",)),
        Entry("self_attn.q_proj.weight", Role.ATTENTION, ("q", "hidden"), when="full_q"),
        Entry("self_attn.q_a_proj.weight", Role.ATTENTION, ("q_lora", "hidden"), when="q_lora"),
        Entry("self_attn.q_a_layernorm.weight", Role.NORM, ("q_lora",), when="q_lora"),
        Entry("self_attn.q_b_proj.weight", Role.ATTENTION, ("q", "q_lora"), when="q_lora"),
        Entry("self_attn.kv_a_proj_with_mqa.weight", Role.ATTENTION, ("kv_a", "hidden")),
        Entry("self_attn.kv_a_layernorm.weight", Role.NORM, ("kv_lora",)),
        Entry("self_attn.kv_b_proj.weight", Role.KV_B, ("kv_b", "kv_lora")),
        Entry("self_attn.o_proj.weight", Role.ATTENTION, ("hidden", "v")),
    ),
    dense=_mlp("mlp.", Role.DENSE_MLP, "intermediate"),
    moe=(
        Entry("mlp.gate.weight", Role.ROUTER, ("experts", "hidden")),
        Entry("mlp.gate.e_score_correction_bias", Role.ROUTER_BIAS, ("experts",), when="router_bias"),
        *_mlp("mlp.shared_experts.", Role.SHARED_EXPERT, "shared_intermediate", when="shared_experts"),
    ),
    expert=_mlp("", Role.ROUTED_EXPERT, "moe_intermediate"),
    mtp=(
        Entry("eh_proj.weight", Role.MTP_PROJECTION, ("hidden", "two_hidden")),
        Entry("enorm.weight", Role.MTP_NORM, ("hidden",)),
        Entry("hnorm.weight", Role.MTP_NORM, ("hidden",)),
        # Copies of the main model's; some releases leave them out.
        Entry("embed_tokens.weight", Role.MTP_EMBEDDING, ("vocab", "hidden"), optional="always"),
        Entry("shared_head.norm.weight", Role.MTP_NORM, ("hidden",)),
        Entry("shared_head.head.weight", Role.MTP_HEAD, ("vocab", "hidden"), optional="always"),
    ),
    fused=(("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa")),
)

FAMILIES = (DEEPSEEK,)
_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.")


@dataclass(frozen=True)
class Spec:
    """What the architecture says of one tensor of a checkpoint."""

    name: str
    role: Role
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None
    optional: bool = False
    row_parallel: bool = False


def family_of(model_type: str) -> Family:
    """The table for a config's `model_type`. Raises CheckpointError when there is none."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise CheckpointError(f"config.json: model_type {model_type!r} is not known; npuq converts {known}")


def layer_of(name: str) -> int | None:
    """The decoder layer a tensor belongs to: `model.layers.7.mlp…` → 7, None outside the layers."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def expected_specs(config: ModelConfig, mtp_layers: tuple[int, ...]) -> dict[str, Spec]:
    """Every tensor that a model of this config has, by name: what a loader will look for."""
    return {spec.name: spec for spec in unroll(config, mtp_layers)}


def unroll(config: ModelConfig, mtp_layers: Iterable[int], *, main: bool = True) -> Iterator[Spec]:
    """What `expected_specs` has, one after another; without `main` that of the MTP layers alone."""
    family, sizes, traits = family_of(config.model_type), _dimensions(config), _traits(config)

    def take(
        entries: tuple[Entry, ...], prefix: str, layer: int | None, expert: int | None, mtp: bool
    ) -> Iterator[Spec]:
        for entry in entries:
            if entry.when in traits:
                role = entry.role.in_mtp if mtp else entry.role
                shape = tuple(sizes[word] for word in entry.shape)
                optional = entry.optional in traits
                yield Spec(prefix + entry.name, role, shape, layer, expert, optional, entry.row_parallel)

    if main:
        yield from take(family.top, "", None, None, False)
    for layer in chain(range(config.num_hidden_layers) if main else (), mtp_layers):
        mtp = layer >= config.num_hidden_layers
        prefix = f"model.layers.{layer}."
        if mtp:
            yield from take(family.mtp, prefix, layer, None, True)
        yield from take(family.layer, prefix, layer, None, mtp)
        if not config.is_moe_layer(layer):
            yield from take(family.dense, prefix, layer, None, mtp)
            continue
        yield from take(family.moe, prefix, layer, None, mtp)
        for expert in range(config.n_routed_experts):
            yield from take(family.expert, f"{prefix}mlp.experts.{expert}.", layer, expert, mtp)


def _dimensions(config: ModelConfig) -> dict[str, int]:
    heads = config.num_attention_heads
    return {
        "hidden": config.hidden_size,
        "two_hidden": 2 * config.hidden_size,
        "vocab": config.vocab_size,
        "intermediate": config.intermediate_size,
        "moe_intermediate": config.moe_intermediate_size,
        "shared_intermediate": config.moe_intermediate_size * (config.n_shared_experts),
        "experts": config.n_routed_experts,
        "q": heads * config.qk_head_dim,
        "q_lora": config.q_lora_rank or 0,
        "kv_lora": config.kv_lora_rank,
        "kv_a": config.kv_lora_rank + config.qk_rope_head_dim,
        "kv_b": heads * (config.qk_nope_head_dim + config.v_head_dim),
        "v": heads * config.v_head_dim,
    }


def _traits(config: ModelConfig) -> frozenset[str]:
    traits = {
        "always": True,
        "q_lora": config.q_lora_rank is not None,
        "full_q": config.q_lora_rank is None,
        "router_bias": config.topk_method == "noaux_tc",
        "shared_experts": bool(config.n_shared_experts),
    }
    return frozenset(name for name, holds in traits.items() if holds)
