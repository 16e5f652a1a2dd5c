"""Routed experts: their number, their layers, and the router's gating."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from .config_reader import ConfigReader


class MoeLayers(Protocol):
    """A rule by which layers have experts."""

    def has_experts(self, layer: int) -> bool:
        """True for a layer with routed experts; multi-token-prediction layers count on from the decoder layers."""

    def keys(self) -> Mapping[str, Any]:
        """The keys of config.json that decide, with their values."""


@dataclass(frozen=True)
class DenseFirst:
    """Dense layers come first; of the others each `moe_layer_freq`-th has experts."""

    first_k_dense_replace: int
    moe_layer_freq: int = 1

    def has_experts(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def keys(self) -> dict[str, Any]:
        return {"first_k_dense_replace": self.first_k_dense_replace, "moe_layer_freq": self.moe_layer_freq}


@dataclass(frozen=True)
class SparseStep:
    """The last of each `decoder_sparse_step` layers has experts, except for those of `mlp_only_layers`."""

    decoder_sparse_step: int
    mlp_only_layers: frozenset[int]

    def has_experts(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def keys(self) -> dict[str, Any]:
        return {"decoder_sparse_step": self.decoder_sparse_step, "mlp_only_layers": sorted(self.mlp_only_layers)}


@dataclass(frozen=True)
class Moe:
    """The experts of a model's sparse layers, under Hugging Face's names."""

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    layers: MoeLayers
    n_group: int
    topk_group: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float

    # The key of config.json that decides a condition.
    KEYS: ClassVar[Mapping[str, str]] = {"router_bias": "topk_method", "shared_experts": "n_shared_experts"}

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
        return self.layers.has_experts(layer)

    def sizes(self) -> dict[str, int]:
        """Words of a table's shapes."""
        return {
            "experts": self.n_routed_experts,
            "moe_intermediate": self.moe_intermediate_size,
            "shared_intermediate": self.shared_intermediate_size,
        }

    def conditions(self, layer: int) -> dict[str, bool]:
        """The table's words of conditions; True for those that hold in a layer with experts: in all or in none."""
        return {"router_bias": self.has_router_bias, "shared_experts": self.n_shared_experts > 0}

    def tokens_of_expert(self, tokens: int) -> int:
        """Tokens of each expert, rounded down, when `tokens` tokens are spread evenly."""
        return tokens * self.num_experts_per_tok // self.n_routed_experts


class MoeReader(Protocol):
    """Reads the experts of a family from config.json: a column of the family."""

    @property
    def reads_layer_types(self) -> bool:
        """True where transformers reads `mlp_layer_types`."""

    def read(self, read: ConfigReader) -> Moe:
        """Read and check the experts' part of a config; CheckpointError names the key that is wrong."""

    def stated(self, moe: Moe) -> Mapping[str, Any]:
        """Keys that an artifact's config.json states, with their values: without them loaders fail, or take another
        loader's default."""
