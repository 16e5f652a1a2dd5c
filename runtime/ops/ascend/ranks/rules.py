"""Which exchange a MoE layer takes, by documented limits alone: the same answer on all ranks, known before a step.

Sources: op-plugin's pages of npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2 (Atlas A2 and A3).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

MB = 1 << 20
DEFAULT_BUFFER = 200  # MB, of an HCCL communicator without HCCL_BUFFSIZE
MAX_EXPERTS = 1024
MAX_RECEIVED = 10240  # rows: each is an expert of its own where init_routing quantizes them


class Exchange(Enum):
    """How rows of experts come back to their tokens.

    DISPATCH: every rank dispatches its slice of the tokens and combines it, by two operators that communicate.
    SCATTER: every rank has all tokens and runs its experts' rows; each row goes to the rank of its token.
    SUM: the same, but every rank gets all rows, as a sum with zeros: for fewer tokens than ranks.
    """

    DISPATCH = "dispatch and combine"
    SCATTER = "all-to-all"
    SUM = "all-reduce"


@dataclass(frozen=True)
class DispatchLimits:
    """Documented limits of dispatch and combine on a family of chips, and where engines use them.

    comm_alg: the communication algorithm that the limits are of. ranks: sizes of a group. hidden: the least and the
    greatest number of channels, and their step. rows: dispatched by a rank in one call. scales_travel: dispatch takes
    expert_scales, and combine what came of them. least_ranks, most_experts: of a rank; the documentation allows fewer
    ranks and more experts, but in one A2 server fullmesh sends by RDMA what HCCL's own collectives send by HCCS, and
    vLLM-Ascend prefers those there.
    """

    comm_alg: str
    ranks: frozenset[int]
    hidden: range
    rows: int
    scales_travel: bool
    least_ranks: int
    most_experts: int

    def buffer(self, ranks: int, experts: int, hidden: int, rows: int) -> int:
        """Bytes of HCCL's buffer that a call needs: `experts` of each rank, `rows` of one expert each."""
        if self.scales_travel:
            return 2 * (rows * ranks * hidden * 2 + 2 * MB)
        row = _align(_align(2 * hidden, 32) + 64, 512)
        return 2 * (experts * rows * ranks * row + 2 * rows * _align(2 * hidden, 512))


A2 = DispatchLimits(
    comm_alg="fullmesh",
    ranks=frozenset([*range(2, 9), 16, 32, 64, 128, 256]),
    hidden=range(32, 7168 + 1, 32),
    rows=256,
    scales_travel=True,
    least_ranks=16,
    most_experts=24,
)
A3 = DispatchLimits(
    comm_alg="",
    ranks=frozenset(range(2, 769)),
    hidden=range(1024, 8192 + 1),
    rows=512,
    scales_travel=False,
    least_ranks=2,
    most_experts=MAX_EXPERTS,
)
LIMITS = {"Atlas A2 (Ascend 910B)": A2, "Atlas A3 (Ascend 910C)": A3}
"""By the name of a chip's family (`Soc.family`)."""


@dataclass(frozen=True)
class MoeShape:
    """Sizes that the choice depends on.

    ranks: of the group. experts: of the layer, all ranks' together. hidden: channels. k: experts a token.
    """

    ranks: int
    experts: int
    hidden: int
    k: int


def may_dispatch(limits: DispatchLimits, ranks: int) -> bool:
    """True if a group of this size may need a communicator for dispatch and combine."""
    return ranks in limits.ranks and ranks >= limits.least_ranks


def dispatch_tokens(limits: DispatchLimits, shape: MoeShape, buffer: int) -> int:
    """The most tokens of a step that dispatch takes, 0 if it does not take the layer at all. buffer: MB.

    A rank dispatches k rows for each token of its slice: see `DividedExperts`.
    """
    owned = shape.experts // shape.ranks
    if not may_dispatch(limits, shape.ranks) or shape.experts > MAX_EXPERTS or owned > limits.most_experts:
        return 0
    if shape.hidden not in limits.hidden:
        return 0
    slices = range(1, min(limits.rows, MAX_RECEIVED // shape.ranks) // shape.k + 1)
    needed = [limits.buffer(shape.ranks, owned, shape.hidden, length * shape.k) for length in slices]
    return shape.ranks * sum(bytes_needed <= buffer * MB for bytes_needed in needed)


def exchange_of(tokens: int, ranks: int, most_dispatched: int) -> Exchange:
    """The exchange of a step with so many tokens. most_dispatched: of `dispatch_tokens`."""
    if tokens <= most_dispatched:
        return Exchange.DISPATCH
    return Exchange.SCATTER if tokens >= ranks else Exchange.SUM


def _align(value: int, step: int) -> int:
    return -(-value // step) * step
