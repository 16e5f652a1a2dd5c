"""Bytes that an operator, or a whole decode step, must read and write: weights, cache and activations, each once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from ...attention.pools import LayerCache, Pages
from ...model_weights import LayerWeights, ModelWeights
from ...ops import Decode, Gqa, Mla, MoeWeights, SparseMla, Step
from ...ops.latent_attention import LATENT, ROPE
from ...ops.sparse_attention import INDEX_KEY

_PROJECTIONS = ("qkv_a", "q_b", "q_a_norm", "projections", "qkv", "bias", "q_norm", "k_norm")
# Fields of an attention handle that an operator reads; handles of backends have some of them.
_READS: Mapping[str, Sequence[str]] = {
    "norm": (),
    "project": _PROJECTIONS,
    "write": _PROJECTIONS,
    "write_cache": ("kv_a_norm",),
    "prolog": (*_PROJECTIONS, "kv_a_norm", "w_uk"),
    "prolog_with_latent": (*_PROJECTIONS, "kv_a_norm", "w_uk"),
    "absorb": ("w_uk",),
    "bring_out": ("w_uv",),
    "output": ("o",),
    "decode": (*_PROJECTIONS, "kv_a_norm", "w_uk", "w_uv", "o"),
}
_READS_ALL_KEYS = ("fused_infer_attention_paged", "lightning_indexer", "decode")
_READS_SELECTED = "sparse_flash_attention"


def operator_bytes(name: str, args: Sequence[Any], result: Any) -> int:
    """Bytes of one call of an operator of `Ops`. args: positional and keyword ones. Of the experts, those that have
    rows count."""
    decode = _decode_of(args)
    total = _nbytes([result])
    tokens = next((arg.shape[0] for arg in _tensors(args) if arg.dim() > 1), 1)
    for index, arg in enumerate(args):
        if isinstance(arg, (Mla, Gqa)):
            total += _fields_nbytes(arg, _READS.get(name, ()))
        elif isinstance(arg, MoeWeights):
            total += _reached_bytes(arg.gate_up, args[1]) if name == "experts_inner" else moe_bytes(arg, tokens)
        elif isinstance(arg, (LayerCache, Pages)):
            # Index keys are handed over as pages of their own.
            pools = arg.pages if isinstance(arg, LayerCache) else {"": arg}
            pages = [each for pool, each in pools.items() if pool != INDEX_KEY]
            total += _cache_bytes(name, pages, tokens, decode, args)
        elif name == "grouped_matmul" and index == 1:
            total += _reached_bytes(arg, args[2])
        elif name == "embedding" and index == 1:
            total += tokens_bytes(arg, args[0].numel())
        else:
            total += _nbytes([arg])
    return total


def _reached_bytes(experts: object, groups: Tensor) -> int:
    """Bytes of the experts that have rows. groups: rows of each."""
    return _nbytes([experts]) * int((groups > 0).sum()) // len(groups)


def moe_bytes(weights: MoeWeights, tokens: int) -> int:
    """Bytes of an MoE layer's weights for so many tokens: of the routed experts as many as `tokens` independent, evenly
    distributed choices reach."""
    experts = _nbytes([weights.gate_up, weights.down])
    unread = (1 - weights.gating.k / weights.num_experts) ** tokens
    others = [weights.router, weights.correction_bias, weights.shared]
    return _nbytes(others) + round(experts * (1 - unread))


def step_bytes(weights: ModelWeights, cache: Sequence[LayerCache], step: Step, selected: int | None) -> int:
    """Bytes of a decode step's weights and cache, those of its activations left out. selected: tokens of a selection,
    if queries select."""
    decode = step.decode
    assert decode is not None
    tokens, keys = step.num_tokens, sum(decode.kv_lens)
    total = tokens_bytes(weights.embedding, tokens) + _nbytes([weights.norm, weights.lm_head])
    for layer, pools in zip(weights.layers, cache, strict=True):
        total += _layer_bytes(layer, tokens)
        chosen = keys if selected is None else sum(min(selected, length) for length in decode.kv_lens)
        for name, pages in pools.pages.items():
            total += _token_bytes(pages) * (chosen if name in (LATENT, ROPE) else keys)
    return total


def tokens_bytes(table: Tensor, tokens: int) -> int:
    """Bytes of so many rows of a table."""
    return tokens * table.shape[-1] * table.element_size()


def _layer_bytes(layer: LayerWeights, tokens: int) -> int:
    attention = layer.attention
    mla = attention.mla if isinstance(attention, SparseMla) else attention
    total = _fields_nbytes(mla, _READS["decode"]) if isinstance(mla, (Mla, Gqa)) else _nbytes([mla])
    if isinstance(attention, SparseMla):
        total += _nbytes([attention.indexer])
    total += _nbytes([layer.input_norm, layer.mlp_norm, layer.mlp])
    return total + (0 if layer.moe is None else moe_bytes(layer.moe, tokens))


def _cache_bytes(name: str, pages: Iterable[Pages], tokens: int, decode: Decode | None, args: Sequence[Any]) -> int:
    row = sum(_token_bytes(each) for each in pages)
    if name == _READS_SELECTED:
        selected = next(arg for arg in args if isinstance(arg, Tensor) and not arg.dtype.is_floating_point)
        return row * int((selected >= 0).sum())
    if name in _READS_ALL_KEYS and decode is not None:
        return row * (sum(decode.kv_lens) + (tokens if name == "decode" else 0))
    return row * tokens


def _token_bytes(pages: Pages) -> int:
    return pages.pool.row_bytes


def _decode_of(args: Sequence[Any]) -> Decode | None:
    for arg in args:
        if isinstance(arg, Decode):
            return arg
        if isinstance(arg, Step):
            return arg.decode
    return None


def _fields_nbytes(handle: object, names: Sequence[str]) -> int:
    return _nbytes([getattr(handle, name) for name in names if hasattr(handle, name)])


def _nbytes(values: Sequence[Any]) -> int:
    return sum(tensor.nbytes for tensor in _tensors(values))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
        elif is_dataclass(value) and not isinstance(value, type):
            found += _tensors([getattr(value, field.name) for field in fields(value)])
    return found
