"""Attention to a sliding window and to compressed entries of all earlier tokens (DeepSeek-V4, section 2.3).

One head is key and value at once. Its last channels are rotated, and the output is rotated back. A layer compresses
`ratio` tokens into an entry. Where entries overlap, an entry also reads the `ratio` tokens before its own, and an
indexer selects the entries that a query attends to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.pools import LayerCache
from .handles import Activation, AttentionWeights, Linear, LinearPart
from .norms import Norms
from .products import Products
from .steps import Step
from .weights import Weights

KEY, TOKENS, ENTRY = "key", "tokens", "entry"
"""Pools: keys of the window; series and gates of the tokens that later entries read; entries."""
INDEX_TOKENS, INDEX_ENTRY = "index_tokens", "index_entry"
"""Pools: the same of the indexer's compressor."""


@dataclass(frozen=True)
class CompressedConfig:
    """Widths and constants of a model's attention; `models.compressed_attention` has their meaning."""

    heads: int
    head_dim: int
    rope_dim: int
    groups: int
    window: int
    index_heads: int
    index_head_dim: int
    topk: int
    rms_norm_eps: float
    softmax_scale: float


@dataclass(frozen=True)
class CompressorParts:
    """The stored weights of one compressor: kv and gate `[series, H]`, ape float32 `[ratio, series]`, norm `[d]`.

    series: d channels, or 2·d where entries overlap.
    """

    kv: LinearPart
    gate: LinearPart
    ape: Tensor
    norm: Tensor


@dataclass(frozen=True)
class CompressedParts:
    """The stored attention weights of one layer, from which `CompressedAttention.load` makes its handle.

    o_a: float `[groups · o_lora, N · d / groups]`, block diagonal. sink: float32 `[N]`. compressor: None at ratio 0.
    indexer: (index queries `[n · d, q_lora]`, head weights `[n, H]`, its compressor); None without one.
    frequencies: float64 `[rope_dim / 2]`, the angles a position.
    """

    q_a: LinearPart
    q_a_norm: Tensor
    q_b: LinearPart
    kv: LinearPart
    kv_norm: Tensor
    sink: Tensor
    o_a: Tensor
    o_b: LinearPart
    compressor: CompressorParts | None
    indexer: tuple[LinearPart, LinearPart, CompressorParts] | None
    ratio: int
    frequencies: Tensor


@dataclass(frozen=True)
class Compressor:
    """Handle of one compressor. See `CompressorParts`."""

    kv: Linear
    gate: Linear
    ape: Tensor
    norm: Tensor
    ratio: int
    eps: float

    @property
    def head_dim(self) -> int:
        return self.norm.shape[0]

    @property
    def overlaps(self) -> bool:
        """True if an entry also reads the `ratio` tokens before its own."""
        return self.ape.shape[1] > self.head_dim


@dataclass(frozen=True)
class EntryIndexer:
    """Handle of the indexer that selects entries."""

    q: Linear
    weights: Linear
    compressor: Compressor


@dataclass(frozen=True)
class Compressed(AttentionWeights):
    """Handle of a layer's attention to a window and compressed entries. See `CompressedParts`.

    o_a: `[groups, N · d / groups, o_lora]`, in its stored dtype.
    """

    config: CompressedConfig
    q_a: Linear
    q_a_norm: Tensor
    q_b: Linear
    kv: Linear
    kv_norm: Tensor
    sink: Tensor
    o_a: Tensor
    o_b: Linear
    compressor: Compressor | None
    indexer: EntryIndexer | None
    frequencies: Tensor


@dataclass(frozen=True)
class Span:
    """The rows of one sequence in a step.

    rows: of the step. start: the position of the first. blocks: int `[blocks]`, the sequence's; None: nothing of it is
    cached, which only whole sequences can do.
    """

    rows: slice
    start: int
    blocks: Tensor | None

    @property
    def end(self) -> int:
        """Past-the-last position."""
        return self.start + self.rows.stop - self.rows.start


class CompressedAttention(ABC):
    """Operators of attention to a window and compressed entries, and composites of them.

    dtype: the compute dtype.
    """

    def __init__(self, dtype: torch.dtype, weights: Weights, norms: Norms, products: Products):
        self.dtype, self.weights, self.norms, self.products = dtype, weights, norms, products

    @abstractmethod
    def rotate(self, x: Tensor, positions: Tensor, frequencies: Tensor, back: bool = False) -> Tensor:
        """Rotate the last channels of `[T, …, d]`, in pairs (2i, 2i + 1), which keep their places.

        positions: int64 `[T]`. frequencies: float64 `[rope_dim / 2]`. back: by the opposite angles.
        """

    @abstractmethod
    def pool_windows(self, tokens: Tensor, compressor: Compressor, absent: bool) -> Tensor:
        """Mix the tokens of consecutive entries: series and gates `[entries · ratio, 2 · series]` → `[entries, d]`.

        Channel by channel, an entry is Σ_j softmax_j(gate_j + ape_j) · series_j over its `ratio` tokens. Where entries
        overlap, the rows have `ratio` tokens more in front; an entry mixes the first series of the `ratio` tokens
        before its own with the second series of its own, in one softmax. absent: the tokens in front do not exist, and
        count for nothing. Softmax and sums in float32.
        """

    @abstractmethod
    def select_entries(self, query: Tensor, weights: Tensor, keys: Tensor, seen: Tensor, count: int) -> Tensor:
        """Select the entries of the largest scores for each query: bool `[T, entries]`.

        A score is Σ_h weights_h · max(0, query_h · key), in float32: query `[T, n, d]`, weights `[T, n]`, keys
        `[entries, d]`. Query t selects `count` of its first `seen_t` entries, or all that it sees. seen: int64 `[T]`.
        Of equal scores the earlier entry wins.
        """

    @abstractmethod
    def sink_attention(self, query: Tensor, keys: Tensor, visible: Tensor, sink: Tensor, scale: float) -> Tensor:
        """Attend to keys that are their own values: query `[T, N, d]`, keys `[S, d]` → `[T, N, d]`.

        visible: bool `[T, S]`. sink: float32 `[N]`, the logit of a further key, whose value is 0. Softmax in float32.
        """

    def load(self, parts: CompressedParts, config: CompressedConfig) -> Compressed:
        """Make the handle of one layer."""
        indexer = None
        if parts.indexer is not None:
            q, weights, compressor = parts.indexer
            indexer = EntryIndexer(
                self.weights.linear_of([q]),
                self.weights.linear_of([weights]),
                self._compressor(compressor, parts.ratio, config),
            )
        o_a = self.weights.parameter(parts.o_a).unflatten(0, (config.groups, -1))
        return Compressed(
            config=config,
            q_a=self.weights.linear_of([parts.q_a]),
            q_a_norm=self.weights.parameter(parts.q_a_norm, self.dtype),
            q_b=self.weights.linear_of([parts.q_b]),
            kv=self.weights.linear_of([parts.kv]),
            kv_norm=self.weights.parameter(parts.kv_norm, self.dtype),
            sink=self.weights.parameter(parts.sink, torch.float32),
            o_a=o_a.transpose(1, 2),
            o_b=self.weights.linear_of([parts.o_b]),
            compressor=None if parts.compressor is None else self._compressor(parts.compressor, parts.ratio, config),
            indexer=indexer,
            frequencies=parts.frequencies,
        )

    def _compressor(self, parts: CompressorParts, ratio: int, config: CompressedConfig) -> Compressor:
        return Compressor(
            kv=self.weights.linear_of([parts.kv]),
            gate=self.weights.linear_of([parts.gate]),
            ape=self.weights.parameter(parts.ape, torch.float32),
            norm=self.weights.parameter(parts.norm, self.dtype),
            ratio=ratio,
            eps=config.rms_norm_eps,
        )

    def positions(self, spans: tuple[Span, ...]) -> Tensor:
        """Positions of a step's rows in their sequences: int64 `[T]`."""
        return torch.cat([torch.arange(span.start, span.end) for span in spans])

    def queries(self, hidden: Activation, positions: Tensor, weights: Compressed) -> tuple[Tensor, Tensor]:
        """Project `[T, H]` to (queries `[T, N, d]`, normed without a gain and rotated; their latent `[T, q_lora]`)."""
        config = weights.config
        latent = self.norms.rms_norm(self.products.linear(hidden, weights.q_a), weights.q_a_norm, config.rms_norm_eps)
        query = self.products.linear(latent, weights.q_b).unflatten(-1, (config.heads, config.head_dim))
        gain = torch.ones(config.head_dim, dtype=self.dtype, device=query.device)
        return self.rotate(
            self.norms.rms_norm(query, gain, config.rms_norm_eps), positions, weights.frequencies
        ), latent

    def keys(self, hidden: Activation, positions: Tensor, weights: Compressed) -> Tensor:
        """Project `[T, H]` to keys `[T, d]`, normed and rotated."""
        rows = self.norms.rms_norm(
            self.products.linear(hidden, weights.kv), weights.kv_norm, weights.config.rms_norm_eps
        )
        return self.rotate(rows, positions, weights.frequencies)

    def compressor_tokens(self, hidden: Activation, compressor: Compressor) -> Tensor:
        """Series and gates of hidden rows, side by side: `[T, 2 · series]`."""
        return torch.cat(self.products.linears(hidden, [compressor.kv, compressor.gate]), dim=-1)

    def entries(
        self,
        tokens: Tensor,
        compressor: Compressor,
        frequencies: Tensor,
        span: Span,
        cache: LayerCache,
        pools: tuple[str, str],
    ) -> Tensor:
        """All entries of a sequence that are complete after a span's tokens: `[entries, d]`, normed and rotated.

        tokens: `compressor_tokens` of the span. pools: of the cache, for tokens and for entries; both are written.
        """
        ratio, blocks = compressor.ratio, span.blocks
        first, last = span.start // ratio, span.end // ratio
        # The window in front of the first entry is read too where entries overlap.
        begin = max(0, first - compressor.overlaps) * ratio
        if span.start > begin:
            assert blocks is not None
            tokens = torch.cat([cache.rows(pools[0], torch.arange(begin, span.start), blocks), tokens])
        absent = compressor.overlaps and first == 0
        if absent:
            tokens = torch.cat([torch.zeros_like(tokens[:1]).expand(ratio, -1), tokens])
        complete = (last - first + compressor.overlaps) * ratio
        new = tokens.new_empty(0, compressor.head_dim)
        if last > first:
            pooled = self.pool_windows(tokens[:complete], compressor, absent)
            normed = self.norms.rms_norm(pooled, compressor.norm, compressor.eps)
            new = self.rotate(normed, torch.arange(first, last) * ratio, frequencies)
        if blocks is None:
            return new
        places = torch.arange(last) * ratio + ratio - 1
        cache.put(pools[1], places[first:], blocks, new)
        own = tokens[len(tokens) - (span.end - span.start) :]
        cache.put(pools[0], torch.arange(span.start, span.end), blocks, own)
        return torch.cat([cache.rows(pools[1], places[:first], blocks), new])

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        entries: Tensor | None,
        selected: Tensor | None,
        span: Span,
        weights: Compressed,
        cache: LayerCache,
    ) -> Tensor:
        """Attention of one span's queries `[T, N, d]`: to the window, and to the entries that each sees: `[T, N, d]`.

        keys: of the span, `[T, d]`; they are written into the cache. entries: `[entries, d]`, or None at ratio 0.
        selected: bool `[T, entries]`; None: all.
        """
        window, blocks = weights.config.window, span.blocks
        positions = torch.arange(span.start, span.end)
        seen = torch.arange(max(0, span.start - window + 1), span.end)
        distance = positions[:, None] - seen
        visible, attended = (distance >= 0) & (distance < window), [keys]
        if len(seen) > len(keys):
            assert blocks is not None
            attended.insert(0, cache.rows(KEY, seen[: -len(keys)], blocks))
        if blocks is not None:
            cache.put(KEY, positions, blocks, keys)
        if entries is not None:
            assert weights.compressor is not None
            shown = entries_seen(span, weights.compressor.ratio)[:, None] > torch.arange(len(entries))
            attended.append(entries)
            visible = torch.cat([visible, shown if selected is None else shown & selected], dim=1)
        return self.sink_attention(query, torch.cat(attended), visible, weights.sink, weights.config.softmax_scale)

    def select(self, hidden: Tensor, latent: Tensor, entries: Tensor, span: Span, weights: Compressed) -> Tensor:
        """Entries that each query of a span selects, by the index entries `[entries, n]`: bool `[T, entries]`.

        hidden `[T, H]` and latent `[T, q_lora]`: of the span.
        """
        config, indexer = weights.config, weights.indexer
        assert indexer is not None
        query = self.products.linear(latent, indexer.q).unflatten(-1, (config.index_heads, config.index_head_dim))
        query = self.rotate(query, torch.arange(span.start, span.end), weights.frequencies)
        head_weights = self.products.linear(hidden, indexer.weights)
        seen = entries_seen(span, indexer.compressor.ratio)
        return self.select_entries(query, head_weights, entries, seen, config.topk)

    def output(self, attended: Tensor, positions: Tensor, weights: Compressed) -> Tensor:
        """Rotate back, and apply the output projection group by group: `[T, N, d]` → `[T, H]`."""
        straight = self.rotate(attended, positions, weights.frequencies, back=True)
        groups = straight.flatten(1).unflatten(1, (weights.config.groups, -1))
        return self.products.linear(self.products.batch_matmul(groups, weights.o_a).flatten(1), weights.o_b)


def entries_seen(span: Span, ratio: int) -> Tensor:
    """The number of entries that each token of a span sees: those that are complete with it. int64 `[T]`."""
    return (torch.arange(span.start, span.end) + 1) // ratio


def spans_of(step: Step, block_size: int) -> tuple[Span, ...]:
    """The sequences of a step whose continued chunks attend to pages (`AttentionKind.continues_on_pages`)."""
    spans, first = [], 0
    if step.decode is not None:
        for end, length, blocks in zip(step.decode.q_lens, step.decode.kv_lens, step.decode.block_table, strict=True):
            spans.append(Span(slice(first, end), length - (end - first), blocks))
            first = end
    if step.prefill is not None:
        before = first
        for past in step.prefill.lengths.q_lens:
            slots = step.positions.slots[first : before + past]
            blocks = None if int(slots[0]) < 0 else slots[::block_size] // block_size
            spans.append(Span(slice(first, before + past), 0, blocks))
            first = before + past
    return tuple(spans)
