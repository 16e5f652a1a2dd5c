"""What ranks on NPUs decide without one: their device, their exchange of expert rows, their slices of a step."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from npuq.errors import RankError
from npuq.runtime import backend, llm
from npuq.runtime.ops.ascend import operators
from npuq.runtime.ops.ascend.ranks import communicator
from npuq.runtime.ops.ascend.ranks.device import rank_device
from npuq.runtime.ops.ascend.ranks.rules import A2, A3, Exchange, MoeShape, dispatch_tokens, exchange_of
from npuq.runtime.ops.ascend.ranks.slices import Slices
from npuq.runtime.ops.ascend.support import SOCS
from npuq.runtime.ranks.group import ALONE
from npuq.runtime.ranks.world import World

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "tiny-deepseek-v3-fp8"

V3 = MoeShape(ranks=16, experts=256, hidden=7168, k=8)
KIMI_K2 = MoeShape(ranks=16, experts=384, hidden=7168, k=8)
V2_LITE = MoeShape(ranks=4, experts=64, hidden=2048, k=6)


class Ranks:
    """A group of which only the size is asked."""

    def __init__(self, size: int):
        self.rank, self.size = 0, size


def test_a_rank_runs_on_the_npu_of_its_place():
    assert rank_device(3, npus=8) == rank_device(3, 8, "npu") == rank_device(3, 8, "npu:3") == "npu:3"
    assert rank_device(3, npus=0) == "npu:3"  # the backend says why there is none


@pytest.mark.parametrize("asked", ["npu:0", "cpu", "npu:33", "npu:03"])
def test_a_device_of_another_rank_is_refused(asked):
    with pytest.raises(RankError, match=rf"rank 3 of this machine runs on npu:3, not on {asked}"):
        rank_device(3, 8, asked)


@pytest.mark.parametrize(("npus", "seen"), [(2, "2 NPUs: start at most 2"), (1, "1 NPU: start at most 1")])
def test_more_ranks_than_npus_are_refused(npus, seen):
    with pytest.raises(RankError, match=f"rank 2 of this machine needs npu:2, and this process sees {seen}"):
        rank_device(2, npus)


@pytest.mark.parametrize(("group", "device"), [(Ranks(4), "npu:3"), (ALONE, "npu:0")])
def test_operators_are_made_on_it(monkeypatch, group, device):
    made: list[Any] = []
    monkeypatch.setattr(operators, "AscendOps", lambda *args, **options: made.append(args[0]))
    monkeypatch.setattr(backend, "npu_count", lambda: 4)
    backend.make_ops("ascend", group=group, local_rank=3)
    assert made == [device]


def test_a_model_is_loaded_on_the_npu_of_its_rank(monkeypatch):
    """What `load` asks for: the group, and the place of this rank on its machine."""

    class MadeError(Exception):
        pass

    def make_ops(*asked: Any) -> None:
        raise MadeError(*asked)

    world = SimpleNamespace(
        group=Ranks(4),
        launch=SimpleNamespace(local_rank=3),
        begin_loading=lambda: None,
        ending_all=lambda *alike: nullcontext(),
    )
    monkeypatch.setattr(llm, "make_ops", make_ops)
    monkeypatch.setattr(World, "join", lambda launch: world)
    with pytest.raises(MadeError) as made:
        llm.load(EXAMPLE, "ascend", parallel="auto")
    assert made.value.args == ("ascend", None, None, "nz", world.group, 3)


def test_the_documentation_says_which_steps_of_v3_are_dispatched():
    steps = [dispatch_tokens(limits, V3, buffer) for limits, buffer in ((A2, 200), (A3, 200), (A3, 1024))]
    text = (ROOT / "docs" / "ascend.md").read_text(encoding="utf-8")
    assert "| {} tokens | {} tokens ({} with 1024 MB) |".format(*steps) in text


@pytest.mark.parametrize(
    ("limits", "shape", "buffer", "tokens"),
    [
        # By hand: on A3 a row of 7168 channels takes 2 · (16 · 16 · 14848 + 2 · 14336) = 7,659,520 bytes: 27 rows in
        # 200 MB, 140 in 1024 MB; 8 rows a token. V2-Lite: 2 · (16 · 4 · 4608 + 2 · 4096) = 606,208, so 345 rows.
        (A3, V3, 200, 16 * 3),
        (A3, V3, 1024, 16 * 17),
        (A3, V3, 8192, 16 * 64),  # 512 rows
        (A3, KIMI_K2, 200, 16 * 2),
        (A3, V2_LITE, 200, 4 * 57),
        (A3, replace(V3, ranks=32), 8192, 32 * 40),  # 10240 rows received
        (A3, replace(V3, hidden=512), 200, 0),
        (A3, replace(V3, hidden=8320), 200, 0),
        (A3, replace(V3, experts=2048), 200, 0),
        (A3, replace(V3, ranks=1), 200, 0),
        # On A2 4 · 16 · 7168 = 458,752 a row, and 4 MB: 219 rows in 100 MB.
        (A2, V3, 100, 16 * 27),
        (A2, V3, 200, 16 * 32),  # 256 rows
        (A2, KIMI_K2, 400, 16 * 32),
        (A2, replace(V3, ranks=8), 400, 0),  # in one server engines take HCCL's own collectives
        (A2, replace(V3, ranks=24), 400, 0),
        (A2, replace(V3, experts=512), 400, 0),
        (A2, replace(V3, hidden=7184), 400, 0),
        (A2, replace(V3, hidden=7680), 400, 0),
    ],
)
def test_steps_that_are_dispatched(limits, shape, buffer, tokens):
    assert dispatch_tokens(limits, shape, buffer) == tokens
    if tokens:
        assert exchange_of(tokens, shape.ranks, tokens) is Exchange.DISPATCH
    assert exchange_of(tokens + shape.ranks, shape.ranks, tokens) is Exchange.SCATTER


def test_fewer_tokens_than_ranks():
    assert exchange_of(15, 16, 0) is Exchange.SUM
    assert exchange_of(16, 16, 0) is Exchange.SCATTER
    assert exchange_of(15, 16, 48) is Exchange.DISPATCH


def test_the_greatest_step_fits_the_buffer_and_one_more_does_not():
    for limits, shape, buffer in ((A3, V3, 200), (A3, V2_LITE, 200), (A2, V3, 100)):
        length, owned = dispatch_tokens(limits, shape, buffer) // shape.ranks, shape.experts // shape.ranks
        fits, more = (
            limits.buffer(shape.ranks, owned, shape.hidden, rows * shape.k) / (1 << 20) for rows in (length, length + 1)
        )
        assert fits <= buffer < more


def test_every_family_that_the_backend_takes_has_limits():
    assert {soc.family for soc in SOCS if soc.int4_experts} == set(communicator.LIMITS)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 64])
def test_slices_are_all_tokens_once(tokens, ranks):
    slices = Slices(tokens, ranks)
    owned = [token for rank in range(ranks) for token in range(tokens)[slices.of(rank)]]
    assert owned == list(range(tokens))
    assert max(slices.counts) == slices.longest and max(slices.counts) - min(slices.counts) <= 1
    assert tokens < ranks or min(slices.counts) > 0


def test_a_communicator_is_opened_where_steps_may_dispatch(monkeypatch):
    opened = []
    monkeypatch.setattr(communicator, "hccl_name", lambda: opened.append("hccl_0") or opened[0])
    families = {soc.family: soc for soc in SOCS}
    a2, a3 = (next(name for name in families if word in name) for word in ("A2", "A3"))
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    assert communicator.communicator_of(a3, Ranks(2)) == communicator.Communicator("hccl_0", A3, 200)
    opened.clear()
    for family, size in ((a3, 1), (a2, 8), (a2, 24)):
        assert communicator.communicator_of(family, Ranks(size)) is None
    assert opened == []
    monkeypatch.setenv("HCCL_BUFFSIZE", "512")
    assert communicator.communicator_of(a2, Ranks(16)) == communicator.Communicator("hccl_0", A2, 512)


@pytest.mark.parametrize("text", ["", "0", "-1", "200MB", "²", "1e3", "2 0"])
def test_a_buffer_size_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("HCCL_BUFFSIZE", text)
    with pytest.raises(RankError, match=r"HCCL_BUFFSIZE .* is no number of MB"):
        communicator.hccl_buffer()
