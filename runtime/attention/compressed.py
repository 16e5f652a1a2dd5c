"""Attention to a sliding window and to compressed entries (DeepSeek-V4).

The cache has three kinds of rows. Keys of the window, and what an unfinished entry still reads of its tokens, are kept
for the last tokens of each block alone. An entry is one row for `ratio` tokens. All three lie in blocks of tokens, so
that a sequence can begin in the blocks of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import BackendError
from ...models.compressed_attention import CompressedAttention as Widths
from ...models.rope_config import RopeConfig
from ...models.rope_frequencies import attention_factor, inverse_frequencies
from ..ops import Activation, AttentionWeights, Ops, Step
from ..ops.compressed_attention import (
    ENTRY,
    INDEX_ENTRY,
    INDEX_TOKENS,
    KEY,
    TOKENS,
    Compressed,
    CompressedAttention,
    CompressedConfig,
    CompressedParts,
    CompressorParts,
    Span,
    spans_of,
)
from ..ops.handles import own
from .kind import Attended, Parts
from .pools import LayerCache, Pool


@dataclass(frozen=True)
class CompressedAttentionKind:
    """Attention to a window and compressed entries of one model. See `AttentionKind`.

    rope, compressed_rope: rotary parameters of layers without and with entries.
    """

    widths: Widths
    rope: RopeConfig
    compressed_rope: RopeConfig
    config: CompressedConfig

    @property
    def dense_tokens(self) -> int | None:
        return None

    @property
    def absorbed_tokens(self) -> int:
        return 0

    @property
    def continues_on_pages(self) -> bool:
        return True

    def pools(self, layer: int) -> tuple[Pool, ...]:
        widths, ratio = self.widths, self.widths.ratio(layer)
        pools = [Pool(KEY, widths.head_dim, layout="nd", last=widths.sliding_window)]
        if ratio:
            # Entries that overlap read the tokens before their own too.
            series, last = (2, 2 * ratio) if widths.selects(layer) else (1, ratio)
            pools.append(Pool(TOKENS, 2 * series * widths.head_dim, layout="nd", last=last))
            pools.append(Pool(ENTRY, widths.head_dim, layout="nd", every=ratio))
        if widths.selects(layer):
            pools.append(Pool(INDEX_TOKENS, 4 * widths.index_head_dim, layout="nd", last=2 * ratio))
            pools.append(Pool(INDEX_ENTRY, widths.index_head_dim, layout="nd", every=ratio))
        return tuple(pools)

    def load(self, layer: int, parts: Parts, ops: Ops) -> Compressed:
        ratio, selects = self.widths.ratio(layer), self.widths.selects(layer)
        rope = self.compressed_rope if ratio else self.rope
        assert attention_factor(rope) == 1.0  # the table of families gives no other
        stored = CompressedParts(
            q_a=parts.linear("q_a"),
            q_a_norm=parts.tensor("q_a_norm"),
            q_b=parts.linear("q_b"),
            kv=parts.linear("kv"),
            kv_norm=parts.tensor("kv_norm"),
            sink=parts.tensor("sink"),
            o_a=parts.tensor("o_a"),
            o_b=parts.linear("o_b"),
            compressor=_compressor("compressed", parts) if ratio else None,
            indexer=(
                (parts.linear("index_q"), parts.linear("index_weights"), _compressor("index_compressed", parts))
                if selects
                else None
            ),
            ratio=ratio,
            frequencies=torch.from_numpy(inverse_frequencies(rope, rope.positions)),
        )
        return _ops(ops).load(stored, self.config)

    def with_cache_scales(self, weights: AttentionWeights, scales: Mapping[str, Tensor], ops: Ops) -> Compressed:
        raise BackendError(f"no int8 codes can stand in pools {sorted(scales)} of this model's KV cache")

    def norm(
        self, x: Tensor | None, residual: Tensor, gain: Tensor, weights: AttentionWeights, ops: Ops
    ) -> tuple[Activation, Tensor]:
        # The compressors' float linears read the same rows: they are not quantized.
        if x is None:
            return ops.norms.rms_norm(residual, gain, self.config.rms_norm_eps), residual
        return ops.norms.add_rms_norm(x, residual, gain, self.config.rms_norm_eps)

    def write(
        self, hidden: Activation, weights: AttentionWeights, cache: LayerCache, step: Step, ops: Ops
    ) -> dict[str, Tensor]:
        raise BackendError("calibration does not run attention to compressed entries: take a method without it")

    def attend(
        self,
        hidden: Activation,
        weights: AttentionWeights,
        cache: LayerCache,
        step: Step,
        ops: Ops,
        selected: Tensor | None = None,
    ) -> Attended:
        layer, rows, compressed = own(weights, Compressed), own(hidden, Tensor), _ops(ops)
        spans = spans_of(step, cache.block_size)
        positions = compressed.positions(spans)
        queries, latent = compressed.queries(rows, positions, layer)
        keys = compressed.keys(rows, positions, layer)
        tokens = None if layer.compressor is None else compressed.compressor_tokens(rows, layer.compressor)
        attended = []
        for span in spans:
            entries = chosen = None
            if layer.compressor is not None and tokens is not None:
                entries = compressed.entries(
                    tokens[span.rows], layer.compressor, layer.frequencies, span, cache, (TOKENS, ENTRY)
                )
            if layer.indexer is not None:
                chosen = self._selected(rows[span.rows], latent[span.rows], layer, span, cache, compressed)
            attended.append(compressed.attend(queries[span.rows], keys[span.rows], entries, chosen, span, layer, cache))
        return Attended(compressed.output(torch.cat(attended), positions, layer))

    def _selected(
        self, hidden: Tensor, latent: Tensor, layer: Compressed, span: Span, cache: LayerCache, ops: CompressedAttention
    ) -> Tensor:
        assert layer.indexer is not None
        compressor = layer.indexer.compressor
        tokens = ops.compressor_tokens(hidden, compressor)
        entries = ops.entries(tokens, compressor, layer.frequencies, span, cache, (INDEX_TOKENS, INDEX_ENTRY))
        return ops.select(hidden, latent, entries, span, layer)


def _ops(ops: Ops) -> CompressedAttention:
    assert ops.compressed is not None, "`check_backend` refuses the others"
    return ops.compressed


def _compressor(part: str, parts: Parts) -> CompressorParts:
    return CompressorParts(
        kv=parts.linear(f"{part}_kv"),
        gate=parts.linear(f"{part}_gate"),
        ape=parts.tensor(f"{part}_ape"),
        norm=parts.tensor(f"{part}_norm"),
    )
