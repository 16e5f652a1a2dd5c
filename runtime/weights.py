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
from ..formats.ties import EMBEDDING, HEAD, share_tied
from ..inputs.files import inside, is_inside
from ..models.config import ModelConfig, check_unbiased
from ..models.rope import RopeTables, load_rope, rope_tables
from ..native.mapped import MappedFiles
from .model import LayerWeights, ModelWeights
from .ops import Experts, Gating, LinearPart, MlaConfig, MlaParts, MlpWeights, MoeWeights, Ops, Static

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
    check_unbiased(checkpoint.tensors)
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


def load_kv_cache_scales(checkpoint: Checkpoint, config: ModelConfig) -> tuple[Tensor, ...]:
    """The scales of an int8 KV cache, float32 `[kv_lora_rank]` a layer.

    Raises ArtifactError for a directory without them, which is every one that was not calibrated, and for a latent
    that is not made of whole tiles.
    """
    if config.kv_lora_rank % INT8_CHANNELS:
        raise ArtifactError(
            f"{checkpoint.directory}: kv_lora_rank {config.kv_lora_rank} is no multiple of {INT8_CHANNELS}, as an int8 "
            "KV cache needs; leave the KV cache in the compute dtype"
        )
    if not is_inside(checkpoint.directory, KV_CACHE_NAME):
        raise ArtifactError(
            f"{checkpoint.directory / KV_CACHE_NAME}: there are no scales for an int8 KV cache; convert with a "
            "calibrated method (npuq convert --method gptq), or leave the KV cache in the compute dtype"
        )
    path = inside(checkpoint.directory, KV_CACHE_NAME, ArtifactError)
    return load_scales(path, config.num_hidden_layers, config.kv_lora_rank)


def load_weights(
    store: Store, config: ModelConfig, ops: Ops, softmax_scale: float, layers: Sequence[int] | None = None
) -> ModelWeights:
    """All weights that generation needs, handed to the backend; of the decoder layers only `layers`, if given.

    Raises CheckpointError or ArtifactError for a tensor that is missing or does not fit the config, and for a file that
    becomes shorter meanwhile.
    """
    hidden = config.hidden_size
    chosen = range(config.num_hidden_layers) if layers is None else layers
    embedding = ops.parameter(store.tensor(EMBEDDING, config.vocab_size, hidden))
    weights = ModelWeights(
        embedding=embedding,
        layers=tuple(load_layer(store, config, ops, softmax_scale, layer) for layer in chosen),
        norm=ops.parameter(store.tensor("model.norm.weight", hidden), ops.dtype),
        lm_head=ops.float_linear([store.tensor(HEAD, config.vocab_size, hidden)]),
        files=store.files,
    )
    store.files.check()
    return weights


def gating_of(config: ModelConfig) -> Gating:
    """The router's rule, as transformers and the engines compute it.

    V3 (noaux_tc) scores groups by the sum of their two best biased scores, V2 (group_limited_greedy) by the best one.
    Weights are normalised where the config says so, and multiplied by the scaling factor in any case. (Where a token
    has one expert, DeepSeek's own code leaves its weight as it is; all others normalise it to 1.)
    """
    noaux = config.topk_method == "noaux_tc"
    grouped = config.topk_method != "greedy"
    return Gating(
        k=config.num_experts_per_tok,
        scoring=config.scoring_func,
        group_count=config.n_group if grouped else 1,
        k_group=config.topk_group if grouped else 1,
        group_select_mode=1 if noaux else 0,
        renormalize=config.norm_topk_prob,
        scaling=config.routed_scaling_factor,
    )


def load_layer(store: Store, config: ModelConfig, ops: Ops, softmax_scale: float, layer: int) -> LayerWeights:
    """The weights of one decoder layer, for who needs no more at a time; errors as of `load_weights`."""
    prefix = f"model.layers.{layer}"
    is_moe = config.is_moe_layer(layer)
    mlp: MlpWeights | None = None
    if not is_moe:
        mlp = _mlp(store, ops, f"{prefix}.mlp", config.hidden_size, config.intermediate_size)
    elif config.n_shared_experts:
        width = config.n_shared_experts * config.moe_intermediate_size
        mlp = _mlp(store, ops, f"{prefix}.mlp.shared_experts", config.hidden_size, width)
    return LayerWeights(
        input_norm=ops.parameter(store.tensor(f"{prefix}.input_layernorm.weight", config.hidden_size), ops.dtype),
        attention=_attention(store, config, ops, softmax_scale, f"{prefix}.self_attn"),
        mlp_norm=ops.parameter(
            store.tensor(f"{prefix}.post_attention_layernorm.weight", config.hidden_size), ops.dtype
        ),
        mlp=mlp,
        moe=_moe(store, config, ops, f"{prefix}.mlp") if is_moe else None,
    )


def _attention(store: Store, config: ModelConfig, ops: Ops, softmax_scale: float, prefix: str) -> object:
    hidden, heads = config.hidden_size, config.num_attention_heads
    q_width, q_lora = heads * config.qk_head_dim, config.q_lora_rank
    kv_width = heads * (config.qk_nope_head_dim + config.v_head_dim)
    parts = MlaParts(
        q=store.linear(f"{prefix}.q_proj", q_width, hidden) if q_lora is None else None,
        q_a=None if q_lora is None else store.linear(f"{prefix}.q_a_proj", q_lora, hidden),
        q_a_norm=None if q_lora is None else store.tensor(f"{prefix}.q_a_layernorm.weight", q_lora),
        q_b=None if q_lora is None else store.linear(f"{prefix}.q_b_proj", q_width, q_lora),
        kv_a=store.linear(f"{prefix}.kv_a_proj_with_mqa", config.kv_lora_rank + config.qk_rope_head_dim, hidden),
        kv_a_norm=store.tensor(f"{prefix}.kv_a_layernorm.weight", config.kv_lora_rank),
        kv_b=store.tensor(f"{prefix}.kv_b_proj.weight", kv_width, config.kv_lora_rank),
        o=store.linear(f"{prefix}.o_proj", hidden, heads * config.v_head_dim),
    )
    return ops.mla(
        parts,
        MlaConfig(
            num_heads=heads,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            kv_lora_rank=config.kv_lora_rank,
            q_lora_rank=q_lora,
            rms_norm_eps=config.rms_norm_eps,
            softmax_scale=softmax_scale,
        ),
    )


def _mlp(store: Store, ops: Ops, prefix: str, hidden: int, width: int) -> MlpWeights:
    gate_up = [store.linear(f"{prefix}.{name}", width, hidden) for name in ("gate_proj", "up_proj")]
    down = store.linear(f"{prefix}.down_proj", hidden, width)
    return MlpWeights(ops.linear_of(gate_up), ops.linear_of([down]), quantized=down.scheme is Scheme.W8A8)


def _moe(store: Store, config: ModelConfig, ops: Ops, prefix: str) -> MoeWeights:
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    bias: Tensor | None = None
    if config.topk_method == "noaux_tc":
        bias = ops.parameter(store.tensor(f"{prefix}.gate.e_score_correction_bias", experts), torch.float32)

    def stacked(outputs: int, inputs: int, *names: str) -> tuple[Experts, bool]:
        parts = [
            [store.linear(f"{prefix}.experts.{expert}.{name}", outputs, inputs) for name in names]
            for expert in range(experts)
        ]
        return ops.experts_of(parts), parts[0][0].scheme is not Scheme.FLOAT

    gate_up, gate_up_quantized = stacked(width, hidden, "gate_proj", "up_proj")
    down, down_quantized = stacked(hidden, width, "down_proj")
    if gate_up_quantized != down_quantized:
        raise ArtifactError(f"{prefix}.experts: gate_proj, up_proj and down_proj must all be quantized, or all FLOAT")
    return MoeWeights(
        router=ops.router(store.tensor(f"{prefix}.gate.weight", experts, hidden)),
        correction_bias=bias,
        gating=gating_of(config),
        gate_up=gate_up,
        down=down,
        num_experts=experts,
        quantized=down_quantized,
    )
