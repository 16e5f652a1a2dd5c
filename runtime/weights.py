"""A directory becomes the weights of a model: a quantized artifact by its description, or an unquantized checkpoint.

Little is read at load but headers: tensors are memory-mapped views, and what a backend does with them (keep, upcast,
lay out for a device) is its own affair. Exceptions are FP8, which has no linear of its own and is dequantized, and
scales, which must be positive numbers. Every dtype and shape is checked against the config, before a backend sees it.
MTP layers are left where they are: generation does not need them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArtifactError, CheckpointError
from ..formats.artifact import (
    DESCRIPTION_NAME,
    KV_CACHE_NAME,
    ROPE_NAME,
    description_path,
    is_own,
    read_description,
    read_manifest,
)
from ..formats.checkpoint import Checkpoint
from ..formats.compressed_tensors import is_compressed
from ..formats.dialects import WeightSource
from ..formats.kv_cache import INT8_CHANNELS, load_scales
from ..formats.schemes import BIAS_COLUMNS, DEQ_SCALE, INPUT_OFFSET, INPUT_SCALE, QUANT_BIAS, Scheme
from ..formats.static_w8a8 import input_scale_of, load_deq_scale
from ..formats.ties import share_tied
from ..inputs.files import inside, is_inside
from ..models.config import ModelConfig
from ..models.families import family_of
from ..models.family import Block
from ..models.inventory import check_unbiased
from ..models.moe import Moe
from ..models.rope import RopeTables, load_rope, rope_tables
from ..models.tensors import ModelTensors
from ..native.mapped import MappedFiles
from .attention.kind import AttentionKind
from .model import LayerWeights, ModelWeights
from .ops import Experts, Gating, LinearPart, MlpWeights, MoeWeights, Ops, Static

_FLOAT_CODES = ("BF16", "F16", "F32")


class Store(Protocol):
    """Where stored tensors come from. Both methods check shapes and name the tensor that is missing or wrong.

    files: those that the tensors are mapped from.
    """

    files: MappedFiles

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A float tensor as it is stored, memory-mapped."""

    def linear(self, prefix: str, outputs: int, inputs: int) -> LinearPart:
        """The linear `{prefix}.weight` with whatever its scheme stores beside it."""


class FloatStore:
    """An unquantized checkpoint. FP8 weights are dequantized into `dtype`, everything else stays a view."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype):
        self.files = checkpoint.files
        self._source = WeightSource(checkpoint)
        self._dtype = dtype

    def tensor(self, name: str, *shape: int) -> Tensor:
        checkpoint = self._source.checkpoint
        weight = self._source.weights.get(name)
        if weight is None:
            raise CheckpointError(f"{checkpoint.directory}: no tensor {name!r}, which its config.json asks for")
        if weight.shape != shape:
            file = checkpoint.tensors[name].file
            raise CheckpointError(f"{file}: tensor {name!r} is {list(weight.shape)}; config.json says {list(shape)}")
        if weight.dtype == "F8_E4M3":
            return self._source.rows_float32(name).to(self._dtype)
        return checkpoint.view(name)

    def linear(self, prefix: str, outputs: int, inputs: int) -> LinearPart:
        return LinearPart(prefix, Scheme.FLOAT, self.tensor(f"{prefix}.weight", outputs, inputs))


class ArtifactStore:
    """A finished artifact of npuq's, or ModelSlim's own: each weight's scheme is what the description says.

    ArtifactError for an unfinished one.
    """

    def __init__(self, checkpoint: Checkpoint):
        if is_own(checkpoint.directory):
            read_manifest(checkpoint.directory)
        self.files = checkpoint.files
        self._checkpoint = checkpoint
        self._path = description_path(checkpoint.directory) or checkpoint.directory / DESCRIPTION_NAME
        self._description: Mapping[str, Scheme] = read_description(checkpoint.directory) or {}

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self._view(name, _FLOAT_CODES, shape)

    def linear(self, prefix: str, outputs: int, inputs: int) -> LinearPart:
        name = f"{prefix}.weight"
        scheme = self._scheme(name)
        if scheme is Scheme.FLOAT:
            return LinearPart(prefix, scheme, self.tensor(name, outputs, inputs))
        if scheme is Scheme.W8A8_STATIC:
            return LinearPart(
                prefix, scheme, self._view(name, ("I8",), (outputs, inputs)), static=self._static(prefix, outputs)
            )
        scale = self._positive(f"{prefix}.weight_scale", ("F32",), (outputs, 1))
        if scheme is Scheme.W8A8:
            return LinearPart(prefix, scheme, self._view(name, ("I8",), (outputs, inputs)), scale)
        if outputs % 2:
            raise ArtifactError(f"{self._path}: {name!r} has {outputs} output rows; int4 packs them in pairs")
        stored_bias = self._checkpoint.tensors.get(f"{prefix}.scale_bias")
        row_parallel = stored_bias is not None and stored_bias.shape == (outputs, BIAS_COLUMNS)
        bias = self._view(f"{prefix}.scale_bias", ("F32",), (outputs, BIAS_COLUMNS if row_parallel else 1))
        return LinearPart(prefix, scheme, self._view(name, ("I8",), (outputs // 2, inputs)), scale, bias)

    def _static(self, prefix: str, outputs: int) -> Static:
        ranges = {suffix: self._view(f"{prefix}.{suffix}", ("F32",), (1,)) for suffix in (INPUT_SCALE, INPUT_OFFSET)}
        try:
            inputs = input_scale_of(ranges)
        except ValueError as error:
            raise ArtifactError(f"{self._checkpoint.directory}: tensor {prefix + '.input_scale'!r}: {error}") from error
        deq_scale = self._positive(f"{prefix}.{DEQ_SCALE}", ("F32", "I64"), (outputs,))
        return Static(inputs, deq_scale, self._view(f"{prefix}.{QUANT_BIAS}", ("I32",), (outputs,)))

    def _positive(self, name: str, codes: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        """Scales, each of them a positive number, as float32 in whichever of both forms they are stored."""
        scale = load_deq_scale(self._view(name, codes, shape))
        low, high = scale.aminmax()
        # Written so that NaN counts as wrong.
        if not 0 < float(low) <= float(high) < math.inf:
            self.files.check()
            file = self._checkpoint.tensors[name].file
            raise ArtifactError(f"{file}: tensor {name!r} holds a scale that is not a positive number; fetch it again")
        return scale

    def _scheme(self, name: str) -> Scheme:
        scheme = self._description.get(name)
        if scheme is None:
            raise ArtifactError(f"{self._path}: no entry for {name!r}; convert the checkpoint again")
        return scheme

    def _view(self, name: str, codes: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise ArtifactError(f"{self._checkpoint.directory}: no tensor {name!r}, which its config.json asks for")
        if info.shape != shape or info.dtype not in codes:
            raise ArtifactError(
                f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}; "
                f"config.json and its scheme say {' or '.join(codes)} {list(shape)}"
            )
        return self._checkpoint.view(name)


def is_artifact(directory: Path) -> bool:
    """Whether a directory holds a quantized artifact: it has the description that engines look for."""
    return description_path(directory) is not None


def open_store(checkpoint: Checkpoint, dtype: torch.dtype) -> Store:
    """The store that fits the directory; `dtype` is what FP8 weights are dequantized into."""
    check_unbiased(family_of(checkpoint.config.get("model_type")), checkpoint.tensors)
    share_tied(checkpoint)
    if is_artifact(checkpoint.directory):
        return ArtifactStore(checkpoint)
    if is_compressed(checkpoint.config):
        raise CheckpointError(f"{checkpoint.directory}: compressed-tensors weights: run `npuq convert` on it first")
    return FloatStore(checkpoint, dtype)


def load_rope_tables(checkpoint: Checkpoint, config: ModelConfig) -> RopeTables:
    """The tables that npuq's artifacts bring, or those of the config. ArtifactError when they do not fit the config."""
    if not (is_artifact(checkpoint.directory) and is_own(checkpoint.directory)):
        return rope_tables(config)
    return load_rope(inside(checkpoint.directory, ROPE_NAME, ArtifactError), config)


def load_kv_cache_scales(
    checkpoint: Checkpoint, config: ModelConfig, attention: AttentionKind
) -> tuple[dict[str, Tensor], ...]:
    """The scales of an int8 KV cache, for each layer float32 `[channels]` by pool.

    Raises ArtifactError for a directory without them, which is every one that was not calibrated, and for a pool
    that is not made of whole tiles.
    """
    pools = [pool for pool in attention.pools(0) if pool.int8]
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
    store: Store, config: ModelConfig, ops: Ops, attention: AttentionKind, layers: Sequence[int] | None = None
) -> ModelWeights:
    """All weights that generation needs, handed to the backend; of the decoder layers only `layers`, if given.

    Raises CheckpointError or ArtifactError for a tensor that is missing or does not fit the config, and for a file that
    becomes shorter meanwhile.
    """
    chosen = range(config.num_hidden_layers) if layers is None else layers
    top = _Parts(store, config, None)
    weights = ModelWeights(
        embedding=ops.weights.parameter(top.tensor(Block.TOP, "embedding")),
        layers=tuple(load_layer(store, config, ops, attention, layer) for layer in chosen),
        norm=ops.weights.parameter(top.tensor(Block.TOP, "final_norm"), ops.dtype),
        lm_head=ops.weights.float_linear([top.tensor(Block.TOP, "head")]),
        files=store.files,
    )
    store.files.check()
    return weights


def gating_of(moe: Moe) -> Gating:
    """The router's rule, as transformers and the engines compute it.

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


def load_layer(store: Store, config: ModelConfig, ops: Ops, attention: AttentionKind, layer: int) -> LayerWeights:
    """The weights of one decoder layer, for who needs no more at a time; errors as of `load_weights`."""
    parts, moe = _Parts(store, config, layer), config.moe_at(layer)
    return LayerWeights(
        input_norm=ops.weights.parameter(parts.tensor(Block.LAYER, "input_norm"), ops.dtype),
        attention=attention.load(_BlockParts(parts, Block.ATTENTION), ops),
        mlp_norm=ops.weights.parameter(parts.tensor(Block.LAYER, "mlp_norm"), ops.dtype),
        mlp=_mlp(parts, ops, Block.DENSE) if moe is None else None,
        moe=None if moe is None else _moe(parts, moe, ops),
    )


class _Parts:
    """The tensors of one layer, or with None those outside the layers, as the store has them."""

    def __init__(self, store: Store, config: ModelConfig, layer: int | None):
        self._store, self._tensors, self._layer = store, ModelTensors(config), layer

    def has(self, block: Block, part: str) -> bool:
        return self._tensors.has(block, part, self._layer)

    def tensor(self, block: Block, part: str) -> Tensor:
        spec = self._tensors.spec(block, part, self._layer)
        return self._store.tensor(spec.name, *spec.shape)

    def linear(self, block: Block, part: str, expert: int | None = None) -> LinearPart:
        spec = self._tensors.spec(block, part, self._layer, expert)
        outputs, inputs = spec.shape
        return self._store.linear(spec.name.removesuffix(".weight"), outputs, inputs)


class _BlockParts:
    """The tensors of one block of a layer, by part."""

    def __init__(self, parts: _Parts, block: Block):
        self._parts, self._block = parts, block

    def linear(self, part: str) -> LinearPart:
        return self._parts.linear(self._block, part)

    def tensor(self, part: str) -> Tensor:
        return self._parts.tensor(self._block, part)


def _mlp(parts: _Parts, ops: Ops, block: Block) -> MlpWeights:
    gate_up = [parts.linear(block, part) for part in ("gate", "up")]
    down = parts.linear(block, "down")
    return MlpWeights(
        ops.weights.linear_of(gate_up), ops.weights.linear_of([down]), quantized=down.scheme is Scheme.W8A8
    )


def _moe(parts: _Parts, moe: Moe, ops: Ops) -> MoeWeights:
    bias: Tensor | None = None
    if parts.has(Block.ROUTER, "router_bias"):
        bias = ops.weights.parameter(parts.tensor(Block.ROUTER, "router_bias"), torch.float32)

    def stacked(*names: str) -> tuple[Experts, LinearPart]:
        experts = [
            [parts.linear(Block.EXPERT, name, expert) for name in names] for expert in range(moe.n_routed_experts)
        ]
        return ops.weights.experts_of(experts), experts[0][0]

    gate_up, gate = stacked("gate", "up")
    down, first = stacked("down")
    quantized = first.scheme is not Scheme.FLOAT
    if (gate.scheme is not Scheme.FLOAT) != quantized:
        raise ArtifactError(
            f"{gate.name} is {gate.scheme.value} and {first.name} {first.scheme.value}: an expert's linears must all "
            "be quantized, or all FLOAT"
        )
    weights = MoeWeights(
        router=ops.weights.router(parts.tensor(Block.ROUTER, "router")),
        correction_bias=bias,
        gating=gating_of(moe),
        gate_up=gate_up,
        down=down,
        num_experts=moe.n_routed_experts,
        quantized=quantized,
        shared=_mlp(parts, ops, Block.SHARED) if moe.n_shared_experts else None,
    )
    return ops.routing.moe_of(weights)
