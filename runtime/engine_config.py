"""Sizes of the engine: its cache and its steps."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Final

from ..errors import GenerationError
from ..inputs.printable import shown
from ..models.config import ModelConfig

BLOCK_SIZE: Final = 64
NPU_BLOCK_SIZE: Final = 128


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine: whole numbers, except for step_seconds.

    kv_cache_bytes: memory for the paged cache, which is touched only as the cache fills. It bounds the context, as the
    model's own limit does. None: `load` sizes it by memory (`Planner.auto_cache`). block_size: tokens a block, a
    multiple of 16. None: `load` names the backend's (`on`). max_num_seqs: sequences that run at once.
    max_num_batched_tokens: tokens of a step, prefill chunks and decodes together. prefix_segment_tokens: cached tokens
    that a chunk decompresses at a time. step_seconds: time that a step may take by its prefill, as measured on steps
    before; None: any. prefix_cache: sequences that begin alike share cache blocks, also with those that have ended.
    Raises GenerationError for sizes out of range.
    """

    kv_cache_bytes: int | None = None
    block_size: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 1024
    prefix_segment_tokens: int = 4096
    step_seconds: float | None = None
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in [size.name for size in fields(self) if size.name not in ("step_seconds", "prefix_cache")]:
            value = getattr(self, name)
            if type(value) is not int and not (name in ("kv_cache_bytes", "block_size") and value is None):
                raise GenerationError(f"{name} must be a whole number, not {shown(value)}")
        if type(self.prefix_cache) is not bool:
            raise GenerationError(f"prefix_cache must be True or False, not {shown(self.prefix_cache)}")
        seconds = self.step_seconds
        if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds < float("inf")):
            raise GenerationError(f"step_seconds must be None or a number above 0, not {shown(seconds)}")
        if not 16 <= self.block_tokens <= 1024 or self.block_tokens % 16:
            raise GenerationError(f"block_size {self.block_size} is not valid: a multiple of 16 up to 1024")
        if not 1 <= self.max_num_seqs < self.max_num_batched_tokens:
            raise GenerationError(
                f"max_num_seqs {self.max_num_seqs} must be at least 1 and below max_num_batched_tokens "
                f"{self.max_num_batched_tokens}"
            )
        if self.prefix_segment_tokens < 1:
            raise GenerationError(f"prefix_segment_tokens {self.prefix_segment_tokens} must be at least 1")

    @property
    def block_tokens(self) -> int:
        """Tokens a block; an NPU's where none is given."""
        return NPU_BLOCK_SIZE if self.block_size is None else self.block_size

    def on(self, backend: str, config: ModelConfig) -> EngineConfig:
        """Name the size of blocks where none is given.

        The tokens of a block that is not full are computed again by whoever shares it, so small blocks are better:
        BLOCK_SIZE tokens are the smallest that fill a tile of the CPU's attention. An NPU's attention to an int8 cache
        reads blocks of NPU_BLOCK_SIZE alone. DeepSeek-V4 keeps a window's keys once a block, so it has as large ones.
        """
        if self.block_size is not None:
            return self
        large = backend == "ascend" or config.compressed_rope is not None
        return replace(self, block_size=NPU_BLOCK_SIZE if large else BLOCK_SIZE)
