"""The experts' keys of config.json, in DeepSeek's form and in Qwen's: the defaults of loaders, and what all compute
alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import CheckpointError
from .config_reader import MAX_LAYERS, ConfigReader
from .moe import DenseFirst, Moe, SparseStep


@dataclass(frozen=True)
class MoeDefaults:
    """Loaders' defaults of keys that config.json leaves out, and the values that all loaders compute alike.

    norm_topk_probs, topk_methods: the accepted values; the first is the default. reads_layer_types: transformers reads
    `mlp_layer_types` instead of `first_k_dense_replace`, and no `moe_layer_freq`. reads_dense_number: without that list
    it reads `first_k_dense_replace`; else it takes the one of these defaults. unread: keys that no loader of the family
    reads; they have no other value than these defaults, or 1.
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
    unread: tuple[str, ...] = ()

    def read(self, read: ConfigReader) -> Moe:
        """Read and check the experts' part of a config; CheckpointError names the key that is wrong."""
        topk_method = read.choice("topk_method", self.topk_methods, self.topk_methods[0])
        n_group, topk_group = _groups(read, self) if topk_method != "greedy" else (1, 1)  # greedy ignores groups
        # null is DeepSeek's and the engines' way to say no shared experts.
        shared = 0 if read.has_key("n_shared_experts") else self.n_shared_experts
        moe = Moe(
            n_routed_experts=read.size("n_routed_experts"),
            n_shared_experts=read.count("n_shared_experts", shared),
            num_experts_per_tok=read.size("num_experts_per_tok"),
            moe_intermediate_size=read.size("moe_intermediate_size"),
            layers=DenseFirst(_dense_layers(read, self), self._frequency(read)),
            n_group=n_group,
            topk_group=topk_group,
            scoring_func=read.choice("scoring_func", (self.scoring_func,), self.scoring_func),
            topk_method=topk_method,
            norm_topk_prob=read.flag("norm_topk_prob", self.norm_topk_probs[0], nullable=False),
            routed_scaling_factor=read.number("routed_scaling_factor", self.routed_scaling_factor),
        )
        self._check(moe)
        return moe

    def stated(self, moe: Moe) -> dict[str, Any]:
        """Keys that an artifact's config.json states, with their values: without them loaders fail, or take another
        loader's default."""
        stated = {
            "n_routed_experts": moe.n_routed_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            **moe.layers.keys(),
            "scoring_func": moe.scoring_func,
            "topk_method": moe.topk_method,
            "norm_topk_prob": moe.norm_topk_prob,
            "routed_scaling_factor": moe.routed_scaling_factor,
            "n_group": moe.n_group,
            "topk_group": moe.topk_group,
        }
        return {key: value for key, value in stated.items() if key not in self.unread}

    def _frequency(self, read: ConfigReader) -> int:
        frequency = read.size("moe_layer_freq", 1)
        if frequency != 1 and "moe_layer_freq" in self.unread:
            raise CheckpointError(
                f"config.json: moe_layer_freq {frequency} is not read by the loaders of this family, in which every "
                "layer behind the dense ones has experts: remove it"
            )
        return frequency

    def _check(self, moe: Moe) -> None:
        if moe.n_routed_experts % moe.n_group or moe.topk_group > moe.n_group:
            raise CheckpointError(
                f"config.json: {moe.n_routed_experts} experts in n_group {moe.n_group} groups, topk_group "
                f"{moe.topk_group}: groups must divide the experts and hold topk_group"
            )
        if moe.topk_method == "noaux_tc" and moe.n_routed_experts // moe.n_group < 2:
            raise CheckpointError(
                f"config.json: n_group {moe.n_group} makes groups of one expert, and noaux_tc scores a group by the "
                "sum of its two best: no loader computes that"
            )
        _check_chosen(moe.num_experts_per_tok, moe.n_routed_experts // moe.n_group * moe.topk_group)
        if moe.norm_topk_prob not in self.norm_topk_probs:
            raise CheckpointError(
                f"config.json: norm_topk_prob {str(moe.norm_topk_prob).lower()} is not supported: transformers, the "
                "models' own code and the engines each compute something else, and no released model has it"
            )


@dataclass(frozen=True)
class SparseStepDefaults:
    """Qwen's keys: a softmax over all experts, no groups, no shared experts, layers by `decoder_sparse_step` and
    `mlp_only_layers`."""

    norm_topk_prob: bool

    reads_layer_types: ClassVar[bool] = False

    def read(self, read: ConfigReader) -> Moe:
        """Read and check the experts' part of a config; CheckpointError names the key that is wrong."""
        layers = read.size("num_hidden_layers", most=MAX_LAYERS)
        moe = Moe(
            n_routed_experts=read.size("n_routed_experts"),
            n_shared_experts=0,
            num_experts_per_tok=read.size("num_experts_per_tok"),
            moe_intermediate_size=read.size("moe_intermediate_size"),
            layers=SparseStep(
                read.size("decoder_sparse_step", 1), frozenset(read.numbers("mlp_only_layers", layers - 1))
            ),
            n_group=1,
            topk_group=1,
            scoring_func="softmax",
            topk_method="greedy",
            norm_topk_prob=read.flag("norm_topk_prob", self.norm_topk_prob, nullable=False),
            routed_scaling_factor=1.0,
        )
        _check_chosen(moe.num_experts_per_tok, moe.n_routed_experts)
        return moe

    def stated(self, moe: Moe) -> dict[str, Any]:
        """Keys that an artifact's config.json states, with their values: without them loaders fail, or take another
        loader's default."""
        return {
            # transformers 5 saves num_local_experts, which earlier releases and the engines do not read.
            "num_experts": moe.n_routed_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            **moe.layers.keys(),
            "norm_topk_prob": moe.norm_topk_prob,
        }


def _check_chosen(chosen: int, experts: int) -> None:
    if chosen > experts:
        raise CheckpointError(f"config.json: num_experts_per_tok {chosen} exceeds the experts that its groups hold")


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
