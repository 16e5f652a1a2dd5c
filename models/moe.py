"""Routed experts: their number, their layers, and the router's gating."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import CheckpointError
from .config_reader import MAX_LAYERS, ConfigReader


@dataclass(frozen=True)
class MoeDefaults:
    """Loaders' defaults of keys that config.json leaves out, and the values that all loaders compute alike.

    norm_topk_probs, topk_methods: the accepted values; the first is the default. reads_layer_types: transformers reads
    `mlp_layer_types` instead of `first_k_dense_replace`, and no `moe_layer_freq`. reads_dense_number: without that list
    it reads `first_k_dense_replace`; else it takes the one of these defaults.
    """

    first_k_dense_replace: int
    n_shared_experts: int
    n_group: int | None
    topk_group: int | None
    norm_topk_probs: tuple[bool, ...]
    routed_scaling_factor: float
    scoring_func: str
    topk_methods: tuple[str, ...]
    reads_layer_types: bool = False
    reads_dense_number: bool = True


@dataclass(frozen=True)
class Moe:
    """The experts of a model's sparse layers, under Hugging Face's names."""

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    moe_layer_freq: int
    n_group: int
    topk_group: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float

    # The key of config.json that decides a condition.
    KEYS: ClassVar[Mapping[str, str]] = {"router_bias": "topk_method", "shared_experts": "n_shared_experts"}
    # The keys that decide which layers have experts.
    LAYER_KEYS: ClassVar[tuple[str, ...]] = ("first_k_dense_replace", "moe_layer_freq")
    # Keys that an artifact's config.json states: without them loaders fail, or take another loader's default.
    STATED: ClassVar[tuple[str, ...]] = (
        "n_routed_experts",
        "num_experts_per_tok",
        "first_k_dense_replace",
        "moe_layer_freq",
        "scoring_func",
        "topk_method",
        "norm_topk_prob",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
    )

    @classmethod
    def read(cls, read: ConfigReader, default: MoeDefaults) -> Moe:
        """Read and check the experts' part of a config; CheckpointError names the key that is wrong."""
        topk_method = read.choice("topk_method", default.topk_methods, default.topk_methods[0])
        n_group, topk_group = _groups(read, default) if topk_method != "greedy" else (1, 1)  # greedy ignores groups
        # null is DeepSeek's and the engines' way to say no shared experts.
        shared = 0 if read.has_key("n_shared_experts") else default.n_shared_experts
        moe = cls(
            n_routed_experts=read.size("n_routed_experts"),
            n_shared_experts=read.count("n_shared_experts", shared),
            num_experts_per_tok=read.size("num_experts_per_tok"),
            moe_intermediate_size=read.size("moe_intermediate_size"),
            first_k_dense_replace=_dense_layers(read, default),
            moe_layer_freq=read.size("moe_layer_freq", 1),
            n_group=n_group,
            topk_group=topk_group,
            scoring_func=read.choice("scoring_func", (default.scoring_func,), default.scoring_func),
            topk_method=topk_method,
            norm_topk_prob=read.flag("norm_topk_prob", default.norm_topk_probs[0], nullable=False),
            routed_scaling_factor=read.number("routed_scaling_factor", default.routed_scaling_factor),
        )
        moe._check(default)
        return moe

    @property
    def shared_intermediate_size(self) -> int:
        """Channels of all shared experts, which are one block of tensors; 0 without."""
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def has_router_bias(self) -> bool:
        """True where a bias corrects the router's scores for the choice of experts."""
        return self.topk_method == "noaux_tc"

    def has_experts(self, layer: int) -> bool:
        """True for a layer with routed experts; multi-token-prediction layers count on from the decoder layers."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def sizes(self) -> dict[str, int]:
        """Words of a table's shapes."""
        return {
            "experts": self.n_routed_experts,
            "moe_intermediate": self.moe_intermediate_size,
            "shared_intermediate": self.shared_intermediate_size,
        }

    def conditions(self) -> dict[str, bool]:
        """The table's words of conditions; True for those that hold in a layer with experts."""
        return {"router_bias": self.has_router_bias, "shared_experts": self.n_shared_experts > 0}

    def tokens_of_expert(self, tokens: int) -> int:
        """Tokens of each expert, rounded down, when `tokens` tokens are spread evenly."""
        return tokens * self.num_experts_per_tok // self.n_routed_experts

    def _check(self, default: MoeDefaults) -> None:
        if self.n_routed_experts % self.n_group or self.topk_group > self.n_group:
            raise CheckpointError(
                f"config.json: {self.n_routed_experts} experts in n_group {self.n_group} groups, topk_group "
                f"{self.topk_group}: groups must divide the experts and hold topk_group"
            )
        if self.topk_method == "noaux_tc" and self.n_routed_experts // self.n_group < 2:
            raise CheckpointError(
                f"config.json: n_group {self.n_group} makes groups of one expert, and noaux_tc scores a group by the "
                "sum of its two best: no loader computes that"
            )
        if self.num_experts_per_tok > self.n_routed_experts // self.n_group * self.topk_group:
            raise CheckpointError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} exceeds the experts that its groups hold"
            )
        if self.norm_topk_prob not in default.norm_topk_probs:
            raise CheckpointError(
                f"config.json: norm_topk_prob {str(self.norm_topk_prob).lower()} is not supported: transformers, the "
                "models' own code and the engines each compute something else, and no released model has it"
            )


def _groups(read: ConfigReader, default: MoeDefaults) -> tuple[int, int]:
    """n_group and topk_group. A null n_group says that there are no groups; no loader has a default for it."""
    if read.has_key("n_group") and not read.has_value("n_group"):
        return 1, 1
    n_group = read.size("n_group", default.n_group)
    if n_group == 1 and not read.has_value("topk_group"):
        return 1, 1
    return n_group, read.size("topk_group", default.topk_group, nullable=False)


def _dense_layers(read: ConfigReader, default: MoeDefaults) -> int:
    """The number of dense layers, which come first.

    CheckpointError where transformers' list and the engines' number disagree, and for a list with a dense layer behind
    a sparse one.
    """
    dense = default.first_k_dense_replace
    types = read.words("mlp_layer_types") if default.reads_layer_types else None
    if types is not None:
        layers, dense = read.size("num_hidden_layers", most=MAX_LAYERS), types.count("dense")
        if types != ["dense"] * dense + ["sparse"] * (layers - dense):
            raise CheckpointError(
                f"config.json: mlp_layer_types must be {layers} words, first 'dense' ones, then 'sparse' ones; engines "
                "read no other order"
            )
    stated = read.count("first_k_dense_replace", dense, nullable=False)
    if types is None and default.reads_dense_number:
        dense = stated
    frequency = read.size("moe_layer_freq", 1)
    if default.reads_layer_types and (stated, frequency) != (dense, 1):
        raise CheckpointError(
            f"config.json: first_k_dense_replace {stated} and moe_layer_freq {frequency} count for the engines, and "
            f"transformers has {dense} dense layers (mlp_layer_types, without it the first): keep one of both"
        )
    return stated
