"""Blocks shared by several families, under DeepSeek's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..family import Activation, Block, Entry
from ..roles import Role


def norm(
    part: str, name: str, size: str, reads: str, writes: str, role: Role = Role.NORM, when: str = "always"
) -> Entry:
    """The gain of an RMS norm."""
    return Entry(part, name, role, (size,), "norm", (reads,), writes, when=when)


def gated_mlp(role: Role, width: str, prefix: str, when: str) -> tuple[Entry, ...]:
    """A feed-forward block, down(silu(gate) · up), below `prefix`; the product has the channels of `up`."""
    return (
        Entry("gate", f"{prefix}gate_proj.weight", role, (width, "hidden"), reads=("mlp_input",), when=when,
              fused="gate"),
        Entry("up", f"{prefix}up_proj.weight", role, (width, "hidden"), reads=("mlp_input",), writes="inner", when=when,
              fused="gate"),
        Entry("down", f"{prefix}down_proj.weight", role, ("hidden", width), reads=("inner",), writes="stream",
              when=when, row_parallel=True),
    )  # fmt: skip


STREAM = (
    Activation("stream", "stream", "hidden"),
    Activation("attention_input", "stream", "hidden"),
    Activation("mlp_input", "stream", "hidden"),
    Activation("inner"),
    Activation("final", "stream", "hidden"),
)

TOP = (
    Entry("embedding", "model.embed_tokens.weight", Role.EMBEDDING, ("vocab", "hidden"), "lookup", writes="stream"),
    norm("final_norm", "model.norm.weight", "hidden", "stream", "final"),
    Entry("head", "lm_head.weight", Role.HEAD, ("vocab", "hidden"), reads=("final",)),
)

LAYER = (
    norm("input_norm", "input_layernorm.weight", "hidden", "stream", "attention_input"),
    norm("mlp_norm", "post_attention_layernorm.weight", "hidden", "stream", "mlp_input"),
)

# Multi-head latent attention (arXiv:2405.04434).
MLA_ACTIVATIONS = (
    Activation("q_latent", "q_latent", "q_lora"),
    Activation("q_latent_normed", "q_latent", "q_lora"),
    Activation("kv_latent"),
    Activation("kv_latent_normed"),
    Activation("values", "values", "v_head"),
)

MLA = (
    Entry("q", "self_attn.q_proj.weight", Role.ATTENTION, ("q", "hidden"), reads=("attention_input",), when="full_q"),
    Entry("q_a", "self_attn.q_a_proj.weight", Role.ATTENTION, ("q_lora", "hidden"), reads=("attention_input",),
          writes="q_latent", when="q_lora", fused="q_a"),
    norm("q_a_norm", "self_attn.q_a_layernorm.weight", "q_lora", "q_latent", "q_latent_normed", when="q_lora"),
    Entry("q_b", "self_attn.q_b_proj.weight", Role.ATTENTION, ("q", "q_lora"), reads=("q_latent_normed",),
          when="q_lora"),
    Entry("kv_a", "self_attn.kv_a_proj_with_mqa.weight", Role.ATTENTION, ("kv_a", "hidden"), reads=("attention_input",),
          writes="kv_latent", fused="q_a"),
    norm("kv_a_norm", "self_attn.kv_a_layernorm.weight", "kv_lora", "kv_latent", "kv_latent_normed"),
    Entry("kv_b", "self_attn.kv_b_proj.weight", Role.KV_B, ("kv_b", "kv_lora"), reads=("kv_latent_normed",),
          writes="values", heads=("kv_b_head", "nope")),
    Entry("o", "self_attn.o_proj.weight", Role.ATTENTION, ("hidden", "v"), reads=("values",), writes="stream"),
)  # fmt: skip

# The lightning indexer of sparse MLA (DeepSeek-V3.2). A score of two tokens is a sum over index heads, each weighted
# by `index_weights`. Nothing that it writes has a basis: a layer norm and rotary pairs follow.
INDEXER_ACTIVATIONS = (Activation("index_key"), Activation("index_key_normed"))

INDEXER = (
    Entry("index_q", "self_attn.indexer.wq_b.weight", Role.INDEXER, ("index_q", "q_lora"), reads=("q_latent_normed",),
          when="indexer", optional="unused_indexer"),
    Entry("index_k", "self_attn.indexer.wk.weight", Role.INDEXER_FLOAT, ("index_head", "hidden"),
          reads=("attention_input",), writes="index_key", when="indexer", optional="unused_indexer"),
    Entry("index_k_norm", "self_attn.indexer.k_norm.weight", Role.INDEXER_NORM, ("index_head",), "layer_norm",
          ("index_key",), "index_key_normed", when="indexer", optional="unused_indexer"),
    Entry("index_k_norm_bias", "self_attn.indexer.k_norm.bias", Role.INDEXER_NORM, ("index_head",), "layer_norm",
          ("index_key",), "index_key_normed", when="indexer", optional="unused_indexer"),
    Entry("index_weights", "self_attn.indexer.weights_proj.weight", Role.INDEXER_FLOAT, ("index_heads", "hidden"),
          reads=("attention_input",), when="indexer", optional="unused_indexer"),
)  # fmt: skip

# Grouped-query attention with normed queries and keys. Norm and rotation follow q and k, whose outputs keep no basis.
GQA_ACTIVATIONS = (
    Activation("queries"),
    Activation("queries_normed"),
    Activation("keys"),
    Activation("keys_normed"),
    Activation("values", "values", "head"),
)

GQA = (
    Entry("q", "self_attn.q_proj.weight", Role.ATTENTION, ("q", "hidden"), reads=("attention_input",),
          writes="queries", fused="q"),
    Entry("k", "self_attn.k_proj.weight", Role.ATTENTION, ("kv", "hidden"), reads=("attention_input",), writes="keys",
          fused="q"),
    Entry("v", "self_attn.v_proj.weight", Role.ATTENTION, ("kv", "hidden"), reads=("attention_input",),
          writes="values", fused="q"),
    Entry("q_bias", "self_attn.q_proj.bias", Role.BIAS, ("q",), "bias", writes="queries", when="attention_bias"),
    Entry("k_bias", "self_attn.k_proj.bias", Role.BIAS, ("kv",), "bias", writes="keys", when="attention_bias"),
    Entry("v_bias", "self_attn.v_proj.bias", Role.BIAS, ("kv",), "bias", writes="values", when="attention_bias"),
    norm("q_norm", "self_attn.q_norm.weight", "head", "queries", "queries_normed", when="qk_norm"),
    norm("k_norm", "self_attn.k_norm.weight", "head", "keys", "keys_normed", when="qk_norm"),
    Entry("o", "self_attn.o_proj.weight", Role.ATTENTION, ("hidden", "q"), reads=("values",), writes="stream"),
)  # fmt: skip

ROUTER = (
    Entry("router", "mlp.gate.weight", Role.ROUTER, ("experts", "hidden"), reads=("mlp_input",), when="moe"),
    # Loaders keep it in float32: rounded to bfloat16 it reroutes tokens.
    Entry("router_bias", "mlp.gate.e_score_correction_bias", Role.ROUTER_BIAS, ("experts",), "vector",
          when="router_bias", dtype="F32"),
)  # fmt: skip

MTP_ACTIVATIONS = (
    Activation("mtp_embedding", "stream", "hidden"),
    Activation("mtp_hidden", "stream", "hidden"),
    Activation("mtp_final", "stream", "hidden"),
)

MTP = (
    # Reads a token's embedding and the main model's normed output of the token before, side by side.
    Entry("eh_proj", "eh_proj.weight", Role.MTP_PROJECTION, ("hidden", "two_hidden"),
          reads=("mtp_embedding", "mtp_hidden"), writes="stream", when="mtp"),
    norm("embedding_norm", "enorm.weight", "hidden", "stream", "mtp_embedding", Role.MTP_NORM, when="mtp"),
    norm("hidden_norm", "hnorm.weight", "hidden", "final", "mtp_hidden", Role.MTP_NORM, when="mtp"),
    # Copies of the main model's tensors; some releases leave them out.
    Entry("embedding", "embed_tokens.weight", Role.MTP_EMBEDDING, ("vocab", "hidden"), "lookup", writes="stream",
          when="mtp", optional="always"),
    norm("head_norm", "shared_head.norm.weight", "hidden", "stream", "mtp_final", Role.MTP_NORM, when="mtp"),
    Entry("head", "shared_head.head.weight", Role.MTP_HEAD, ("vocab", "hidden"), reads=("mtp_final",), when="mtp",
          optional="always"),
)  # fmt: skip

# Queries and keys are stored with the pairs that rotate together side by side.
DEEPSEEK_FIXED: Final[Mapping[str, str | bool]] = {
    "hidden_act": "silu",
    "rope_interleave": True,
    "attention_bias": False,
    "mlp_bias": False,
}
DEEPSEEK_ACTIVATIONS = (*STREAM, *MLA_ACTIVATIONS, *MTP_ACTIVATIONS)
DEEPSEEK_BLOCKS = {
    Block.TOP: TOP,
    Block.MTP: MTP,
    Block.LAYER: LAYER,
    Block.ATTENTION: MLA,
    Block.DENSE: gated_mlp(Role.DENSE_MLP, "intermediate", "mlp.", when="dense"),
    Block.ROUTER: ROUTER,
    Block.SHARED: gated_mlp(Role.SHARED_EXPERT, "shared_intermediate", "mlp.shared_experts.", when="shared_experts"),
    Block.EXPERT: gated_mlp(Role.ROUTED_EXPERT, "moe_intermediate", "", when="moe"),
}

SPARSE_ACTIVATIONS = (*DEEPSEEK_ACTIVATIONS, *INDEXER_ACTIVATIONS)
SPARSE_BLOCKS = {**DEEPSEEK_BLOCKS, Block.ATTENTION: (*MLA, *INDEXER)}
