"""Layouts: how the ranks of a process group divide a model, and what each of them owns.

Two things are divided, each or neither:

* routed experts, over all ranks (`ep`): a rank owns whole experts;
* everything that has heads, columns or vocabulary rows, over groups of `tp` neighbouring ranks. Query and value heads
  follow `q_b`, `kv_b` and `o`; the columns of dense and shared MLPs follow `gate`, `up` and `down`; the rows of the
  vocabulary follow embedding and head. In grouped-query attention `q` and `o` have query heads, `k` and `v` the heads
  that those read; of more ranks than such heads neighbours have the same one.

All other weights are on every rank: norms, routers, the latents' projections, and a lightning indexer, whose scores are
float sums over its heads. What a rank owns is contiguous. A dimension is found by its word in the family's table
(`models/family.py`), so that a new family needs no line here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Final

from ...errors import BackendError
from ...inputs.launch import MAX_RANKS
from ...inputs.printable import shown
from ...models.config import ModelConfig
from ...models.family import Block, Entry
from ...models.gqa import Gqa
from ...models.tensors import sizes

TILE: Final = 32
"""Columns and vocabulary rows are divided in whole tiles of this many: FRACTAL_NZ keeps 32 bytes of a row together, and
int4 two rows. A size that tiles do not fill, or too few, is divided in the largest halves of tiles that do."""

_HEADS: Final = frozenset({"q", "kv_b", "v"})
_KV_HEADS: Final = "kv"
_COLUMNS: Final = frozenset({"intermediate", "shared_intermediate"})
_VOCABULARY: Final = "vocab"
_FORM: Final = re.compile(r"(ep|tp)=([0-9]{1,4})")


@dataclass(frozen=True)
class Layout:
    """A division of a model over `ranks` ranks.

    ep: ranks that divide the routed experts, all or 1. tp: ranks of a group that divides heads, columns and vocabulary;
    a divisor of `ranks`. Groups of several are copies of each other. Raises BackendError for other numbers.
    """

    ranks: int = 1
    ep: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= MAX_RANKS:
            raise BackendError(f"{self.ranks} ranks: npuq runs on 1 to {MAX_RANKS}")
        if self.ep not in (1, self.ranks):
            raise BackendError(
                f"ep={self.ep} of {self.ranks} ranks: experts are divided over all ranks or not at all; take "
                f"{_one_of('ep', sorted({1, self.ranks}))}"
            )
        if self.tp < 1 or self.ranks % self.tp:
            raise BackendError(
                f"tp={self.tp} does not divide {self.ranks} ranks; take {_one_of('tp', _divisors(self.ranks))}"
            )

    @classmethod
    def parse(cls, text: str, ranks: int) -> Layout:
        """Read `ep=8,tp=8`, as `--parallel` takes it; what is left out is 1. Raises BackendError for anything else."""
        values: dict[str, int] = {}
        for word in text.split(","):
            found = _FORM.fullmatch(word.strip())
            if found is None or found[1] in values:
                raise BackendError(f"--parallel {shown(text)} is no layout; write it like ep={ranks},tp={ranks}")
            values[found[1]] = int(found[2])
        return cls(ranks, **values)

    def __str__(self) -> str:
        return f"ep={self.ep},tp={self.tp}"

    def tp_rank(self, rank: int) -> int:
        """The place of a rank in its tensor-parallel group."""
        return rank % self.tp

    def tp_group(self, rank: int) -> range:
        """The ranks of a rank's tensor-parallel group, itself among them."""
        first = rank - self.tp_rank(rank)
        return range(first, first + self.tp)

    def check(self, config: ModelConfig) -> None:
        """Raise BackendError, naming the numbers that do, where the layout does not divide a model."""
        if self.ep > 1 and config.moe is None:
            raise BackendError(f"ep={self.ep}: {config.model_type} has no routed experts to divide; take ep=1")
        if self.ep > 1 and config.n_routed_experts % self.ep:
            raise BackendError(
                f"ep={self.ep}: {config.n_routed_experts} routed experts are not divisible by {self.ep} ranks; take "
                f"ep=1, or one of {_listed(_divisors(config.n_routed_experts))} ranks"
            )
        reason = _tp_problem(config, self.tp)
        if reason is not None:
            fitting = [tp for tp in _divisors(self.ranks) if _tp_problem(config, tp) is None]
            raise BackendError(f"tp={self.tp}: {reason}; with {self.ranks} ranks take {_one_of('tp', fitting)}")

    def owned(self, config: ModelConfig, rank: int) -> Owned:
        """A rank's part of a model. Raises BackendError as `check` does, and for a rank outside the layout."""
        self.check(config)
        if not 0 <= rank < self.ranks:
            raise BackendError(f"rank {rank} is none of {self.ranks}")
        place, heads = self.tp_rank(rank), config.attention.heads
        experts = even(config.n_routed_experts, rank if self.ep > 1 else 0, self.ep)
        return Owned(self, config, rank, experts, even(heads, place, self.tp))


@dataclass(frozen=True)
class Owned:
    """The part of a model that one rank owns.

    experts: routed experts of every layer that has them. heads: attention heads.
    """

    layout: Layout
    config: ModelConfig
    rank: int
    experts: range
    heads: range

    @property
    def vocabulary(self) -> range:
        """Rows of embedding and head: the token ids whose embedding and logits are computed here."""
        return self.tiles(self.config.vocab_size)

    def tiles(self, size: int) -> range:
        """A group's division of `size` channels in whole tiles: the part of this rank."""
        return tiles(size, self.layout.tp_rank(self.rank), self.layout.tp)

    def dimension(self, word: str) -> range:
        """The part of a dimension of the family's table (`Entry.shape`); all of one that is not divided."""
        size = sizes(self.config)[word]
        if word in _HEADS:
            width = size // self.config.attention.heads
            return range(self.heads.start * width, self.heads.stop * width)
        if word == _KV_HEADS:
            return self._kv_channels()
        return self.tiles(size) if word in _COLUMNS or word == _VOCABULARY else range(size)

    def _kv_channels(self) -> range:
        """The channels of the key and value heads that this rank's query heads read. Of more ranks than such heads
        neighbours read the same one."""
        widths = self.config.attention
        assert isinstance(widths, Gqa)
        first, last = self.heads.start // widths.group, (self.heads.stop - 1) // widths.group
        return range(first * widths.head_dim, (last + 1) * widths.head_dim)

    def ranges(
        self, block: Block, entry: Entry, *, exact_sum: bool, shape: tuple[int, ...] | None = None
    ) -> tuple[range, ...]:
        """The part of a tensor, a range of each dimension; of an expert's tensor, all of it.

        shape: of the whole tensor; needed where a word of it is a layer's own number, which is never divided.
        exact_sum: partial products over a divided input can be added exactly: those of int8 codes can, float ones
        cannot. Where they cannot, the outputs are divided instead, and ranks exchange inputs and outputs.
        """
        if block is not Block.EXPERT and entry.kind == "linear" and sums_inputs(entry) and not exact_sum:
            outputs, inputs = (sizes(self.config)[word] for word in entry.shape)
            return self.tiles(outputs), range(inputs)
        found = sizes(self.config)
        return tuple(
            range(shape[axis]) if shape is not None and word not in found else self.dimension(word)
            for axis, word in enumerate(entry.shape)
        )


def sums_inputs(entry: Entry) -> bool:
    """True for a linear whose inputs are divided among ranks, so that its product is a sum over them: o and down."""
    return entry.kind == "linear" and (entry.shape[1] in _HEADS or entry.shape[1] in _COLUMNS)


def layouts(config: ModelConfig, ranks: int) -> Iterator[Layout]:
    """Every layout of that many ranks that divides a model and uses the ranks; of one rank, the undivided one."""
    for ep in sorted({1, ranks}, reverse=True):
        for tp in _divisors(ranks):
            layout = Layout(ranks, ep, tp)
            if max(ep, tp) == ranks and fits(layout, config):
                yield layout


def fits(layout: Layout, config: ModelConfig) -> bool:
    """True where a layout divides a model."""
    try:
        layout.check(config)
    except BackendError:
        return False
    return True


def even(count: int, place: int, parts: int) -> range:
    """Part `place` of `parts` equal parts of `count` things; `parts` divides it."""
    each = count // parts
    return range(place * each, (place + 1) * each)


def tiles(size: int, place: int, parts: int) -> range:
    """Part `place` of `size` channels, divided as evenly as whole tiles allow: the first parts may be a tile longer."""
    unit = _unit(size, parts)
    each, more = divmod(size // unit, parts)
    start = place * each + min(place, more)
    return range(start * unit, (start + each + (place < more)) * unit)


def _unit(size: int, parts: int) -> int:
    """The channels that are not divided further."""
    unit = gcd(size, TILE)
    while size // unit < parts and unit % 2 == 0:
        unit //= 2
    return unit


def _tp_problem(config: ModelConfig, tp: int) -> str | None:
    """The reason why groups of `tp` ranks cannot divide a model; None where they can."""
    heads = config.attention.heads
    if heads % tp:
        return f"{heads} attention heads are not divisible by {tp}"
    if isinstance(config.attention, Gqa) and config.attention.kv_heads % tp and tp % config.attention.kv_heads:
        return f"{config.attention.kv_heads} key and value heads neither divide {tp} nor are divisible by it"
    found = sizes(config)
    for word in sorted({*_COLUMNS, _VOCABULARY} & found.keys()):
        unit = _unit(found[word], tp)
        if found[word] and found[word] // unit < tp:
            return f"{word} {found[word]} has fewer tiles of {unit} than {tp} ranks"
    return None


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, MAX_RANKS) + 1) if number % divisor == 0]


def _one_of(name: str, numbers: list[int]) -> str:
    return f"{name}={numbers[0]}" if len(numbers) == 1 else f"one of {name}={_listed(numbers)}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
