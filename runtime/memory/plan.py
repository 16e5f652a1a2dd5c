"""Memory plans: what each rank of a layout holds, the cache tokens that are left, and the choice of a layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from ...errors import BackendError
from ...units import format_bytes
from ..attention.kinds import attention_of
from ..attention.pools import Layout as CacheLayout
from ..attention.pools import stored_pools
from ..ranks.layout import Layout, layouts
from .stored import StoredModel
from .weights import Backend, Bytes, weight_bytes
from .workspace import StepSizes, Workspace, workspace

LEAST_TOKENS: Final = 128
"""The cache of a model that fits: a block. With fewer tokens nothing can be generated."""


@dataclass(frozen=True)
class RankPlan:
    """The memory of the rank of a layout that needs most of it.

    weights: bytes by kind. usable: bytes that weights, workspace and cache may take. cache_token: bytes of the cache
    for a token. context: the longest sequence. cache_tokens: tokens that fit beside the rest; every rank has the same.
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
        if self.left <= 0:
            return 0
        within = self.left // (self.cache_token + self.workspace.context_token)
        if within <= self.context:
            return within
        return (self.left - self.context * self.workspace.context_token) // self.cache_token

    @property
    def fits(self) -> bool:
        return self.cache_tokens >= LEAST_TOKENS

    def cached(self, tokens: int) -> int:
        """Bytes that the cache of so many tokens takes, with what grows with the context."""
        return tokens * self.cache_token + min(tokens, self.context) * self.workspace.context_token

    def as_dict(self) -> dict[str, Any]:
        """The plan as values for JSON, in bytes."""
        total = self.total_weights
        return {
            "layout": {"ranks": self.layout.ranks, "ep": self.layout.ep, "tp": self.layout.tp},
            "weights": {kind: {"mapped": held.mapped, "copied": held.copied} for kind, held in self.weights.items()},
            "weight_bytes": total.total,
            "workspace_bytes": self.workspace.fixed,
            "usable_bytes": self.usable,
            "cache_bytes_per_token": self.cache_token,
            "cache_tokens": self.cache_tokens,
            "fits": self.fits,
        }


def plan_rank(
    model: StoredModel,
    layout: Layout,
    backend: Backend,
    memory: int,
    sizes: StepSizes | None = None,
    *,
    int8_cache: bool = False,
) -> RankPlan:
    """Plan the memory of the ranks of a layout; `memory` is that of one rank in bytes.

    Raises BackendError where the layout does not divide the model, or no backend has its attention.
    """
    sizes = sizes or StepSizes()
    # The first ranks may own a tile more than the others.
    owned = layout.owned(model.config, 0)
    return RankPlan(
        layout,
        weight_bytes(model, owned, backend),
        workspace(model.config, owned, backend.itemsize, sizes),
        int(memory * backend.usable),
        cache_bytes(model, backend.itemsize, int8=int8_cache),
        model.config.rope.positions,
    )


def plan_layouts(
    model: StoredModel, ranks: int, backend: Backend, memory: int, sizes: StepSizes | None = None
) -> tuple[RankPlan, ...]:
    """Plan every layout of so many ranks that divides the model."""
    return tuple(plan_rank(model, layout, backend, memory, sizes) for layout in layouts(model.config, ranks))


def choose_layout(
    model: StoredModel, ranks: int, backend: Backend, memory: int, sizes: StepSizes | None = None
) -> RankPlan:
    """Choose the layout of so many ranks that leaves most tokens for the cache.

    Raises BackendError, with the numbers, where none fits, and where none divides the model.
    """
    plans = plan_layouts(model, ranks, backend, memory, sizes)
    if not plans:
        raise BackendError(
            f"{ranks} ranks divide neither the {model.config.n_routed_experts} routed experts nor the "
            f"{model.config.attention.heads} attention heads of this {model.config.model_type}; take a number that "
            "divides both"
        )
    best = recommended(plans)
    if not best.fits:
        raise BackendError(f"{does_not_fit(best)}{_remedy(model, ranks, backend, memory, sizes)}")
    return best


def recommended(plans: Iterable[RankPlan]) -> RankPlan:
    """The plan with most cache tokens, else with most bytes left; of equals, the one that divides least."""
    return max(plans, key=lambda plan: (plan.cache_tokens, plan.left, -plan.layout.tp, -plan.layout.ep))


def does_not_fit(plan: RankPlan) -> str:
    """The numbers of a plan that does not fit, for a message."""
    one = plan.layout.ranks == 1
    return (
        f"{'the model needs' if one else f'with {plan.layout} each rank needs'} "
        f"{format_bytes(plan.total_weights.copied)} for weights and {format_bytes(plan.workspace.fixed)} for a step, "
        f"and {format_bytes(plan.usable)} are usable"
    )


def fewest_ranks(
    model: StoredModel, backend: Backend, memory: int, sizes: StepSizes | None = None, tokens: int = LEAST_TOKENS
) -> RankPlan | None:
    """The plan with the fewest ranks that fits with a cache of `tokens`; None where no number of ranks does."""
    for ranks in (1, 2, 4, 8, 16, 32, 64, 128):
        plans = plan_layouts(model, ranks, backend, memory, sizes)
        if plans and (best := recommended(plans)).cache_tokens >= tokens:
            return best
    return None


def _remedy(model: StoredModel, ranks: int, backend: Backend, memory: int, sizes: StepSizes | None) -> str:
    enough = fewest_ranks(model, backend, memory, sizes)
    if enough is None or enough.layout.ranks <= ranks:
        return "; no number of such devices holds it"
    return f"; {enough.layout.ranks} such devices hold it, with --parallel {enough.layout}"


def cache_bytes(model: StoredModel, itemsize: int, *, int8: bool = False, layout: CacheLayout = "nz") -> int:
    """Bytes of a token in the caches of all layers, which every rank has. int8: pools that can hold codes do."""
    config = model.config
    kind = attention_of(config, 1.0)
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    total = 0
    for layer in range(config.num_hidden_layers):
        pools = kind.pools(layer)
        scaled = [pool.name for pool in pools if int8 and pool.int8]
        total += sum(pool.token_bytes for pool in stored_pools(pools, dtype, layout, scaled))
    return total
