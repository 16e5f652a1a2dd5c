"""DeepSeek-V4's experts: in the first layers a table of token ids chooses them, in the others their scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from ..errors import CheckpointError
from .config_reader import MAX_LAYERS, ConfigReader
from .moe import Moe

_MAX_LIMIT: Final = 1e6


@dataclass(frozen=True)
class EveryLayer:
    """Every layer has experts."""

    def has_experts(self, layer: int) -> bool:
        return True

    def keys(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class HashMoe(Moe):
    """The experts of a model without dense layers.

    num_hash_layers: the first layers, whose experts a table gives for each token id. swiglu_limit: the experts compute
    silu(min(gate, limit)) · clamp(up, ±limit).
    """

    num_hash_layers: int
    swiglu_limit: float

    KEYS: ClassVar[Mapping[str, str]] = {"router_bias": "num_hash_layers", "router_table": "num_hash_layers"}

    def is_hashed(self, layer: int) -> bool:
        """True for a layer whose experts the table gives."""
        return layer < self.num_hash_layers

    def sizes(self) -> dict[str, int]:
        """Words of a table's shapes."""
        return {**super().sizes(), "chosen": self.num_experts_per_tok}

    def conditions(self, layer: int) -> dict[str, bool]:
        """The table's words of conditions; True for those that hold in a layer."""
        return {
            "router_bias": not self.is_hashed(layer),
            "router_table": self.is_hashed(layer),
            "shared_experts": True,
        }


@dataclass(frozen=True)
class HashMoeDefaults:
    """Reads the experts of DeepSeek-V4 from config.json, with its defaults."""

    routed_scaling_factor: float = 1.5
    scoring_func: str = "sqrtsoftplus"
    num_hash_layers: int = 3

    reads_layer_types: ClassVar[bool] = True

    def read(self, read: ConfigReader) -> HashMoe:
        """Read and check the experts' part of a config; CheckpointError names the key that is wrong."""
        # transformers computes one shared expert whatever the config says.
        read.only("n_shared_experts", 1)
        for key in ("n_group", "topk_group"):
            read.only(key, 1)
        read.fixed("topk_method", "noaux_tc")
        read.fixed("norm_topk_prob", True)
        layers = read.size("num_hidden_layers", most=MAX_LAYERS)
        moe = HashMoe(
            n_routed_experts=read.size("n_routed_experts"),
            n_shared_experts=1,
            num_experts_per_tok=read.size("num_experts_per_tok"),
            moe_intermediate_size=read.size("moe_intermediate_size"),
            layers=EveryLayer(),
            n_group=1,
            topk_group=1,
            scoring_func=read.choice("scoring_func", (self.scoring_func,), self.scoring_func),
            topk_method="noaux_tc",
            norm_topk_prob=True,
            routed_scaling_factor=read.number("routed_scaling_factor", self.routed_scaling_factor),
            num_hash_layers=read.count("num_hash_layers", min(self.num_hash_layers, layers), most=layers),
            swiglu_limit=read.number("swiglu_limit", None, 0.0, _MAX_LIMIT),
        )
        if moe.num_experts_per_tok > moe.n_routed_experts:
            raise CheckpointError(
                f"config.json: num_experts_per_tok {moe.num_experts_per_tok} exceeds the {moe.n_routed_experts} experts"
            )
        if moe.swiglu_limit == 0:
            raise CheckpointError("config.json: swiglu_limit 0 makes every expert's output 0; no model has it")
        return moe

    def stated(self, moe: Moe) -> dict[str, Any]:
        """Keys that an artifact's config.json states, with their values: without them loaders fail, or take another
        loader's default."""
        assert isinstance(moe, HashMoe)
        return {
            "n_routed_experts": moe.n_routed_experts,
            "n_shared_experts": moe.n_shared_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "num_hash_layers": moe.num_hash_layers,
            "scoring_func": moe.scoring_func,
            "topk_method": moe.topk_method,
            "norm_topk_prob": moe.norm_topk_prob,
            "routed_scaling_factor": moe.routed_scaling_factor,
            "swiglu_limit": moe.swiglu_limit,
        }
