"""The calibrated walk over ranks: the bytes of one process, for every kind of model and method.

Ranks are threads here; `killing_ranks.py --calibrated` and test_launch.py have processes.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import CHAIN, STATIC, add_tokenizer, convert

from npuq.convert.calibrate.layers.linears import JobResult
from npuq.convert.calibrate.ranks.values import decoded, encoded
from npuq.convert.ranks.team import Team
from npuq.errors import RankError
from npuq.inputs.launch import Launch
from npuq.progress import Silent
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
    [("v3", CHAIN, 2), ("v3", "auto", 3), ("v32", "smooth+gptq", 2), ("v3", STATIC, 3), ("glm", "gptq", 4)],
)
def test_any_number_of_ranks_makes_the_same_bytes(family, method, size, make_checkpoint, texts, tmp_path, tree):
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


def test_results_are_moved_unchanged():
    value = (
        {3: JobResult(ErrorSums(0.1, float("inf")), b"\x00\xff")},
        [torch.tensor([1.5, float("nan")]), torch.arange(3, dtype=torch.int16), torch.zeros(0, 4, dtype=torch.int8)],
        (None, True, "x", -7),
    )
    found = decoded(encoded(value))
    assert found[0] == value[0] and found[2] == value[2]
    for left, right in zip(found[1], value[1], strict=True):
        assert left.dtype == right.dtype and torch.equal(left.nan_to_num(9), right.nan_to_num(9))
    with pytest.raises(RankError):
        decoded(torch.arange(40, dtype=torch.uint8))
    with pytest.raises(TypeError):
        encoded(object())
