"""DeepSeek-V4-Flash and Pro: attention to compressed tokens, a residual of four streams, hashed experts at first.

Names are the release's own: w1 is the gate, w3 up and w2 down. transformers saves others, which no engine reads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from ..compressed_attention import CompressedAttention
from ..compressed_keys import deepseek_keys, read_ropes
from ..family import Activation, Block, Entry, Family
from ..hash_moe import HashMoeDefaults
from ..hyper_connections import HyperConnections
from ..roles import Role
from .blocks import norm

# A hyper-connection reads all streams, so that no basis of theirs may be rotated on its own.
_ACTIVATIONS = (
    Activation("streams"),
    Activation("stream"),
    Activation("attention_input"),
    Activation("mlp_input"),
    Activation("inner"),
    Activation("head_input"),
    Activation("final"),
    Activation("q_latent"),
    Activation("q_latent_normed"),
    Activation("key_value"),
    Activation("key_value_normed"),
    Activation("compressed"),
    Activation("compressed_normed"),
    Activation("index_compressed"),
    Activation("index_compressed_normed"),
    Activation("values"),
    Activation("output_latent"),
    Activation("mtp_embedding"),
    Activation("mtp_hidden"),
    Activation("mtp_head_input"),
    Activation("mtp_final"),
)


def _connection(part: str, name: str, weights: str, scales: str) -> tuple[Entry, ...]:
    """A hyper-connection below `name`: weights of the streams by a linear, a base and a scale for each kind of weight.
    Loaders keep all three in float32."""
    role = Role.HYPER_CONNECTION
    return (
        Entry(f"{part}_fn", f"{name}_fn", role, (weights, "flat_streams"), reads=("streams",), dtype="F32"),
        Entry(f"{part}_base", f"{name}_base", role, (weights,), "vector", dtype="F32"),
        Entry(f"{part}_scale", f"{name}_scale", role, (scales,), "vector", dtype="F32"),
    )


def _compressor(part: str, name: str, width: str, head: str, when: str) -> tuple[Entry, ...]:
    """A compressor below `name`: entries of several tokens' values, weighted by a softmax of their gates and of `ape`,
    an addend for each position in an entry; then a norm."""
    return (
        Entry(f"{part}_kv", f"{name}.wkv.weight", Role.COMPRESSOR, (width, "hidden"), reads=("attention_input",),
              writes=part, when=when),
        Entry(f"{part}_gate", f"{name}.wgate.weight", Role.COMPRESSOR, (width, "hidden"), reads=("attention_input",),
              when=when),
        Entry(f"{part}_ape", f"{name}.ape", Role.COMPRESSOR, ("ratio", width), "lookup", when=when, dtype="F32"),
        norm(f"{part}_norm", f"{name}.norm.weight", head, part, f"{part}_normed", Role.COMPRESSOR, when),
    )  # fmt: skip


def _swiglu(role: Role, width: str, prefix: str, when: str) -> tuple[Entry, ...]:
    return (
        Entry("gate", f"{prefix}w1.weight", role, (width, "hidden"), reads=("mlp_input",), when=when, fused="gate"),
        Entry("up", f"{prefix}w3.weight", role, (width, "hidden"), reads=("mlp_input",), writes="inner", when=when,
              fused="gate"),
        Entry("down", f"{prefix}w2.weight", role, ("hidden", width), reads=("inner",), writes="stream", when=when,
              row_parallel=True),
    )  # fmt: skip


_TOP = (
    Entry("embedding", "embed.weight", Role.EMBEDDING, ("vocab", "hidden"), "lookup", writes="streams"),
    *_connection("head_connection", "hc_head", "streams", "one"),
    norm("final_norm", "norm.weight", "hidden", "head_input", "final"),
    Entry("head", "head.weight", Role.HEAD, ("vocab", "hidden"), reads=("final",)),
)

_LAYER = (
    *_connection("attention_connection", "hc_attn", "stream_weights", "three"),
    norm("input_norm", "attn_norm.weight", "hidden", "stream", "attention_input"),
    *_connection("mlp_connection", "hc_ffn", "stream_weights", "three"),
    norm("mlp_norm", "ffn_norm.weight", "hidden", "stream", "mlp_input"),
)

_ATTENTION = (
    Entry("q_a", "attn.wq_a.weight", Role.ATTENTION, ("q_lora", "hidden"), reads=("attention_input",),
          writes="q_latent", fused="q_a"),
    norm("q_a_norm", "attn.q_norm.weight", "q_lora", "q_latent", "q_latent_normed"),
    Entry("q_b", "attn.wq_b.weight", Role.ATTENTION, ("q", "q_lora"), reads=("q_latent_normed",)),
    # One head, key and value at once.
    Entry("kv", "attn.wkv.weight", Role.ATTENTION, ("head", "hidden"), reads=("attention_input",), writes="key_value",
          fused="q_a"),
    norm("kv_norm", "attn.kv_norm.weight", "head", "key_value", "key_value_normed"),
    Entry("sink", "attn.attn_sink", Role.ATTENTION_SINK, ("heads",), "vector", dtype="F32"),
    *_compressor("compressed", "attn.compressor", "series", "head", "compressor"),
    *_compressor("index_compressed", "attn.indexer.compressor", "index_series", "index_head", "indexer"),
    Entry("index_q", "attn.indexer.wq_b.weight", Role.INDEXER, ("index_q", "q_lora"), reads=("q_latent_normed",),
          when="indexer"),
    Entry("index_weights", "attn.indexer.weights_proj.weight", Role.INDEXER_FLOAT, ("index_heads", "hidden"),
          reads=("attention_input",), when="indexer"),
    # Block diagonal: rows [g · o_lora_rank, …) read the heads of group g.
    Entry("o_a", "attn.wo_a.weight", Role.ATTENTION_OUTPUT, ("o_lora", "group"), reads=("values",),
          writes="output_latent"),
    Entry("o_b", "attn.wo_b.weight", Role.ATTENTION_OUTPUT, ("hidden", "o_lora"), reads=("output_latent",),
          writes="stream"),
)  # fmt: skip

_ROUTER = (
    Entry("router", "ffn.gate.weight", Role.ROUTER, ("experts", "hidden"), reads=("mlp_input",), when="moe"),
    Entry("router_bias", "ffn.gate.bias", Role.ROUTER_BIAS, ("experts",), "vector", when="router_bias", dtype="F32"),
    Entry("router_table", "ffn.gate.tid2eid", Role.ROUTER_TABLE, ("vocab", "chosen"), "lookup", when="router_table",
          dtype="I64", indices="experts"),
)  # fmt: skip

_MTP = (
    # The draft's streams are e_proj(embedding), the same for all, plus h_proj of each of the main model's.
    Entry("e_proj", "e_proj.weight", Role.MTP_PROJECTION, ("hidden", "hidden"), reads=("mtp_embedding",),
          writes="streams", when="mtp"),
    Entry("h_proj", "h_proj.weight", Role.MTP_PROJECTION, ("hidden", "hidden"), reads=("mtp_hidden",),
          writes="streams", when="mtp"),
    norm("embedding_norm", "enorm.weight", "hidden", "streams", "mtp_embedding", Role.MTP_NORM, when="mtp"),
    norm("hidden_norm", "hnorm.weight", "hidden", "streams", "mtp_hidden", Role.MTP_NORM, when="mtp"),
    *(replace(entry, when="mtp") for entry in _connection("head_connection", "hc_head", "streams", "one")),
    norm("head_norm", "norm.weight", "hidden", "mtp_head_input", "mtp_final", Role.MTP_NORM, when="mtp"),
    # Copies of the main model's tensors; the releases leave them out.
    Entry("embedding", "emb.tok_emb.weight", Role.MTP_EMBEDDING, ("vocab", "hidden"), "lookup", writes="streams",
          when="mtp", optional="always"),
    Entry("head", "head.weight", Role.MTP_HEAD, ("vocab", "hidden"), reads=("mtp_final",), when="mtp",
          optional="always"),
)  # fmt: skip

FAMILY: Final = Family(
    model_type="deepseek_v4",
    architecture="DeepseekV4ForCausalLM",
    attention=CompressedAttention,
    moe=HashMoeDefaults(),
    activations=_ACTIVATIONS,
    blocks={
        Block.TOP: _TOP,
        Block.MTP: _MTP,
        Block.LAYER: _LAYER,
        Block.ATTENTION: _ATTENTION,
        Block.ROUTER: _ROUTER,
        Block.SHARED: _swiglu(Role.SHARED_EXPERT, "shared_intermediate", "ffn.shared_experts.", "shared_experts"),
        Block.EXPERT: _swiglu(Role.ROUTED_EXPERT, "moe_intermediate", "", "moe"),
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    layers="layers.",
    mtp_layers="mtp.",
    experts="ffn.experts.",
    hyper_connections=HyperConnections,
    no_rotation=(
        "a hyper-connection reads all streams of the residual at once, and a rotation of each alone is not derived yet"
    ),
    # Factors between up and down would scale what is clamped. Those between norms and linears would be exact, but only
    # the layers' activations tell them.
    no_calibration=(
        "calibration does not run its layers, and smoothing the experts would move the limit at which they clamp "
        "(swiglu_limit), which changes the model"
    ),
    deepseek_keys=deepseek_keys,
    ropes=read_ropes,
    # transformers' own names.
    renamed=("model.",),
)
