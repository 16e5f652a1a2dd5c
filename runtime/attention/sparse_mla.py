"""Sparse multi-head latent attention: MLA over the tokens that a lightning indexer selects (DeepSeek-V3.2, GLM-5).

While no sequence of a step is longer than a selection, every query attends to all that it sees, and the step is dense.
Otherwise all its tokens, those of prefill chunks too, attend in absorbed form to selected tokens of the cache. A layer
without an indexer attends to the selection that the layer below handed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ...errors import BackendError
from ...models.sparse_mla import Indexer
from ..ops import (
    Activation,
    AttentionWeights,
    IndexerConfig,
    IndexerParts,
    IndexerWeights,
    MlaConfig,
    Ops,
    SparseMla,
    Step,
)
from ..ops.handles import own
from ..ops.sparse_attention import INDEX_KEY
from .kind import Attended, Parts
from .mla import MlaAttention
from .pools import LayerCache, Pool


@dataclass(frozen=True)
class SparseMlaAttention:
    """Sparse latent attention of one model. See `AttentionKind`. full: for each layer, whether it has an indexer."""

    config: MlaConfig
    indexer: IndexerConfig
    full: tuple[bool, ...]

    @classmethod
    def of(cls, config: MlaConfig, indexer: Indexer, layers: int) -> SparseMlaAttention:
        """The attention of a model with `layers` decoder layers."""
        widths = IndexerConfig(
            n_heads=indexer.n_heads,
            head_dim=indexer.head_dim,
            rope_dim=config.qk_rope_head_dim,
            topk=indexer.topk,
            rope_interleave=indexer.rope_interleave,
        )
        return cls(config, widths, tuple(indexer.is_full(layer) for layer in range(layers)))

    @property
    def dense(self) -> MlaAttention:
        """The attention of steps without selection."""
        return MlaAttention(self.config)

    @property
    def dense_tokens(self) -> int:
        return self.indexer.topk

    @property
    def absorbed_tokens(self) -> int:
        return self.dense.absorbed_tokens

    @property
    def continues_on_pages(self) -> bool:
        return False

    def pools(self, layer: int) -> tuple[Pool, ...]:
        # Tokens are gathered one by one: a row lies together. The NPU's sparse operators take no other layout, and no
        # codes.
        pools = tuple(replace(pool, layout="nd", int8=False) for pool in self.dense.pools(layer))
        return (*pools, Pool(INDEX_KEY, self.indexer.head_dim, layout="nd")) if self.full[layer] else pools

    def load(self, layer: int, parts: Parts, ops: Ops) -> SparseMla:
        return SparseMla(self.dense.load(layer, parts, ops), self._indexer(parts, ops) if self.full[layer] else None)

    def _indexer(self, parts: Parts, ops: Ops) -> IndexerWeights:
        stored = IndexerParts(
            q=parts.linear("index_q"),
            k=parts.linear("index_k"),
            k_norm=parts.tensor("index_k_norm"),
            k_norm_bias=parts.tensor("index_k_norm_bias"),
            weights=parts.linear("index_weights"),
        )
        return ops.sparse.load(stored, self.indexer)

    def with_cache_scales(self, weights: AttentionWeights, scales: Mapping[str, Tensor], ops: Ops) -> SparseMla:
        raise BackendError(f"no int8 codes can stand in pools {sorted(scales)} of this model's KV cache")

    def norm(
        self, x: Tensor | None, residual: Tensor, gain: Tensor, weights: AttentionWeights, ops: Ops
    ) -> tuple[Activation, Tensor]:
        if own(weights, SparseMla).indexer is None:
            return self.dense.norm(x, residual, gain, own(weights, SparseMla).mla, ops)
        # The indexer's float linears read the same rows: they are not quantized.
        if x is None:
            return ops.norms.rms_norm(residual, gain, self.config.rms_norm_eps), residual
        return ops.norms.add_rms_norm(x, residual, gain, self.config.rms_norm_eps)

    def write(
        self, hidden: Activation, weights: AttentionWeights, cache: LayerCache, step: Step, ops: Ops
    ) -> dict[str, Tensor]:
        sparse = own(weights, SparseMla)
        self._write_keys(hidden, sparse, cache, step, ops)
        return self.dense.write(hidden, sparse.mla, cache, step, ops)

    def attend(
        self,
        hidden: Activation,
        weights: AttentionWeights,
        cache: LayerCache,
        step: Step,
        ops: Ops,
        selected: Tensor | None = None,
    ) -> Attended:
        sparse = own(weights, SparseMla)
        # Later steps select among these tokens, even if this one does not.
        self._write_keys(hidden, sparse, cache, step, ops)
        if step.decode is None or step.decode.longest <= self.dense_tokens:
            return self.dense.attend(hidden, sparse.mla, cache, step, ops)

        mla, positions = sparse.mla, step.positions
        reader = None if sparse.indexer is None else sparse.indexer.q
        absorbed, q_rope, q_latent = ops.mla.prolog_with_latent(hidden, mla, cache, step, reader)
        if sparse.indexer is not None:
            assert q_latent is not None
            rows = own(hidden, Tensor)
            selected = ops.sparse.select(rows, q_latent, sparse.indexer, cache, positions, step.decode)
        assert selected is not None  # the first layer has an indexer
        scale = self.config.softmax_scale
        attended = ops.sparse.sparse_flash_attention(absorbed, q_rope, cache, step.decode, selected, scale)
        return Attended(ops.mla.output(ops.mla.bring_out(attended, mla), mla), selected)

    def _write_keys(self, hidden: Activation, sparse: SparseMla, cache: LayerCache, step: Step, ops: Ops) -> None:
        if sparse.indexer is not None:
            ops.sparse.write_keys(own(hidden, Tensor), sparse.indexer, step.positions, cache)
