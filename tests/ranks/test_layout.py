"""Layouts: which divide a model, and what each rank owns."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from published import RUN_ON_NPUS

from npuq.errors import BackendError
from npuq.models.config import ModelConfig
from npuq.models.family import Block
from npuq.models.gqa import Gqa
from npuq.models.tensors import ModelTensors
from npuq.runtime.ranks.layout import Layout, layouts, sums_inputs, tiles

MODELS = {name: ModelConfig.from_dict(config) for name, config in RUN_ON_NPUS.items()}


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("ep=8,tp=8", Layout(8, 8, 8)),
        ("tp=4, ep=8", Layout(8, 8, 4)),
        ("ep=8", Layout(8, 8, 1)),
        ("tp=2", Layout(8, 1, 2)),
    ],
)
def test_the_option_is_read(text: str, layout: Layout) -> None:
    assert Layout.parse(text, 8) == layout
    assert Layout.parse(str(layout), 8) == layout


@pytest.mark.parametrize(
    "text", ["", "ep", "ep=", "ep=8,ep=8", "pp=2", "tp=-1", "tp=٨", "ep=8;tp=8", "tp=99999", "tp=8,", "tp=8\nx"]
)
def test_anything_else_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(BackendError, match="write it like ep=8,tp=8") as error:
        Layout.parse(text, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((8, 4, 1), "take one of ep=1, 8"),
        ((8, 8, 3), "take one of tp=1, 2, 4, 8"),
        ((8, 8, 0), "take one of tp=1, 2, 4, 8"),
        ((8, 0, 1), "take one of ep=1, 8"),
        ((0, 1, 1), "0 ranks"),
        ((2000, 1, 1), "2000 ranks"),
    ],
)
def test_numbers_that_do_not_divide_are_refused_with_those_that_do(numbers: tuple[int, int, int], words: str) -> None:
    with pytest.raises(BackendError, match=words):
        Layout(*numbers)


@pytest.mark.parametrize(
    ("model", "layout", "words"),
    [
        ("GLM-4.7-Flash", Layout(8, 8, 8), r"20 attention heads are not divisible by 8; .* one of tp=1, 2, 4$"),
        ("DeepSeek-V2-Lite", Layout(32, 1, 32), r"16 attention heads are not divisible by 32; .* tp=1, 2, 4, 8, 16$"),
        ("Kimi-K2", Layout(7, 7, 7), r"384 routed experts are not divisible by 7 ranks; take ep=1, or one of 1, 2, 3"),
        ("GLM-4.5", Layout(12, 1, 12), r"8 key and value heads.* 12"),
        ("Kimi-K2", Layout(7, 1, 7), r"64 attention heads are not divisible by 7; with 7 ranks take tp=1$"),
    ],
)
def test_a_model_that_a_layout_does_not_divide(model: str, layout: Layout, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        layout.check(MODELS[model])


def side_by_side(parts: list[range]) -> range:
    """Return the range that parts make up; they must have step 1 and lie side by side, in order."""
    assert all(part.step == 1 and part for part in parts)
    assert all(part.stop == following.start for part, following in pairwise(parts))
    return range(parts[0].start, parts[-1].stop)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("model", MODELS)
def test_ranks_own_every_row_and_column_once(model: str, ranks: int) -> None:
    """For every linear: the parts of a group lie side by side and are the whole; other tensors are whole everywhere.
    Fewer key and value heads than ranks come several times."""
    config = MODELS[model]
    tensors = ModelTensors(config)
    found = list(layouts(config, ranks))
    assert bool(found) == (ranks != 3 or config.n_routed_experts == 384)
    for layout in found:
        owned = [layout.owned(config, rank) for rank in range(ranks)]
        experts = [expert for each in owned for expert in each.experts]
        assert experts == list(range(config.n_routed_experts)) * (1 if layout.ep > 1 else ranks)
        for block, entries in config.family.blocks.items():
            for entry in entries:
                shape = tensors.spec(block, entry.part, 0).shape
                if not all(shape):
                    continue
                for exact in (False, True):
                    parts = [owned[rank].ranges(block, entry, exact_sum=exact) for rank in layout.tp_group(0)]
                    divided = [axis for axis in range(len(shape)) if len(parts[0][axis]) < shape[axis]]
                    assert len(divided) <= (layout.tp > 1)
                    for axis, size in enumerate(shape):
                        every = 1
                        if axis in divided and entry.shape[axis] == "kv":
                            every = max(1, layout.tp // config.attention.kv_heads)
                            assert all(
                                part[axis] == parts[place // every * every][axis] for place, part in enumerate(parts)
                            )
                        owners = [part[axis] for part in parts[::every]]
                        if axis in divided:
                            assert side_by_side(owners) == range(size)
                        else:
                            assert owners == [range(size)] * layout.tp
                    if divided and sums_inputs(entry):
                        assert divided == [1 if exact else 0]


@pytest.mark.parametrize("model", MODELS)
def test_parts_of_a_model_that_belong_together(model: str) -> None:
    """The rows of q_b, kv_b and the columns of o are those of one rank's heads; gate's, up's and down's are alike."""
    config = MODELS[model]
    widths = config.attention
    for layout in layouts(config, 4):
        for rank in range(4):
            owned = layout.owned(config, rank)
            heads = owned.heads
            assert owned.dimension("q") == range(heads.start * widths.qk_head_dim, heads.stop * widths.qk_head_dim)
            if isinstance(widths, Gqa):
                first, last = heads.start // widths.group, -(-heads.stop // widths.group)
                assert owned.dimension("kv") == range(first * widths.head_dim, last * widths.head_dim)
            else:
                v_head = widths.sizes()["v_head"]
                assert owned.dimension("v") == range(heads.start * v_head, heads.stop * v_head)
            family = config.family
            for block in (Block.DENSE, Block.SHARED) if family.entries(Block.SHARED) else (Block.DENSE,):
                gate, up, down = (family.entry(block, part) for part in ("gate", "up", "down"))
                rows, across, inputs = (owned.ranges(block, entry, exact_sum=True) for entry in (gate, up, down))
                assert rows[0] == across[0] == inputs[1]
                assert rows[0].start % 32 == rows[0].stop % 32 == 0
            assert owned.vocabulary == owned.dimension("vocab")
            assert (owned.vocabulary.start % 2, len(owned.vocabulary) > 0) == (0, True)


def test_an_indexer_is_whole_on_every_rank() -> None:
    config = MODELS["DeepSeek-V3.2"]
    owned = Layout(8, 8, 8).owned(config, 3)
    for part, shape in (("index_q", (64 * 128, 1536)), ("index_k", (128, 7168)), ("index_weights", (64, 7168))):
        ranges = owned.ranges(Block.ATTENTION, config.family.entry(Block.ATTENTION, part), exact_sum=True)
        assert ranges == tuple(map(range, shape))


def test_groups_of_ranks() -> None:
    layout = Layout(8, 8, 4)
    assert [layout.tp_rank(rank) for rank in range(8)] == [0, 1, 2, 3] * 2
    assert layout.tp_group(6) == range(4, 8)
    config = MODELS["DeepSeek-V3"]
    assert layout.owned(config, 1).heads == layout.owned(config, 5).heads == range(32, 64)
    assert layout.owned(config, 5).experts == range(160, 192)


@pytest.mark.parametrize("size", [1, 7, 32, 96, 100, 1368, 10944, 129280])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_tiles_are_as_even_as_they_can_be(size: int, parts: int) -> None:
    lengths = [len(tiles(size, place, parts)) for place in range(parts)]
    unit = next(unit for unit in (32, 16, 8, 4, 2, 1) if size % unit == 0 and (size // unit >= parts or unit == 1))
    assert sum(lengths) == size and max(lengths) - min(lengths) in (0, unit)
    assert all(length % unit == 0 for length in lengths)


def test_a_layout_needs_a_tile_for_every_rank() -> None:
    config: dict[str, Any] = RUN_ON_NPUS["DeepSeek-V2-Lite"] | {"intermediate_size": 4}
    with pytest.raises(BackendError, match=r"intermediate 4 has fewer tiles of 1 than 8 ranks; .* one of tp=1, 2, 4"):
        Layout(8, 8, 8).check(ModelConfig.from_dict(config))


def test_a_rank_outside_the_layout_is_refused() -> None:
    with pytest.raises(BackendError, match="rank 8 is none of 8"):
        Layout(8, 8, 8).owned(MODELS["DeepSeek-V3"], 8)
