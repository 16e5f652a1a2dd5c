"""Roles of tensors in the model, by which recipes and engines' requirements choose."""

from __future__ import annotations

from enum import Enum


class Role(str, Enum):
    """The role of a tensor in the model; `mtp_…` roles are of multi-token-prediction layers."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    KV_B = "kv_b"
    ATTENTION = "attention"
    INDEXER = "indexer"
    INDEXER_FLOAT = "indexer_float"
    INDEXER_NORM = "indexer_norm"
    BIAS = "bias"
    ATTENTION_OUTPUT = "attention_output"
    ATTENTION_SINK = "attention_sink"
    COMPRESSOR = "compressor"
    HYPER_CONNECTION = "hyper_connection"
    ROUTER_TABLE = "router_table"
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
    MTP_INDEXER = "mtp_indexer"
    MTP_INDEXER_FLOAT = "mtp_indexer_float"
    MTP_INDEXER_NORM = "mtp_indexer_norm"
    MTP_BIAS = "mtp_bias"
    MTP_ATTENTION_OUTPUT = "mtp_attention_output"
    MTP_ATTENTION_SINK = "mtp_attention_sink"
    MTP_COMPRESSOR = "mtp_compressor"
    MTP_HYPER_CONNECTION = "mtp_hyper_connection"
    MTP_ROUTER_TABLE = "mtp_router_table"
    MTP_DENSE_MLP = "mtp_dense_mlp"
    MTP_SHARED_EXPERT = "mtp_shared_expert"
    MTP_ROUTED_EXPERT = "mtp_routed_expert"
    OTHER = "other"

    __str__ = str.__str__

    @property
    def in_mtp(self) -> Role:
        """The same role inside a multi-token-prediction layer."""
        return self if self.value.startswith("mtp_") else Role("mtp_" + self.value)


INDEXER = frozenset({Role.INDEXER, Role.MTP_INDEXER})
ROUTED = frozenset({Role.ROUTED_EXPERT, Role.MTP_ROUTED_EXPERT})
# Roles that a recipe may quantize. All other tensors stay float in every loader.
QUANTIZABLE = ROUTED | {
    Role.ATTENTION,
    Role.INDEXER,
    Role.DENSE_MLP,
    Role.SHARED_EXPERT,
    Role.MTP_ATTENTION,
    Role.MTP_INDEXER,
    Role.MTP_DENSE_MLP,
    Role.MTP_SHARED_EXPERT,
}
