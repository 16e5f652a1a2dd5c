"""One pass through the model: its tokens, decoding and prefill parts, and the cache blocks that they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """Where tokens stand, in the cache and in their sequences.

    slots: int64 `[T]`, block · block_size + offset; negative ones are not written (−1 for none).
    cos, sin: compute dtype `[T, D]`, gathered rows of the rope tables with the halves duplicated.
    """

    slots: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Lengths:
    """Lengths of ragged sequences.

    q_lens, kv_lens: cumulative without a leading 0, of queries and of keys.
    causal: query i of a sequence sees keys j ≤ i + (kv length − query length); otherwise all.
    """

    q_lens: Sequence[int]
    kv_lens: Sequence[int]
    causal: bool


@dataclass(frozen=True)
class Decode:
    """The part of a step that attends in absorbed form. Its tokens come first in the step.

    An entry is a sequence, or a run of its queries where a backend takes so many at a time
    (`LatentAttention.most_queries`).

    q_lens: cumulative query lengths without a leading 0: 1, 2, 3, … with one query a sequence.
    kv_lens: number of tokens of each entry up to its last query, those of this step included (not cumulative).
    block_table: int32 `[sequences, max_blocks]` on the device; entries behind a sequence's blocks are 0 and never read.
    device_lens: int32 `[2, sequences]`, q_lens and kv_lens on the device; only where queries select tokens.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    block_table: Tensor
    device_lens: Tensor | None = None

    @classmethod
    def selecting(cls, q_lens: tuple[int, ...], kv_lens: tuple[int, ...], block_table: Tensor) -> Decode:
        """Make a part whose queries select tokens: with its lengths on the block table's device as well."""
        lens = torch.tensor([q_lens, kv_lens], dtype=torch.int32, device=block_table.device)
        return cls(q_lens, kv_lens, block_table, lens)

    @property
    def num_tokens(self) -> int:
        return self.q_lens[-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.kv_lens)


@dataclass(frozen=True)
class PrefixSegment:
    """Cached tokens before some prefill chunks, decompressed together. A sequence gives one run of tokens at most.

    rows: first and past-the-last row of the chunks, counted from the first prefill row of the step.
    lengths: of the chunks, and of the cached tokens that each sees; not causal.
    blocks: int32 `[blocks]` on the device, the blocks of the tokens, sequence by sequence.
    kept: int64 `[tokens]` on the device, which rows of the blocks are the tokens; None: the first ones.
    """

    rows: tuple[int, int]
    lengths: Lengths
    blocks: Tensor
    kept: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.lengths.kv_lens[-1]


@dataclass(frozen=True)
class Merge:
    """Prefill rows whose attention to their own chunks is merged with that to some segments of `Prefill.segments`."""

    rows: tuple[int, int]
    segments: tuple[int, ...]


@dataclass(frozen=True)
class Prefill:
    """The part of a step that attends over decompressed keys and values; its tokens follow those of `Decode`.

    lengths: of the chunks and of their own keys, which are as many. Chunks with cached tokens before them come first.
    """

    lengths: Lengths
    segments: tuple[PrefixSegment, ...]
    merges: tuple[Merge, ...]

    @property
    def num_tokens(self) -> int:
        return self.lengths.q_lens[-1]


@dataclass(frozen=True)
class Step:
    """One pass through the model, built once and shared by all layers. Lengths are host values, tensors on the device.

    token_ids: int64 `[T]`. positions: the tokens' positions.
    output_rows: int64 `[S]`, the rows to compute logits of; None for all.
    """

    token_ids: Tensor
    positions: Positions
    decode: Decode | None
    prefill: Prefill | None
    output_rows: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_decode_tokens(self) -> int:
        return self.decode.num_tokens if self.decode else 0
