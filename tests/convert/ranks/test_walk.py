"""The calibrated walk over ranks: the bytes of one process, for every kind of model and method.

Ranks are threads here; `killing_ranks.py --calibrated` and test_launch.py have processes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from calibrated import CHAIN, STATIC, add_tokenizer, convert

from npuq.convert.calibrate.devices import Device, arithmetic_on
from npuq.convert.calibrate.layers.linears import JobResult
from npuq.convert.calibrate.ranks.pool import RankedPool
from npuq.convert.calibrate.ranks.values import decoded, encoded
from npuq.convert.ranks.team import Team
from npuq.errors import RankError
from npuq.inputs.launch import Launch
from npuq.parallel.pool import Inline, Pool
from npuq.progress import Silent
from npuq.quant.hessian import Factor, factor
from npuq.quant.weight_error import ErrorSums

sys.path.insert(0, str(Path(__file__).parents[2] / "ranks"))

from threads import Exchange, ThreadGroup


class World:
    """A launch whose ranks are threads."""

    def __init__(self, exchange: Exchange, rank: int):
        self.group = ThreadGroup(exchange, rank)
        self.launch = Launch(rank, self.group.size, rank, self.group.size, "x", 1)
        self.leads = rank == 0

    def agree(self, *what: object) -> None:
        self.group.barrier()

    def listen(self, hear: object) -> None:
        return

    def tell_leader(self, word: str) -> None:
        return

    def part_ways(self) -> None:
        self.group.barrier()


def over_ranks(size: int, source: Path, output: Path, texts: Path, **options: Any) -> list[Any]:
    exchange = Exchange(size)

    def rank(number: int) -> Any:
        team = Team(World(exchange, number), Silent())  # type: ignore[arg-type]
        try:
            return convert(source, output, texts, part=team, workers=1, **options)
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


@pytest.mark.parametrize(
    ("family", "method", "size"),
    [("v3", "auto", 3), ("v32", CHAIN, 2), ("v3", STATIC, 3), ("glm", "gptq", 4)],
)
def test_any_number_of_ranks_makes_the_same_bytes(
    family, method, size, make_checkpoint, texts, tmp_path, tree, monkeypatch
):
    monkeypatch.setattr("npuq.convert.calibrate.context.BATCH_TOKENS", 48)  # three batches of 128 tokens
    source = make_checkpoint(family=family)
    add_tokenizer(source)
    options: dict[str, Any] = {"method": method, "max_shard_size": 60_000}
    if method is STATIC:
        (tmp_path / "static.yaml").write_text(STATIC)
        options |= {"method": None, "recipe": tmp_path / "static.yaml"}
    convert(source, tmp_path / "one", texts, **options)
    statuses = [summary.status for summary in over_ranks(size, source, tmp_path / "several", texts, **options)]
    assert statuses == ["converted", *["share"] * (size - 1)]
    assert tree(tmp_path / "several") == tree(tmp_path / "one")


class Counting:
    """One thread as a pool, with the number of items that it got."""

    def __init__(self) -> None:
        self.inline = Inline(threading.Event())
        self.items = 0

    def begin(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        self.items += len(items)
        return self.inline.map(function, items)


def test_ranks_divide_the_factor_of_a_hessian():
    inputs = torch.randn(1400, 1300, generator=torch.Generator().manual_seed(0))
    hessian, arithmetic, inline = inputs.T @ inputs, arithmetic_on(Device.CPU), Inline(threading.Event())
    exchange, threads = Exchange(2), [Counting(), Counting()]

    def of_rank(rank: int) -> Factor:
        pool = RankedPool(cast(Pool, threads[rank]), ThreadGroup(exchange, rank))
        return factor(hessian, arithmetic, inline, divided=pool)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(of_rank, range(2)))
    expected = factor(hessian, arithmetic, inline)
    assert all(torch.equal(each.lower, expected.lower) for each in found)
    # Below the first panel of 256 columns are two pieces of 1024 rows, and one below each of the next four.
    assert [each.items for each in threads] == [5, 1]


def test_results_are_moved_unchanged():
    value = (
        {3: JobResult(ErrorSums(0.1, float("inf")), b"\x00\xff")},
        [torch.tensor([1.5, float("nan")]), torch.arange(3, dtype=torch.int16), torch.zeros(0, 4, dtype=torch.int8)],
        (None, True, "x", -7),
        torch.arange(3000, dtype=torch.int16).view(2, -1).T,
    )
    head, large = encoded(value)
    assert [tensor.nbytes for tensor in large] == [6000]
    found = decoded(head, lambda dtype, shape: large[0].view(dtype).view(shape))
    assert found[0] == value[0] and found[2] == value[2]
    for left, right in zip([*found[1], found[3]], [*value[1], value[3]], strict=True):
        assert left.dtype == right.dtype and torch.equal(left.nan_to_num(9), right.nan_to_num(9))
    with pytest.raises(RankError):
        decoded(torch.arange(40, dtype=torch.uint8), lambda dtype, shape: torch.empty(0))
    with pytest.raises(TypeError):
        encoded(object())
