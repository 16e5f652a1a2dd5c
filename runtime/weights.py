"""Loading of a model's weights from a store into a backend.

Every dtype and shape is checked against the config before a backend gets the tensor. MTP layers are not loaded:
generation does not need them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..formats.artifact import KV_CACHE_NAME, ROPE_NAME, is_own
from ..formats.checkpoint import Checkpoint
from ..formats.kv_cache import INT8_CHANNELS, load_scales
from ..formats.rope_file import load_rope
from ..formats.schemes import Scheme
from ..inputs.files import inside, is_inside
from ..models.config import ModelConfig
from ..models.family import Block
from ..models.hash_moe import HashMoe
from ..models.moe import Moe
from ..models.rope import RopeTables, rope_tables
from ..models.tensors import ModelTensors
from .attention.kind import AttentionKind
from .attention.kinds import check_backend
from .model_weights import LayerWeights, ModelWeights
from .ops import Experts, Gating, HyperWeights, LinearPart, MlpWeights, MoeWeights, Ops
from .ranks.division import Division
from .ranks.layout import Layout, Owned
from .ranks.shares import Shares
from .store import Store, is_artifact


def load_rope_tables(checkpoint: Checkpoint, config: ModelConfig) -> RopeTables:
    """Rope tables of npuq's artifact, else of the config. Raises ArtifactError for tables unlike the config's."""
    if not (config.rope_pairs and is_artifact(checkpoint.directory) and is_own(checkpoint.directory)):
        return rope_tables(config)
    return load_rope(inside(checkpoint.directory, ROPE_NAME, ArtifactError), config)


def load_kv_cache_scales(
    checkpoint: Checkpoint, config: ModelConfig, attention: AttentionKind
) -> tuple[dict[str, Tensor], ...]:
    """Scales of an int8 KV cache, for each layer float32 `[channels]` by pool.

    Raises ArtifactError for a directory without scales (only calibrated artifacts have them), and for a pool whose
    channels do not fill whole tiles.
    """
    pools = [pool for pool in attention.pools(0) if pool.int8]
    if not pools:
        raise ArtifactError(
            f"{checkpoint.directory}: {config.model_type} has no int8 KV cache: its attention reads the "
            "cache in the compute dtype; leave out kv_cache_dtype"
        )
    for pool in pools:
        if pool.channels % INT8_CHANNELS:
            raise ArtifactError(
                f"{checkpoint.directory}: the {pool.name} has {pool.channels} channels, no multiple of "
                f"{INT8_CHANNELS}, as an int8 KV cache needs; leave the KV cache in the compute dtype"
            )
    if not is_inside(checkpoint.directory, KV_CACHE_NAME):
        raise ArtifactError(
            f"{checkpoint.directory / KV_CACHE_NAME}: there are no scales for an int8 KV cache; convert with a "
            "calibrated method (npuq convert --method gptq), or leave the KV cache in the compute dtype"
        )
    path = inside(checkpoint.directory, KV_CACHE_NAME, ArtifactError)
    (pool,) = pools
    scales = load_scales(path, config.num_hidden_layers, pool.channels)
    return tuple({pool.name: scale} for scale in scales)


def load_weights(
    store: Store,
    config: ModelConfig,
    ops: Ops,
    attention: AttentionKind,
    layers: Sequence[int] | None = None,
    owned: Owned | None = None,
    cache_scales: Sequence[Mapping[str, Tensor]] | None = None,
) -> ModelWeights:
    """Load all weights that generation needs into the backend; of the decoder layers only `layers`, if given.

    owned: the part of the model that this rank owns; None for all of it. cache_scales: of an int8 KV cache, as
    `load_kv_cache_scales` gives them.

    Raises CheckpointError or ArtifactError for a tensor that is missing or does not fit the config, and for a file that
    becomes shorter meanwhile, BackendError for a backend that does not run the model.
    """
    check_backend(config, ops)
    chosen = range(config.num_hidden_layers) if layers is None else layers
    owned = owned or Layout().owned(config, 0)
    top = _Parts(store, config, None, Shares(owned, ops.group))
    vocabulary = top.rows(Block.TOP, "embedding")
    weights = ModelWeights(
        embedding=ops.weights.parameter(top.tensor(Block.TOP, "embedding")),
        layers=tuple(
            load_layer(store, config, ops, attention, layer, owned, cache_scales[layer] if cache_scales else None)
            for layer in chosen
        ),
        norm=ops.weights.parameter(top.tensor(Block.TOP, "final_norm"), ops.dtype),
        lm_head=ops.weights.float_linear([top.tensor(Block.TOP, "head")], [vocabulary]),
        vocabulary=vocabulary,
        files=store.files,
        final_streams=_streams(top, config, ops, Block.TOP, "head_connection"),
    )
    store.files.check()
    return weights


def gating_of(moe: Moe) -> Gating:
    """Gating of a router, as transformers and the engines compute it.

    V3 (noaux_tc) scores groups by the sum of their two best biased scores, V2 (group_limited_greedy) by the best one.
    Weights are normalised where the config says so, and multiplied by the scaling factor in any case. (Where a token
    has one expert, DeepSeek's own code leaves its weight as it is; all others normalise it to 1.)
    """
    grouped = moe.topk_method != "greedy"
    return Gating(
        k=moe.num_experts_per_tok,
        scoring=moe.scoring_func,
        group_count=moe.n_group if grouped else 1,
        k_group=moe.topk_group if grouped else 1,
        group_select_mode=1 if moe.topk_method == "noaux_tc" else 0,
        renormalize=moe.norm_topk_prob,
        scaling=moe.routed_scaling_factor,
    )


def load_layer(
    store: Store,
    config: ModelConfig,
    ops: Ops,
    attention: AttentionKind,
    layer: int,
    owned: Owned | None = None,
    cache_scales: Mapping[str, Tensor] | None = None,
) -> LayerWeights:
    """Load the weights of one decoder layer, for layer-by-layer work. Arguments and errors as of `load_weights`."""
    check_backend(config, ops)
    owned = owned or Layout().owned(config, 0)
    parts, moe = _Parts(store, config, layer, Shares(owned, ops.group)), config.moe_at(layer)
    weights = attention.load(layer, _BlockParts(parts, Block.ATTENTION), ops)
    return LayerWeights(
        input_norm=ops.weights.parameter(parts.tensor(Block.LAYER, "input_norm"), ops.dtype),
        attention=attention.with_cache_scales(weights, cache_scales, ops) if cache_scales else weights,
        mlp_norm=ops.weights.parameter(parts.tensor(Block.LAYER, "mlp_norm"), ops.dtype),
        mlp=_mlp(parts, ops, Block.DENSE) if moe is None else None,
        moe=None if moe is None else _moe(parts, moe, ops, owned),
        attention_streams=_streams(parts, config, ops, Block.LAYER, "attention_connection"),
        mlp_streams=_streams(parts, config, ops, Block.LAYER, "mlp_connection"),
    )


class _Parts:
    """Stored tensors of one layer, of which a rank takes its shares; of layer None, those outside the layers."""

    def __init__(self, store: Store, config: ModelConfig, layer: int | None, shares: Shares):
        self._store, self._tensors, self._layer, self._shares = store, ModelTensors(config), layer, shares

    def has(self, block: Block, part: str) -> bool:
        return self._tensors.has(block, part, self._layer)

    def rows(self, block: Block, part: str) -> Division | None:
        return self._shares.of_rows(block, self._tensors.family.entry(block, part))

    def tensor(self, block: Block, part: str) -> Tensor:
        spec, rows = self._tensors.spec(block, part, self._layer), self.rows(block, part)
        return self._store.tensor(spec.name, *spec.shape, rows=None if rows is None else rows.own)

    def table(self, block: Block, part: str, most: int) -> Tensor:
        spec = self._tensors.spec(block, part, self._layer)
        return self._store.table(spec.name, *spec.shape, most=most)

    def linear(self, block: Block, part: str, expert: int | None = None) -> LinearPart:
        spec = self._tensors.spec(block, part, self._layer, expert)
        (outputs, inputs), prefix = spec.shape, spec.name.removesuffix(".weight")
        if expert is not None:
            return self._store.linear(prefix, outputs, inputs)
        exact_sum = self._store.scheme(prefix) is not Scheme.FLOAT
        share = self._shares.of_linear(block, self._tensors.family.entry(block, part), exact_sum=exact_sum)
        return self._store.linear(prefix, outputs, inputs, share)


class _BlockParts:
    """Stored tensors of one block of a layer, by part."""

    def __init__(self, parts: _Parts, block: Block):
        self._parts, self._block = parts, block

    def linear(self, part: str) -> LinearPart:
        return self._parts.linear(self._block, part)

    def tensor(self, part: str) -> Tensor:
        return self._parts.tensor(self._block, part)


def _streams(parts: _Parts, config: ModelConfig, ops: Ops, block: Block, name: str) -> HyperWeights | None:
    """How the block that the parts' `name` belongs to reads and writes the streams; None in a model with one stream."""
    connections = config.hyper_connections
    if connections is None:
        return None
    fn, base, scale = (
        ops.weights.parameter(parts.tensor(block, f"{name}_{kind}"), torch.float32) for kind in ("fn", "base", "scale")
    )
    return HyperWeights(fn, base, scale, connections.hc_sinkhorn_iters, connections.hc_eps, config.rms_norm_eps)


def _mlp(parts: _Parts, ops: Ops, block: Block, limit: float | None = None) -> MlpWeights:
    gate_up = [parts.linear(block, part) for part in ("gate", "up")]
    down = parts.linear(block, "down")
    return MlpWeights(
        ops.weights.linear_of(gate_up),
        ops.weights.row_parallel_of(down),
        quantized=down.scheme is Scheme.W8A8,
        limit=limit,
    )


def _moe(parts: _Parts, moe: Moe, ops: Ops, owned: Owned) -> MoeWeights:
    bias: Tensor | None = None
    if parts.has(Block.ROUTER, "router_bias"):
        bias = ops.weights.parameter(parts.tensor(Block.ROUTER, "router_bias"), torch.float32)

    def stacked(*names: str) -> tuple[Experts, LinearPart]:
        experts = [[parts.linear(Block.EXPERT, name, expert) for name in names] for expert in owned.experts]
        return ops.weights.experts_of(experts), experts[0][0]

    gate_up, gate = stacked("gate", "up")
    down, first = stacked("down")
    quantized = first.scheme is not Scheme.FLOAT
    if (gate.scheme is not Scheme.FLOAT) != quantized:
        raise ArtifactError(
            f"{gate.name} is {gate.scheme.value} and {first.name} {first.scheme.value}: an expert's linears must all "
            "be quantized, or all FLOAT"
        )
    limit = moe.swiglu_limit if isinstance(moe, HashMoe) else None
    table: Tensor | None = None
    if parts.has(Block.ROUTER, "router_table"):
        table = ops.weights.parameter(parts.table(Block.ROUTER, "router_table", most=moe.n_routed_experts))
    weights = MoeWeights(
        router=ops.weights.router(parts.tensor(Block.ROUTER, "router")),
        correction_bias=bias,
        gating=gating_of(moe),
        gate_up=gate_up,
        down=down,
        num_experts=moe.n_routed_experts,
        quantized=quantized,
        shared=_mlp(parts, ops, Block.SHARED, limit) if moe.n_shared_experts else None,
        ranks=owned.layout.ep,
        limit=limit,
        expert_table=table,
    )
    return ops.routing.moe_of(weights)
