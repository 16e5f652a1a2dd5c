"""Cases of the indexer, and of attention to selected tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ....formats.schemes import Scheme
from ...attention.pools import LayerCache
from ...ops import (
    Activation,
    Decode,
    IndexerConfig,
    IndexerParts,
    Ops,
    Positions,
)
from ...ops.reference import ReferenceOps
from ...ops.sparse_attention import INDEX_KEY
from .data import (
    BLOCK,
    HEAD,
    HIDDEN,
    INDEX_HEAD,
    INDEX_HEADS,
    LATENT,
    ROPE,
    SCALE,
    SPARSE_POOLS,
    TOKENS,
    Case,
    random_rows,
    random_values,
    rope_rows,
    stored_part,
)


def index_keys(ops: Ops) -> tuple[Activation, ...]:
    """Index keys of both rope conventions, as the cache has them; slots −1 are not written."""
    written = []
    for interleave in (False, True):
        config = IndexerConfig(INDEX_HEADS, INDEX_HEAD, ROPE, topk=48, rope_interleave=interleave)
        parts = IndexerParts(
            q=stored_part(Scheme.W8A8, INDEX_HEADS * INDEX_HEAD, HIDDEN, seed=33),
            k=stored_part(Scheme.FLOAT, INDEX_HEAD, HIDDEN, seed=34),
            k_norm=1 + 0.1 * random_values(INDEX_HEAD, seed=35),
            k_norm_bias=0.1 * random_values(INDEX_HEAD, seed=36),
            weights=stored_part(Scheme.FLOAT, INDEX_HEADS, HIDDEN, seed=37),
        )
        cache = ops.caches.new(SPARSE_POOLS, 4, BLOCK)
        slots = torch.tensor([2 * BLOCK, 2 * BLOCK + 1, -1, 2 * BLOCK + 3, 5, -1]).to(ops.device)
        positions = Positions(slots, *rope_rows(ops, TOKENS))
        ops.sparse.write_keys(random_rows(ops, TOKENS, HIDDEN), ops.sparse.load(parts, config), positions, cache)
        written.append(cache[INDEX_KEY].read(torch.arange(4, device=ops.device), 4 * BLOCK))
    return tuple(written)


def sparse_cache(ops: Ops) -> tuple[LayerCache, Decode]:
    """Latents, rope keys and index keys of two sequences in ND pages, and two queries of each."""
    cache, slots = ops.caches.new(SPARSE_POOLS, 4, BLOCK), torch.arange(4 * BLOCK, device=ops.device)
    for seed, (name, pages) in enumerate(cache.pages.items()):
        cache[name].write(slots, random_rows(ops, 4 * BLOCK, pages.pool.channels, seed=96 + seed))
    table = torch.tensor([[1, 3], [2, 0]], dtype=torch.int32).to(ops.device)
    return cache, Decode.selecting(q_lens=(2, 4), kv_lens=(BLOCK + 9, 40), block_table=table)


def index_queries(ops: Ops) -> tuple[Tensor, Tensor]:
    return random_rows(ops, 4, INDEX_HEADS, INDEX_HEAD, seed=17), random_rows(ops, 4, INDEX_HEADS, seed=18)


def select(ops: Ops, cache: LayerCache, decode: Decode) -> Tensor:
    return ops.sparse.lightning_indexer(*index_queries(ops), cache[INDEX_KEY], decode, 48)


def lightning_indexer(ops: Ops) -> tuple[Activation, ...]:
    """The scores of the selected tokens, and which of the places are empty: two tokens of one score may stand for each
    other, in any order."""
    cache, decode = sparse_cache(ops)
    selected = select(ops, cache, decode)[:, 0].cpu().long()
    query, weights = (each.cpu().double() for each in index_queries(ops))
    rows = []
    for sequence, blocks in enumerate(decode.block_table):
        keys = cache[INDEX_KEY].read(blocks, decode.kv_lens[sequence]).cpu().double()
        two = slice(2 * sequence, 2 * sequence + 2)
        scores = ((query[two] @ keys.T).relu() * weights[two].unsqueeze(-1)).sum(1)
        found = scores.gather(1, selected[two].clamp(0, len(keys) - 1)).masked_fill(selected[two] < 0, 0)
        rows.append(found.sort(dim=-1).values)
    return torch.cat(rows), (selected < 0).double()


def sparse_attention(heads: int) -> Case:
    """Attention to the reference's selection, so that a score on a tie does not matter, and its way out of the latent
    space."""

    def case(ops: Ops) -> tuple[Activation, ...]:
        cache, decode = sparse_cache(ops)
        reference = ReferenceOps(ops.dtype)
        selected = select(reference, *sparse_cache(reference)).to(ops.device)
        q, q_rope = random_rows(ops, 4, heads, LATENT, seed=15), random_rows(ops, 4, heads, ROPE, seed=16)
        attended = ops.sparse.sparse_flash_attention(q, q_rope, cache, decode, selected, SCALE)
        w_uv = ops.weights.parameter(random_rows(ops, heads, LATENT, HEAD, seed=38))
        return attended, ops.products.batch_matmul(attended, w_uv)

    return case
