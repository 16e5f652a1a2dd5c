"""The native library: finding it, and its pool of threads. What it computes, torch computes too, with the same integers.

`native/npuq.h` is the interface. A call releases Python's global lock for as long as it runs (ctypes does).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from .dialects import BlockScale, StoredRows
from .scales import NonFiniteError

LIBRARY = Path(__file__).with_name("libnpuq.so")
_ABI_VERSION = 1

DTYPES: Final = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.int8: 4,
}
INT4: Final = 5
# The widest row that `quantize` takes: its sums are exact up to here.
MOST_COLUMNS: Final = 1 << 17


class Part(ctypes.Structure):
    """`npuq_part`: one stored weight."""

    _fields_ = (("weight", c_void_p), ("scale", c_void_p), ("rows", c_int64))


class Weights(ctypes.Structure):
    """`npuq_weights`: groups × parts stored weights of one dtype and width."""

    _fields_ = (
        ("part", POINTER(Part)),
        ("groups", c_int64),
        ("parts", c_int64),
        ("cols", c_int64),
        ("outputs", c_int64),
        ("dtype", c_int32),
    )


class Cache(ctypes.Structure):
    """`npuq_cache`: one layer's paged cache in NZ layout."""

    _fields_ = (
        ("latent", c_void_p),
        ("rope", c_void_p),
        ("block_size", c_int64),
        ("latent_dim", c_int64),
        ("rope_dim", c_int64),
        ("dtype", c_int32),
    )


class Source(ctypes.Structure):
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


_NO_MEMORY, _NOT_FINITE = 1, 2
_P, _I, _L, _F = c_void_p, c_int32, c_int64, c_float
_SIGNATURES: Final = {
    "npuq_quantize_rows": (_I, _P, _L, _L, _I, _I, _L, _P, _P, _P, _P, _P, _P),
    "npuq_matmul": (_P, _P, _P, _I, _P, _P, _L, _P, _I),
    "npuq_batch_matmul": (_P, _P, _I, _L, _L, _L, _L, _L, _L, _P, _I, _L, _L, _L, _P),
    "npuq_dynamic_quant": (_P, _P, _I, _L, _L, _L, _P, _P),
    "npuq_swiglu": (_P, _P, _I, _L, _L, _P),
    "npuq_swiglu_quant": (_P, _P, _I, _L, _L, _P, _P),
    "npuq_rms_norm": (_P, _P, _I, _L, _P, _L, _L, _F, _P),
    "npuq_add_rms_norm": (_P, _P, _P, _I, _P, _L, _L, _F, _P, _P),
    "npuq_gating_top_k": (_P, _P, _P, _L, _L, _L, _I, _L, _L, _I, _I, _F, _P, _P),
    "npuq_init_routing": (_P, _P, _I, _L, _P, _L, _L, _L, _P, _P, _P, _P, _P),
    "npuq_finalize_routing": (_P, _P, _I, _L, _P, _P, _L, _L, _P, _P),
    "npuq_interleave_rope": (_P, _P, _I, _L, _L, _L, _L, _L, _P, _P, _P),
    "npuq_kv_cache_write": (_P, _P, _P, _L, _P, _P, _P, _P, _L, _F, _P, _P),
    "npuq_attention_paged": (_P, _P, _P, _P, _L, _P, _P, _L, _P, _L, _F, _P),
}


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built or belongs to another version of the package."""
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
    loaded.npuq_level_name.argtypes, loaded.npuq_level_name.restype = (c_int,), c_char_p
    loaded.npuq_pool_create.argtypes, loaded.npuq_pool_create.restype = (c_int, c_int), c_void_p
    loaded.npuq_pool_destroy.argtypes, loaded.npuq_pool_destroy.restype = (c_void_p,), None
    loaded.npuq_pool_level.argtypes = (c_void_p,)
    return loaded


def levels() -> tuple[str, ...]:
    """Names of the instruction-set levels that this library has and this CPU can run, worst first."""
    found = library()
    if found is None:
        return ()
    names = [
        found.npuq_level_name(index) for index in range(found.npuq_level_count()) if found.npuq_level_usable(index)
    ]
    return tuple(name.decode() for name in names)


def description() -> str:
    """What does the arithmetic here, for `npuq --version` and `npuq doctor`."""
    usable = levels()
    if usable:
        return f"native kernels ({usable[-1]})"
    if LIBRARY.exists():
        return f"torch (native kernels are of another version or platform: reinstall npuq to rebuild {LIBRARY.name})"
    return "torch (native kernels were not built: install a C compiler and reinstall npuq)"


@dataclass(frozen=True)
class NativeRows:
    """Rows as `quantize` leaves them: codes int8 [R, K], or [R / 2, K] packed with bias [R, columns] for 4 bits; scale
    float32 [R, 1]; squared_error and squared_norm float64 [R]."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    squared_error: Tensor
    squared_norm: Tensor


def quantize(
    stored: StoredRows,
    bits: int,
    mse: bool,
    bias_columns: int,
    level: str | None = None,
) -> NativeRows:
    """Quantize stored rows [R, K] in one pass, on the calling thread.

    R is even for 4 bits; K at most 2**17. The numbers are those of `schemes.quantize_rows` on the decoded rows, bit for
    bit. Raises NonFiniteError, and RuntimeError where there is no library.
    """
    found = library()
    if found is None:
        raise RuntimeError(description())
    rows = stored.rows.contiguous()
    (count, columns), packed = rows.shape, bits == 4
    codes = torch.empty(count // 2 if packed else count, columns, dtype=torch.int8)
    scale, bias = torch.empty(count, 1), torch.empty(count, bias_columns) if packed else None
    error, norm = torch.empty(count, dtype=torch.float64), torch.empty(count, dtype=torch.float64)
    source = _source(rows, stored.blocks)
    bad_row = c_int64()
    status = found.npuq_quantize_rows(
        -1 if level is None else _level_index(found, level),
        ctypes.byref(source),
        count,
        columns,
        bits,
        mse,
        bias_columns,
        codes.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        error.data_ptr(),
        norm.data_ptr(),
        ctypes.byref(bad_row),
    )
    if status == _NOT_FINITE:
        raise NonFiniteError(bad_row.value)
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory to quantize rows of {columns} weights")
    return NativeRows(codes, scale, bias, error, norm)


def _source(rows: Tensor, blocks: BlockScale | None) -> Source:
    code = DTYPES[rows.dtype]
    if blocks is None:
        return Source(rows.data_ptr(), None, 0, 0, 1, max(1, rows.shape[1]), code)
    if blocks.scale.dtype != torch.float32 or not blocks.scale.is_contiguous():
        raise ValueError("block scales must be contiguous float32")
    return Source(
        rows.data_ptr(),
        blocks.scale.data_ptr(),
        blocks.scale.shape[1],
        blocks.first_row,
        blocks.block_rows,
        blocks.block_columns,
        code,
    )


def _level_index(found: ctypes.CDLL, level: str) -> int:
    if level not in levels():
        raise RuntimeError(f"no native kernels for {level!r} here, only for {', '.join(levels())}")
    names = [found.npuq_level_name(index).decode() for index in range(found.npuq_level_count())]
    return names.index(level)


class Pool:
    """Threads that share out the work of one call at a time; calls from several Python threads take turns.

    threads: how many work, the caller's included; None for torch's own number, which follows OMP_NUM_THREADS.
    level: an instruction-set level by name; None for the best. Raises RuntimeError where there is no library, or the
    level cannot run here.
    """

    def __init__(self, threads: int | None = None, level: str | None = None):
        found = library()
        if found is None:
            raise RuntimeError(description())
        self.threads = torch.get_num_threads() if threads is None else threads
        self.level = level or levels()[-1]
        self._library = found
        self.handle: int | None = found.npuq_pool_create(self.threads, _level_index(found, self.level))
        if self.handle is None:
            raise RuntimeError(f"cannot start {self.threads} threads")

    def call(self, name: str, *arguments: object) -> None:
        """Call `npuq_<name>` on this pool. Raises MemoryError when its scratch cannot be had."""
        if getattr(self._library, "npuq_" + name)(self.handle, *arguments):
            raise MemoryError(f"npuq_{name}: no memory for scratch")

    def __del__(self) -> None:
        if getattr(self, "handle", None) is not None:
            self._library.npuq_pool_destroy(self.handle)
            self.handle = None
