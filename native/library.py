"""The native library: its file, its version, and the levels of this CPU. Needs no torch.

`native/npuq.h` is its interface. ctypes releases Python's global lock during a call.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Final

from .integers import CallCheck, Structure, checked

LIBRARY = Path(__file__).with_name("libnpuq.so")
_ABI_VERSION = 11


class Part(Structure):
    """`npuq_part`: one stored weight."""

    _fields_ = (("weight", c_void_p), ("scale", c_void_p), ("rows", c_int64))


class Weights(Structure):
    """`npuq_weights`: groups × parts stored weights of one dtype and width."""

    _fields_ = (
        ("part", POINTER(Part)),
        ("groups", c_int64),
        ("parts", c_int64),
        ("cols", c_int64),
        ("outputs", c_int64),
        ("dtype", c_int32),
    )


class Pages(Structure):
    """`npuq_pages`: one pool of a layer's paged cache."""

    _fields_ = (
        ("rows", c_void_p),
        ("scale", c_void_p),
        *((name, c_int64) for name in ("blocks", "block_size", "channels")),
        ("dtype", c_int32),
        ("layout", c_int32),
    )


class LatentCache(Structure):
    """`npuq_latent_cache`: the paged cache of one layer of multi-head latent attention."""

    _fields_ = (("latent", Pages), ("rope", Pages))


class Strided(Structure):
    """`npuq_strided`: [tokens, heads, channels] anywhere in memory."""

    _fields_ = (("data", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64))


class Heads(Structure):
    """`npuq_heads`: queries, keys and values of attention over decompressed keys."""

    _fields_ = (
        *((name, Strided) for name in ("q_nope", "q_rope", "k_nope", "k_rope", "value")),
        *((name, c_int64) for name in ("count", "nope_dim", "rope_dim", "value_dim")),
        ("dtype", c_int32),
    )


class MlaBlock(Structure):
    """`npuq_mla`: one layer's attention weights."""

    _fields_ = (
        *((name, POINTER(Weights)) for name in ("qkv_a", "q_b", "o")),
        *((name, c_void_p) for name in ("q_a_norm", "kv_a_norm", "w_uk", "w_uv")),
        ("w_uk_strides", c_int64 * 3),
        ("w_uv_strides", c_int64 * 3),
        *((name, c_int64) for name in ("heads", "nope_dim", "value_dim")),
        ("kv_b_dtype", c_int32),
        ("eps", c_float),
    )


class KvCache(Structure):
    """`npuq_kv_cache`: the paged cache of one layer of grouped-query attention."""

    _fields_ = (("key", Pages), ("value", Pages))


class GqaBlock(Structure):
    """`npuq_gqa`: one layer of grouped-query attention."""

    _fields_ = (
        *((name, POINTER(Weights)) for name in ("qkv", "o")),
        *((name, c_void_p) for name in ("bias", "q_norm", "k_norm")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "rope_dim")),
        ("eps", c_float),
    )


class MoeBlock(Structure):
    """`npuq_moe`: one layer's router, experts and shared experts."""

    _fields_ = (
        *((name, POINTER(Weights)) for name in ("router", "gate_up", "down", "shared_gate_up", "shared_down")),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("k", "groups", "top_groups")),
        *((name, c_int32) for name in ("sigmoid", "select_two", "renormalize")),
        ("scaling", c_float),
    )


class Source(Structure):
    """`npuq_source`: stored rows and, for FP8, the scales of their blocks."""

    _fields_ = (
        ("data", c_void_p),
        ("block_scale", c_void_p),
        ("scale_stride", c_int64),
        ("first_row", c_int64),
        ("block_rows", c_int64),
        ("block_cols", c_int64),
        ("dtype", c_int32),
    )


class Draw(Structure):
    """`npuq_draw`: what a draw depends on beside the logits."""

    _fields_ = (
        *((name, c_double) for name in ("temperature", "top_p", "min_p")),
        ("top_k", c_int64),
        *((name, c_uint64) for name in ("seed", "choice", "position")),
    )


class Sha256(Structure):
    """`npuq_sha256`: one stream's state."""

    _fields_ = (("state", c_uint32 * 8), ("nbytes", c_uint64), ("waiting", c_uint8 * 64))


_P, _I, _L, _F, _D = c_void_p, c_int32, c_int64, c_float, c_double
_SIGNATURES: Final = {
    "npuq_watch": (_P, _L),
    "npuq_is_lost": (_P,),
    "npuq_quantize_rows": (_I, _P, _L, _L, _I, _I, _L, _P, _P, _P, _P, _P, _P),
    "npuq_decode_rows": (_I, _P, _L, _L, _I, _P, _P),
    "npuq_compare_rows": (_I, _P, _P, _P, _L, _L, _I, _L, _P, _P, _P),
    "npuq_matmul": (_P, _P, _P, _I, _P, _P, _L, _P, _I),
    "npuq_integer_sums": (_P, _P, _P, _L, _P),
    "npuq_scale_sums": (_P, _P, _P, _P, _L, _P, _I),
    "npuq_batch_matmul": (_P, _P, _I, _L, _L, _L, _L, _L, _L, _P, _I, _L, _L, _L, _P),
    "npuq_dynamic_quant": (_P, _P, _I, _L, _L, _L, _P, _P),
    "npuq_swiglu": (_P, _P, _I, _L, _L, _P, _I),
    "npuq_swiglu_quant": (_P, _P, _I, _L, _L, _P, _P),
    "npuq_row_maximum": (_P, _P, _I, _L, _L, _L, _P),
    "npuq_quant_parts": (_P, _P, _I, _L, _L, _L, _P, _I, _P, _P),
    "npuq_rms_norm": (_P, _P, _I, _L, _P, _L, _L, _F, _P),
    "npuq_add_rms_norm": (_P, _P, _P, _I, _P, _L, _L, _F, _P, _P),
    "npuq_gating_top_k": (_P, _P, _P, _L, _L, _L, _I, _L, _L, _I, _I, _F, _P, _P),
    "npuq_init_routing": (_P, _P, _I, _L, _P, _L, _L, _L, _L, _L, _P, _P, _P, _P, _P),
    "npuq_finalize_routing": (_P, _P, _I, _L, _P, _P, _L, _L, _P, _P),
    "npuq_draw_token": (_P, _P, _L, _P, _P),
    "npuq_likelihood_sum": (_P, _P, _L, _D, _P),
    "npuq_interleave_rope": (_P, _P, _I, _L, _L, _L, _L, _L, _P, _P, _P),
    "npuq_kv_cache_write": (_P, _P, _P, _L, _P, _P, _P, _P, _L, _F, _P, _P),
    "npuq_attention_paged": (_P, _P, _P, _P, _L, _P, _P, _L, _P, _L, _F, _P),
    "npuq_attention": (_P, _P, _P, _P, _L, _F, _I, _P, _P),
    "npuq_linear": (_P, _P, _P, _I, _L, _L, _P, _I),
    "npuq_mlp": (_P, _P, _P, _P, _I, _L, _P),
    "npuq_moe_gate": (_P, _P, _P, _P, _I, _L, _L, _I, _L, _L, _I, _I, _F, _P, _P),
    "npuq_moe_experts": (_P, _P, _P, _P, _I, _P, _P, _L, _L, _P, _P),
    "npuq_expert_rows": (_P, _P, _P, _P, _I, _P, _L, _L, _L, _L, _P, _P, _P),
    "npuq_moe_layer": (_P, _P, _P, _I, _L, _P),
    "npuq_mla_prolog": (_P, _P, _P, _P, _I, _L, _P, _P, _P, _P, _P),
    "npuq_attention_selected": (_P, _P, _P, _P, _L, _P, _P, _L, _P, _L, _P, _L, _F, _P),
    "npuq_lightning_indexer": (_P, _P, _P, _P, _L, _P, _P, _L, _P, _L, _L, _P),
    "npuq_top_k": (_P, _P, _L, _L, _P, _L, _P),
    "npuq_float_product": (_I, _P, _L, _L, _P, _L, _L, _L, _L, _L, _I, _I, _P, _L),
    "npuq_gptq_columns": (_I, _P, _L, _L, _L, _I, _P, _P, _P, _P, _P),
    "npuq_descend": (_I, _P, _P, _L, _L, _I, _P, _P, _P, _P),
    "npuq_grouped_attention_paged": (_P, _P, _P, _I, _L, _L, _L, _P, _P, _L, _P, _L, _F, _P),
    "npuq_grouped_attention": (_P, _P, _P, _P, _I, _L, _L, _L, _P, _P, _L, _L, _F, _I, _P),
    "npuq_gqa_rows": (_P, _P, _P, _P, _I, _L, _L, _P, _P, _P, _P, _P, _P),
    "npuq_gqa_decode": (_P, _P, _P, _P, _I, _L, _P, _P, _P, _P, _P, _L, _P, _L, _F, _P),
    "npuq_mla_decode": (_P, _P, _P, _P, _I, _L, _P, _P, _P, _P, _P, _L, _P, _L, _F, _P),
}

_CHECKS: Final = {name: CallCheck(kinds) for name, kinds in _SIGNATURES.items()}

# Called only where `npuq_sha256_usable`; these functions cannot fail.
_SHA256_SIGNATURES: Final = {
    "npuq_sha256_begin": (_P,),
    "npuq_sha256_add": (_P, _P, _L),
    "npuq_sha256_add_two": (_P, _P, _P),
    "npuq_sha256_end": (_P, _P),
}


@cache
def library() -> ctypes.CDLL | None:
    """The library; None where it was not built, or is of another version of the package."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        version = loaded.npuq_abi_version()
    except (OSError, AttributeError):
        return None
    return _declare(loaded) if version == _ABI_VERSION else None


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, c_int
    if loaded.npuq_sha256_usable():
        for name, arguments in _SHA256_SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, None
    loaded.npuq_level_name.argtypes, loaded.npuq_level_name.restype = (c_int,), c_char_p
    loaded.npuq_pool_create.argtypes, loaded.npuq_pool_create.restype = (c_int, c_int), c_void_p
    loaded.npuq_pool_destroy.argtypes, loaded.npuq_pool_destroy.restype = (c_void_p,), None
    loaded.npuq_pool_level.argtypes = (c_void_p,)
    loaded.npuq_unwatch.argtypes, loaded.npuq_unwatch.restype = (c_void_p,), None
    return loaded


def call(found: ctypes.CDLL, operator: str, *arguments: object) -> int:
    """Call `npuq_<operator>` and return its status. Raises ValueError for an integer out of its C type's range."""
    name = "npuq_" + operator
    _CHECKS[name].check(operator, arguments)
    status: int = getattr(found, name)(*arguments)
    return status


def new_pool(found: ctypes.CDLL, threads: int, level: int) -> int | None:
    """Make a pool of threads and return its handle; None when memory or threads run out."""
    handle: int | None = found.npuq_pool_create(checked(threads, c_int, "pool", "threads"), level)
    return handle


def levels() -> tuple[str, ...]:
    """Names of the instruction-set levels that library and CPU both have, worst first."""
    found = library()
    if found is None:
        return ()
    names = [
        found.npuq_level_name(index) for index in range(found.npuq_level_count()) if found.npuq_level_usable(index)
    ]
    return tuple(name.decode() for name in names)


def description() -> str:
    """The implementation of the arithmetic on this machine, for `npuq --version` and `npuq doctor`."""
    usable = levels()
    if usable:
        return f"native kernels ({usable[-1]})"
    if LIBRARY.exists():
        return f"torch (native kernels are of another version or platform: reinstall npuq to rebuild {LIBRARY.name})"
    return "torch (native kernels were not built: install a C compiler and reinstall npuq, with -v to see it work)"


def level_index(found: ctypes.CDLL, level: str) -> int:
    """The library's number of a level. Raises RuntimeError for a level that this CPU lacks."""
    if level not in levels():
        raise RuntimeError(f"no native kernels for {level!r} here, only for {', '.join(levels())}")
    names = [found.npuq_level_name(index).decode() for index in range(found.npuq_level_count())]
    return names.index(level)
