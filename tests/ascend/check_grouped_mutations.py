"""Deliberately wrong calls in models with grouped-query attention: each must be refused, or show in the logits.

Limits of the three operators are broken one by one, and each must be refused in words of its own.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from ascend_rig import emulate, formats, harness
from ascend_rig.mutants import (
    Arguments,
    Change,
    Mutant,
    differences,
    mapped,
    outcome,
    renamed,
    running,
    setting,
    swapped,
    without,
)
from torch import Tensor

LENGTHS = (5, 7, 45)
FIA, SCATTER, ROTARY = "npu_fused_infer_attention_score_v2", "npu_scatter_pa_kv_cache", "npu_apply_rotary_pos_emb"
QUERIES, KEYS = "actual_seq_qlen", "actual_seq_kvlen"


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack((tensor, tensor), -1)[..., 0]


def in_nz(tensor: Tensor) -> Tensor:
    rows = tensor.flatten(0, -2)
    filled = torch.cat((rows, rows.new_zeros(-len(rows) % formats.TILE_ROWS, rows.shape[1])))
    return formats.to_nz(filled)[: len(rows)].view(tensor.shape)


def both(*changes: Change) -> Change:
    def change(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
        for each in changes:
            args, kwargs = each(args, kwargs)
        return args, kwargs

    return change


def on_pages(change: Change) -> Change:
    """Of calls on pages alone."""
    return lambda args, kwargs: change(args, kwargs) if "block_table" in kwargs else (args, kwargs)


def on_own_keys(change: Change) -> Change:
    """Of calls on a first chunk's own keys alone."""
    return lambda args, kwargs: (args, kwargs) if "block_table" in kwargs else change(args, kwargs)


def narrow(rows: Tensor) -> Tensor:
    return rows[..., :64].contiguous()


# What is changed, and how the refusal reads.
REFUSED: dict[str, tuple[str, Change, str]] = {
    "queries strided": (FIA, mapped(0, strided), "query: strided"),
    "queries in NZ": (FIA, mapped(0, in_nz), "query is in FRACTAL_NZ"),
    "queries in float64": (FIA, mapped(0, Tensor.double), "query is torch.float64"),
    "keys in another dtype": (FIA, mapped(1, Tensor.half), "beside torch.float32"),
    "values of fewer keys": (FIA, on_own_keys(mapped(2, lambda value: value[:-1])), r"key \(.*value \("),
    "heads of 64": (FIA, on_own_keys(both(*(mapped(place, narrow) for place in range(3)))), "D 64 in TND"),
    "heads left out": (FIA, without("num_query_heads"), "1 query heads for query"),
    "key heads left out": (FIA, without("num_key_value_heads"), "of 4 heads"),
    "three key heads": (FIA, setting(num_key_value_heads=3), "4 heads on 3"),
    "layout left out": (FIA, without("input_layout"), "dim|layout"),
    "lengths of queries left out": (FIA, without(QUERIES), "needs both lengths"),
    "lengths of queries of each": (FIA, mapped(QUERIES, differences), "not cumulative|differ"),
    "lengths of keys left out": (FIA, without(KEYS), "needs both lengths"),
    "lengths of paged keys added up": (
        FIA,
        on_pages(mapped(KEYS, lambda lens: running([*lens, 200])[1:])),
        "overrun|key",
    ),
    "lengths of own keys of each": (FIA, on_own_keys(mapped(KEYS, lambda lens: [each - 1 for each in lens])), "keys"),
    "key lengths by the first version's name": (FIA, renamed(KEYS, "actual_seq_lengths_kv"), "match any schema"),
    "block table left out": (FIA, on_pages(without("block_table")), "of 2 heads"),
    "block table in int64": (FIA, on_pages(mapped("block_table", Tensor.long)), "block_table is torch.int64"),
    "block table past the cache": (FIA, on_pages(mapped("block_table", lambda table: table + 64)), "block_table holds"),
    "block table of a sequence more": (
        FIA,
        on_pages(mapped("block_table", lambda table: torch.cat((table, table[:1])))),
        "key lengths for",
    ),
    "block size left out": (FIA, on_pages(without("block_size")), "block_size 0"),
    "block size of twice the pages": (FIA, on_pages(setting(block_size=32)), "pages"),
    "mask without its mode": (FIA, on_own_keys(setting(sparse_mode=0)), "a full mask"),
    "mode without its mask": (FIA, on_own_keys(setting(atten_mask=None)), "needs the compressed mask"),
    "mask the wrong way": (FIA, on_own_keys(mapped("atten_mask", lambda mask: ~mask)), "1 above the diagonal"),
    "keys written strided": (SCATTER, mapped(0, strided), "key: strided"),
    "keys written in NZ mode": (SCATTER, without("cache_mode"), "PA_NZ"),
    "keys written in another dtype": (SCATTER, mapped(0, Tensor.half), "float"),
    "pages without heads": (SCATTER, mapped(2, lambda cache: cache.flatten(2)), "a cache"),
    "pages of one head": (SCATTER, mapped(2, lambda cache: cache.flatten(2).unsqueeze(2)), "a cache"),
    "slots on the host": (SCATTER, mapped(4, Tensor.tolist), "list"),
    "slots in int16": (SCATTER, mapped(4, Tensor.short), "slots are torch.int16"),
    "slots that are no slots": (SCATTER, mapped(4, lambda slots: slots - 1000), "slots"),
    "slots of fewer tokens": (SCATTER, mapped(4, lambda slots: slots[1:]), "slots"),
    "one slot for all": (SCATTER, mapped(4, lambda slots: slots * 0), "not distinct"),
    "rotation strided": (ROTARY, mapped(0, strided), "query: strided"),
    "rotation of half a head": (ROTARY, mapped(1, narrow), "key .* beside query"),
    "rotation without a layout": (ROTARY, without("layout"), "BSND"),
    "rotation of pairs side by side": (ROTARY, setting(rotary_mode="interleave"), "halves only"),
    "tables without heads": (ROTARY, mapped(2, lambda cos: cos.squeeze(1)), "cos or sin"),
    "tables of half a head": (ROTARY, mapped(3, narrow), "cos or sin"),
    "tables in another dtype": (ROTARY, mapped(2, Tensor.half), "torch.float16"),
}
# What the device would compute without a word, but wrongly.
SHOWN: dict[str, tuple[str, Change]] = {
    "another scale": (FIA, setting(softmax_scale=1.0)),
    "scale left out": (FIA, without("softmax_scale")),
    "values for keys": (FIA, swapped(1, 2)),
    "no mask for chunks": (FIA, setting(atten_mask=None, sparse_mode=0)),
    "pages in another order": (FIA, on_pages(mapped("block_table", lambda table: table.flip(1)))),
    "a key less": (FIA, on_pages(mapped(KEYS, lambda lens: [length - 1 for length in lens]))),
    "values written for keys": (SCATTER, swapped(0, 1)),
    "slots one further": (SCATTER, mapped(4, lambda slots: slots + 1)),
    "sine for cosine": (ROTARY, swapped(2, 3)),
    "no rotation": (ROTARY, both(mapped(2, torch.ones_like), mapped(3, torch.zeros_like))),
}


def run(artifact: Any, operator: str, change: Change) -> str:
    mutant = Mutant(operator, change)

    def install(ops: Any) -> None:
        ops.npu.operators = mutant

    with emulate.use_rules(wide=True):
        found = outcome(artifact("qwen3-float"), install, LENGTHS)
    assert mutant.changed, f"{operator} is not called"
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_documentation_refuses(artifact: Any, name: str) -> None:
    operator, change, words = REFUSED[name]
    found = run(artifact, operator, change)
    assert found.startswith("refused: ") and re.search(words, found), found


@pytest.mark.parametrize("name", SHOWN)
def test_what_shows_in_the_logits(artifact: Any, name: str) -> None:
    operator, change = SHOWN[name]
    assert run(artifact, operator, change).startswith(("shows", "refused")), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 64}, "head_dim 64 .must be 128"),
        ({"heads": 258, "kv_heads": 3}, "258 attention heads .at most 256.*258 heads on 3"),
        ({"heads": 130, "kv_heads": 2}, "130 heads on 2"),
        ({"heads": 512, "kv_heads": 512}, "65536 channels of keys"),
    ],
)
def test_sizes_that_no_operator_takes_are_refused_at_load(changes: dict[str, int], words: str) -> None:
    from npuq.errors import BackendError
    from npuq.runtime.ops.ascend.attention.limits import check_gqa

    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 128, **changes}
    with pytest.raises(BackendError, match=words):
        check_gqa("q_proj", **sizes)


def test_a_rotation_that_is_left_out_shows(artifact: Any) -> None:
    """Of the half of the channels that GLM-4.5 rotates."""

    def install(ops: Any) -> None:
        rotate = ops.gqa.rotate
        ops.gqa.rotate = lambda q, k, config, positions: rotate(
            q, k, config, replace(positions, sin=torch.zeros_like(positions.sin), cos=torch.ones_like(positions.cos))
        )

    with emulate.use_rules(wide=True):
        assert outcome(artifact("glm4-float"), install, LENGTHS).startswith("shows")


def test_attention_is_the_formula() -> None:
    """The emulation against numpy's float64, on pages and on a sequence's own keys."""
    torch.manual_seed(0)
    query, (keys, values) = torch.randn(5, 4, 128), torch.randn(2, 40, 2, 128)
    with emulate.use_rules(wide=True):
        mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        sizes = {"num_query_heads": 4, "num_key_value_heads": 2, "softmax_scale": 0.2, "input_layout": "TND"}
        masked = {"atten_mask": mask, "sparse_mode": 3, "actual_seq_qlen": [5]}
        own = torch.ops.npu.npu_fused_infer_attention_score_v2(
            query, keys, values, actual_seq_kvlen=[40], **sizes, **masked
        )[0]
        pages = [torch.full((4, 16, 2, 128), torch.nan) for _ in range(2)]
        slots = torch.tensor([3, 0, 2]).repeat_interleave(16)[:40] * 16 + torch.arange(40) % 16
        torch.ops.npu.npu_scatter_pa_kv_cache(keys, values, *pages, slots, cache_mode="Norm")
        table = torch.tensor([[3, 0, 2]], dtype=torch.int32)
        paged = torch.ops.npu.npu_fused_infer_attention_score_v2(
            query,
            *(each.view(4, 16, 256) for each in pages),
            actual_seq_kvlen=[40],
            block_table=table,
            block_size=16,
            **sizes,
            **masked,
        )[0]
    for token in range(5):
        for head in range(4):
            seen = 36 + token
            scores = keys[:seen, head // 2].double() @ query[token, head].double() * 0.2
            expected = scores.softmax(0) @ values[:seen, head // 2].double()
            torch.testing.assert_close(own[token, head].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(own, paged)
    assert harness.BLOCK == 16
