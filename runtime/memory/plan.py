"""Memory plans: what each rank of a layout holds, the cache tokens that are left, and the choice of a layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ...errors import BackendError
from ...units import format_bytes
from ..attention.kinds import attention_of
from ..attention.pools import stored_pools
from ..ranks.layout import Layout, layouts
from .stored import StoredModel
from .weights import Backend, Bytes, weight_bytes
from .workspace import StepSizes, Workspace, workspace

BLOCK_TOKENS: Final = 128
"""The least cache of a model that fits: a block."""
USEFUL_TOKENS: Final = 32_768
"""The cache of a layout that is recommended to somebody whose layout does not fit."""
CPU_CACHE_BYTES: Final = 2 << 30
"""The most that a cache takes on the CPU where nobody gives its size: other programs need the RAM too."""
_RANKS: Final = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class RankPlan:
    """The memory of the rank of a layout that needs most of it.

    weights: bytes by kind. usable: bytes that weights, workspace and cache may take. cache_token: bytes of the cache
    for a token, rounded up where not every token has a row. context: the longest sequence. Every rank has the same
    tokens in its cache.
    """

    layout: Layout
    weights: Mapping[str, Bytes]
    workspace: Workspace
    usable: int
    cache_token: int
    context: int

    @property
    def total_weights(self) -> Bytes:
        return Bytes(*map(sum, zip(*self.weights.values(), strict=True)))

    @property
    def left(self) -> int:
        """Bytes for the cache, and for what grows with the context; negative where the rest is too much already."""
        return self.usable - self.total_weights.copied - self.workspace.fixed

    @property
    def cache_tokens(self) -> int:
        """Tokens of the cache that fit beside the rest."""
        if self.left <= 0:
            return 0
        within = self.left // (self.cache_token + self.workspace.context_token)
        if within <= self.context:
            return within
        return (self.left - self.context * self.workspace.context_token) // self.cache_token

    def cached(self, tokens: int) -> int:
        """Bytes of a cache of so many tokens, with what grows with the context."""
        return tokens * self.cache_token + min(tokens, self.context) * self.workspace.context_token

    @property
    def fits(self) -> bool:
        """True if the cache has room for a block."""
        return self.cache_tokens >= BLOCK_TOKENS

    def as_dict(self) -> dict[str, Any]:
        """The plan as values for JSON, in bytes."""
        return {
            "ranks": self.layout.ranks,
            "ep": self.layout.ep,
            "tp": self.layout.tp,
            "weights": {kind: {"mapped": held.mapped, "copied": held.copied} for kind, held in self.weights.items()},
            "weight_bytes": self.total_weights.total,
            "workspace_bytes": self.workspace.fixed,
            "usable_bytes": self.usable,
            "cache_bytes_per_token": self.cache_token,
            "cache_tokens": self.cache_tokens,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class Planner:
    """Plans of one model on ranks of one kind. memory: bytes of a rank, its device's or its share of the RAM."""

    model: StoredModel
    backend: Backend
    memory: int
    sizes: StepSizes = field(default_factory=StepSizes)
    int8_cache: bool = False

    def rank(self, layout: Layout) -> RankPlan:
        """Plan one layout. Raises BackendError where it does not divide the model, or no backend has its attention."""
        config = self.model.config
        # The first ranks may own a tile more than the others.
        owned = layout.owned(config, 0)
        cache_token = self._cache_token(len(owned.heads))
        return RankPlan(
            layout,
            weight_bytes(self.model, owned, self.backend),
            workspace(config, owned, self.backend.dtype.itemsize, self.sizes)
            .times(self.backend.held)
            .plus(self.backend.spare_blocks * self.sizes.block_size * cache_token),
            int(self.memory * self.backend.usable),
            cache_token,
            config.rope.positions,
        )

    @property
    def cache_token(self) -> int:
        """Bytes of a token in the caches of all layers, for a rank that has all heads."""
        return self._cache_token(self.model.config.attention.heads)

    def _cache_token(self, heads: int) -> int:
        """Bytes of a token in the caches of all layers. Ranks share keys and values of several heads, and no latent."""
        config = self.model.config
        kind = attention_of(config, 1.0, heads)
        total, block_size = 0, self.sizes.block_size
        for layer in range(config.num_hidden_layers):
            pools = kind.pools(layer)
            codes = [pool.name for pool in pools if self.int8_cache and pool.int8]
            stored = stored_pools(pools, self.backend.dtype, "nz", codes)
            total += sum(pool.block_bytes(block_size) for pool in stored)
        return -(-total // block_size)

    def layouts(self, ranks: int) -> tuple[RankPlan, ...]:
        """Plan every layout of so many ranks that divides the model."""
        return tuple(self.rank(layout) for layout in layouts(self.model.config, ranks))

    def choose(self, ranks: int) -> RankPlan:
        """Choose the layout of so many ranks: the `recommended` one.

        Raises BackendError, with the numbers, where none fits, and where none divides the model.
        """
        plans, config = self.layouts(ranks), self.model.config
        if not plans:
            raise BackendError(
                f"{ranks} ranks divide neither the {config.n_routed_experts} routed experts nor the "
                f"{config.attention.heads} attention heads of this {config.model_type}; take a number that divides both"
            )
        best = recommended(plans)
        if not best.fits:
            raise self.refusal(best)
        return best

    def fewest(self, tokens: int = USEFUL_TOKENS) -> RankPlan | None:
        """The plan of the fewest devices, a power of two, that hold a cache of `tokens`; None where no number does."""
        for ranks in _RANKS:
            plans = self.layouts(ranks)
            if plans and (best := recommended(plans)).cache_tokens >= tokens:
                return best
        return None

    def check(self, plan: RankPlan, cache_bytes: int) -> None:
        """Raise BackendError, with the numbers and a remedy, where a rank cannot hold weights, a step and its cache.

        Mapped weights do not count: of pages that memory has no room for, the file keeps the content.
        """
        if plan.left < plan.cache_token * BLOCK_TOKENS:
            raise self.refusal(plan)
        tokens = cache_bytes // plan.cache_token
        if tokens > plan.cache_tokens:
            beside = plan.cached(tokens) - tokens * plan.cache_token
            raise BackendError(
                f"a KV cache of {format_bytes(cache_bytes)}, with {format_bytes(beside)} to attend to it, does not fit "
                f"beside {format_bytes(plan.total_weights.copied)} of weights and {format_bytes(plan.workspace.fixed)} "
                f"for a step: {format_bytes(plan.usable)} are usable; {plan.cache_tokens} tokens fit, a cache of "
                f"{format_bytes(plan.cache_tokens * plan.cache_token)} (--cache-size, kv_cache_bytes)"
            )

    def most_cache(self, plan: RankPlan) -> int:
        """Bytes of the largest cache that `auto_cache` chooses: all its sequences fill it; on the CPU, 2 GiB."""
        block = plan.cache_token * self.sizes.block_size
        blocks = self.sizes.logit_rows * -(-plan.context // self.sizes.block_size)
        if not self.backend.on_device:
            blocks = min(blocks, max(1, CPU_CACHE_BYTES // block))
        return blocks * block

    def auto_cache(self, plan: RankPlan, free: int | None = None) -> int:
        """Bytes of a cache whose size nobody gave, in whole blocks: what the rest leaves, at most `most_cache`.

        free: bytes that this process may still take; None where that is unknown, and the plan alone decides. Raises
        BackendError where not even a block is left.
        """
        self.check(plan, 0)
        room = plan if free is None else replace(plan, usable=min(plan.usable, free))
        block = plan.cache_token * self.sizes.block_size
        blocks = room.cache_tokens // self.sizes.block_size
        if blocks < 1:
            raise BackendError(
                f"no room for a KV cache: {format_bytes(max(0, room.usable))} of memory are free to use, weights take "
                f"{format_bytes(plan.total_weights.copied)} and a step {format_bytes(plan.workspace.fixed)}; end other "
                f"programs, or give --cache-size (kv_cache_bytes), at least {format_bytes(block)}, to use the reserve"
            )
        return min(blocks * block, self.most_cache(plan))

    def refusal(self, plan: RankPlan) -> BackendError:
        """The error for a plan that does not fit: its numbers, and what would fit."""
        alone = plan.layout.ranks == 1
        needs = f"with {plan.layout} each rank needs" if not alone else "the model needs"
        line = (
            f"{needs} {format_bytes(plan.total_weights.copied)} for weights and {format_bytes(plan.workspace.fixed)} "
            f"for a step, and {format_bytes(plan.usable)} of {format_bytes(self.memory)} are usable"
        )
        return BackendError(f"{line}; {self._remedy(plan)}")

    def _remedy(self, plan: RankPlan) -> str:
        if not self.backend.on_device:
            decoded = any(not part.stored.mapped for part in self.model.parts)
            remedy = "convert it (npuq convert): an artifact's weights stay in their files"
            return remedy if decoded else "let a step have fewer tokens (max_num_batched_tokens), or take more memory"
        enough = self.fewest()
        if enough is None:
            return "no number of such devices holds it"
        if enough.layout.ranks <= plan.layout.ranks:
            return f"--parallel {enough.layout} on {enough.layout.ranks} such devices fits"
        return f"{enough.layout.ranks} such devices hold it: torchrun --nproc-per-node {enough.layout.ranks} -m npuq …"


def recommended(plans: Iterable[RankPlan]) -> RankPlan:
    """Of the plans that fit, of those that divide the experts and with them their work, the one with most cache tokens.

    If none fits, the one that lacks least.
    """

    def worth(plan: RankPlan) -> tuple[int, ...]:
        return plan.fits, plan.layout.ep if plan.fits else 0, plan.cache_tokens, plan.left, -plan.layout.tp

    return max(plans, key=worth)
