"""Deliberately wrong calls in models with sparse attention: each must be refused, or show in the logits.

Limits of the two operators are broken one by one, and each must be refused in words of its own.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from ascend_rig import emulate, formats, harness
from ascend_rig.mutants import Arguments, Change, Mutant, mapped, outcome, setting, swapped, without
from torch import Tensor

from npuq.runtime.attention.sparse_mla import SparseMlaAttention
from npuq.runtime.ops.ascend.attention import sparse as sparse_module

# Two prompts that reach the limit of 8 while they decode; then one of two chunks.
LENGTHS = (5, 7, 45)
LI, SFA, PROLOG = "npu_lightning_indexer", "npu_sparse_flash_attention", "npu_mla_prolog_v3"
ROTARY, ROPE = "npu_rotary_mul", "npu_interleave_rope"
Q_LENS, LI_LENS, SFA_LENS = "actual_seq_lengths_query", "actual_seq_lengths_key", "actual_seq_lengths_kv"


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack((tensor, tensor), -1)[..., 0]


def in_nz(tensor: Tensor) -> Tensor:
    rows = tensor.flatten(0, -2)
    filled = torch.cat((rows, rows.new_zeros(-len(rows) % formats.TILE_ROWS, rows.shape[1])))
    return formats.to_nz(filled)[: len(rows)].view(tensor.shape)


def pages_of(size: int) -> Any:
    """Pages of another size: the rows that there are, and zeros behind them."""

    def change(pages: Tensor) -> Tensor:
        rows = pages.flatten(0, 2)
        padded = torch.cat((rows, rows.new_zeros(-len(rows) % size, rows.shape[1])))
        return padded.view(-1, size, 1, rows.shape[1])

    return change


def both(*changes: Change) -> Change:
    def change(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
        for each in changes:
            args, kwargs = each(args, kwargs)
        return args, kwargs

    return change


def latent_pages(function: Any) -> Change:
    """Key and value of attention changed alike: they stay one tensor."""

    def change(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
        args[1] = args[2] = function(args[1])
        return args, kwargs

    return change


def per_sequence(ends: Tensor) -> Tensor:
    return ends.diff(prepend=ends.new_zeros(1))


# What is changed, and how the refusal reads.
REFUSED: dict[str, tuple[str, Change, str]] = {
    "index heads of 64 channels": (LI, mapped(0, lambda query: query[..., :64].contiguous()), "D is 128"),
    "80 index heads": (
        LI,
        both(mapped(0, lambda query: query.repeat(1, 5, 1)), mapped(2, lambda weights: weights.repeat(1, 5))),
        "80 heads, more than 64",
    ),
    "no index heads": (
        LI,
        both(mapped(0, lambda query: query[:, :0]), mapped(2, lambda weights: weights[:, :0])),
        "should not be empty",
    ),
    "index queries in float64": (LI, mapped(0, Tensor.double), "query is torch.float64"),
    "index queries strided": (LI, mapped(0, strided), "query: strided"),
    "index queries of batches": (LI, mapped(0, lambda query: query.unsqueeze(0)), r"query \(1,"),
    "index queries in NZ": (LI, mapped(0, in_nz), "query is in FRACTAL_NZ"),
    "index keys strided": (LI, mapped(1, strided), "key: strided"),
    "index keys in NZ": (LI, mapped(1, in_nz), "key is in FRACTAL_NZ"),
    "index keys in NZ pages": (LI, mapped(1, lambda key: key.view(-1, 8, 16, 16)), r"key .*: \[blocks"),
    "index keys in another dtype": (LI, mapped(1, Tensor.half), "key is torch.float16"),
    "index keys of two heads": (LI, mapped(1, lambda key: key.view(-1, 8, 2, 128)), r"key .*: \[blocks"),
    "index pages of 8 tokens": (LI, mapped(1, pages_of(8)), "pages of 8"),
    "index pages of 24 tokens": (LI, mapped(1, pages_of(24)), "pages of 24"),
    "index pages of 1040 tokens": (LI, mapped(1, pages_of(1040)), "pages of 1040"),
    "weights of half the heads": (LI, mapped(2, lambda weights: weights[:, :8].contiguous()), "weights .*for query"),
    "weights in float64": (LI, mapped(2, Tensor.double), "weights are torch.float64"),
    "weights strided": (LI, mapped(2, strided), "weights: strided"),
    "index lengths of queries left out": (LI, without(Q_LENS), "needs the lengths of queries"),
    "index lengths of queries per sequence": (LI, mapped(Q_LENS, per_sequence), "query lengths"),
    "index lengths of queries in int64": (LI, mapped(Q_LENS, Tensor.long), "query lengths are torch.int64"),
    "index lengths of queries on the host": (LI, mapped(Q_LENS, Tensor.tolist), "found type 'list'"),
    "index lengths of queries strided": (LI, mapped(Q_LENS, strided), "query_lengths: strided"),
    "index lengths of queries as a column": (LI, mapped(Q_LENS, lambda ends: ends[:, None]), r"query lengths \("),
    "index lengths of keys left out": (LI, without(LI_LENS), "needs the lengths of keys"),
    "index lengths of keys in int64": (LI, mapped(LI_LENS, Tensor.long), "key lengths are torch.int64"),
    "index lengths of keys past the table": (LI, mapped(LI_LENS, lambda lens: lens + 64), "overrun the block table"),
    "index lengths of keys below those of queries": (LI, mapped(LI_LENS, lambda lens: lens * 0), "sequence of 0 keys"),
    "index block table left out": (LI, without("block_table"), "block table"),
    "index block table in int64": (LI, mapped("block_table", Tensor.long), "block_table are torch.int64"),
    "index block table flat": (LI, mapped("block_table", Tensor.flatten), "block_table "),
    "index block table of a sequence more": (
        LI,
        mapped("block_table", lambda table: torch.cat((table, table[:1]))),
        r"\d+, \d+, \d+ rows",
    ),
    "index block table past the cache": (LI, mapped("block_table", lambda table: table + 64), "block_table holds"),
    "layout of index queries left out": (LI, without("layout_query"), "layout|BSND"),
    "layout of index keys left out": (LI, without("layout_key"), "TND, BSND is not emulated"),
    "no tokens to select": (LI, setting(sparse_count=0), "greater than 0"),
    "2049 tokens to select": (LI, setting(sparse_count=2049), "sparse_count 2049"),
    "9216 tokens to select": (LI, setting(sparse_count=9216), "sparse_count 9216"),
    "index scores without a mask": (LI, setting(sparse_mode=0), "sparse_mode 0"),
    "index scores in a window": (LI, setting(pre_tokens=4), "pre_tokens=4"),
    "index scores asked for": (LI, setting(return_value=True), "return_value=True"),
    "three heads": (
        SFA,
        both(
            mapped(0, lambda query: query[:, :3].contiguous()),
            mapped("query_rope", lambda rope: rope[:, :3].contiguous()),
        ),
        "3 query heads",
    ),
    "256 heads": (
        SFA,
        both(mapped(0, lambda query: query.repeat(1, 64, 1)), mapped("query_rope", lambda rope: rope.repeat(1, 64, 1))),
        "256 query heads",
    ),
    "latent queries of 256 channels": (SFA, mapped(0, lambda query: query[..., :256].contiguous()), "D is 512"),
    "latent queries strided": (SFA, mapped(0, strided), "query: strided"),
    "latent queries in float64": (SFA, mapped(0, Tensor.double), "query is torch.float64"),
    "latent queries in NZ": (SFA, mapped(0, in_nz), "query is in FRACTAL_NZ"),
    "latents strided": (SFA, latent_pages(strided), "key: strided"),
    "latents in NZ": (SFA, latent_pages(in_nz), "key is in FRACTAL_NZ"),
    "latents in NZ pages": (SFA, latent_pages(lambda key: key.view(-1, 32, 16, 16)), r"key .*: \[blocks"),
    "latents in another dtype": (SFA, latent_pages(Tensor.half), "key is torch.float16"),
    "latent pages of 8 tokens": (SFA, latent_pages(pages_of(8)), "pages of 8"),
    "latent pages of 1040 tokens": (SFA, latent_pages(pages_of(1040)), "pages of 1040"),
    "value of its own": (SFA, mapped(2, Tensor.clone), "key and value are the latent cache"),
    "no rope of queries": (SFA, without("query_rope"), "come together"),
    "no rope of keys": (SFA, without("key_rope"), "come together"),
    "rope of 32 channels": (SFA, mapped("query_rope", lambda rope: rope[..., :32].contiguous()), "query_rope"),
    "rope in another dtype": (SFA, mapped("query_rope", Tensor.half), "query_rope torch.float16"),
    "rope of queries strided": (SFA, mapped("query_rope", strided), "query_rope: strided"),
    "rope of keys strided": (SFA, mapped("key_rope", strided), "key_rope: strided"),
    "rope of keys in NZ": (SFA, mapped("key_rope", in_nz), "key_rope is in FRACTAL_NZ"),
    "rope of keys in other pages": (SFA, mapped("key_rope", pages_of(32)), "differ in pages"),
    "indices in int64": (SFA, mapped(3, Tensor.long), "sparse_indices are torch.int64"),
    "indices without heads": (SFA, mapped(3, lambda found: found.squeeze(1)), "sparse_indices"),
    "indices of a token less": (SFA, mapped(3, lambda found: found[1:]), "sparse_indices|should not be empty"),
    "indices strided": (SFA, mapped(3, strided), "sparse_indices: strided"),
    "invalid indices first": (SFA, mapped(3, lambda found: found.flip(-1)), "must come before"),
    "indices past the sequence": (SFA, mapped(3, lambda found: found + 64), "past the"),
    "lengths of queries left out": (SFA, without(Q_LENS), "needs the lengths of queries"),
    "lengths of queries per sequence": (SFA, mapped(Q_LENS, per_sequence), "query lengths"),
    "lengths of queries in int64": (SFA, mapped(Q_LENS, Tensor.long), "query lengths are torch.int64"),
    "lengths of keys left out": (SFA, without(SFA_LENS), "needs the lengths of keys"),
    "lengths of keys in int64": (SFA, mapped(SFA_LENS, Tensor.long), "key lengths are torch.int64"),
    "block table in int64": (SFA, mapped("block_table", Tensor.long), "block_table are torch.int64"),
    "block table left out": (SFA, without("block_table"), "block table"),
    "layout of queries left out": (SFA, without("layout_query"), "layout|BSND"),
    "layout of keys left out": (SFA, without("layout_kv"), "TND, BSND is not emulated"),
    "attention_mode left out": (SFA, without("attention_mode"), "attention_mode 0"),
    "blocks of 16 tokens": (SFA, setting(sparse_block_size=16), "sparse_block_size 16"),
    "attention without a mask": (SFA, setting(sparse_mode=0), "sparse_mode 0"),
    "log-sum-exp asked for": (SFA, setting(return_softmax_lse=True), "return_softmax_lse=True"),
    "sinks": (SFA, setting(sinks=torch.zeros(4)), "sinks="),
    "rotation of three dimensions": (ROTARY, mapped(0, lambda x: x.squeeze(0)), "four dimensions"),
    "rotation of 1000 heads": (
        ROTARY,
        mapped(0, lambda x: x[:, :, :1].expand(-1, -1, 1000, -1).contiguous()),
        "1000 heads",
    ),
    "rotation of 896 channels": (ROTARY, mapped(0, lambda x: x.repeat(1, 1, 1, 14)), "D 896"),
    "rotation with tables of heads": (ROTARY, mapped(1, lambda cos: cos.transpose(1, 2)), "r1 "),
    "rotation with tables in another dtype": (ROTARY, mapped(1, Tensor.half), "float16 tables"),
    "rotation by another name": (ROTARY, setting(rotary_mode="quarter"), "rotary_mode 'quarter'"),
}
# Calls that are legal, and wrong.
SHOWS: dict[str, tuple[str, Change]] = {
    "keys of another sequence": (LI, mapped("block_table", lambda table: (table + 1) % 3)),
    "a key more": (LI, mapped(LI_LENS, lambda lens: lens + 1)),
    "half as many tokens selected": (LI, setting(sparse_count=4)),
    "all tokens selected": (LI, without("sparse_count")),
    "heads weighted alike": (LI, mapped(2, torch.ones_like)),
    "heads weighted in another order": (LI, mapped(2, lambda weights: weights.flip(-1))),
    "selection of the token before": (SFA, mapped(3, lambda found: found.roll(1, 0))),
    "the first token in place of the best": (SFA, mapped(3, lambda found: found.clamp(max=0))),
    "softmax scale of 1": (SFA, mapped(4, lambda scale: 1.0)),
    "latents of another sequence": (SFA, mapped("block_table", lambda table: (table + 1) % 3)),
    "lengths of keys one shorter": (SFA, mapped(SFA_LENS, lambda lens: lens - 1)),
    "cos and sin swapped": (ROTARY, swapped(1, 2)),
    "pairs of neighbours": (ROTARY, setting(rotary_mode="interleave")),
}


@pytest.fixture(autouse=True)
def _wide():
    with emulate.use_rules(wide=True):
        yield


def result_of(path: Any, operator: str, change: Change) -> str:
    mutants = []

    def change_ops(ops: Any) -> None:
        mutants.append(Mutant(operator, change))
        ops.npu.operators = mutants[0]

    result = outcome(path, change_ops, LENGTHS)
    assert mutants[0].changed, f"{operator} is never called"
    return result


@pytest.mark.parametrize("name", REFUSED)
def test_a_limit_is_kept(artifact, name):
    operator, change, said = REFUSED[name]
    result = result_of(artifact("v32-float"), operator, change)
    print(f"{name}: {result}")
    assert result.startswith("refused") and re.search(said, result), result


@pytest.mark.parametrize("name", SHOWS)
def test_a_wrong_call_does_not_pass(artifact, name):
    result = result_of(artifact("v32-float"), *SHOWS[name])
    print(f"{name}: {result}")
    assert result != "unnoticed"


@pytest.mark.parametrize(
    "model,operator", [("v32-float", LI), ("v32-float", SFA), ("v32-float", ROTARY), ("glm-dsa-float", ROPE)]
)
def test_a_right_call_does_pass(artifact, model, operator):
    assert result_of(artifact(model), operator, lambda args, kwargs: (args, kwargs)) == "unnoticed"


@pytest.mark.parametrize("name", ["v32-float", "glm-dsa-float"])
def test_the_wrong_rope_convention_shows(artifact, name):
    def change_ops(ops: Any) -> None:
        load = ops.sparse.load
        ops.sparse.load = lambda parts, config: load(parts, replace(config, rope_interleave=not config.rope_interleave))

    assert outcome(artifact(name), change_ops, LENGTHS).startswith("shows")


@pytest.mark.parametrize("name", ["v32-float", "glm-dsa-float"])
def test_rotary_channels_behind_the_others_show(artifact, name):
    def change_ops(ops: Any) -> None:
        rotate = ops.sparse._rotate
        ops.sparse._rotate = lambda x, *others: rotate(x.flip(-1), *others).flip(-1)

    assert outcome(artifact(name), change_ops, LENGTHS).startswith("shows")


@pytest.mark.parametrize("name", ["v32-float", "glm-dsa-float"])
def test_a_layer_norm_without_its_bias_shows(artifact, name):
    def change_ops(ops: Any) -> None:
        layer_norm = ops.norms.layer_norm
        ops.norms.layer_norm = lambda x, gamma, bias, eps: layer_norm(x, gamma, torch.zeros_like(bias), eps)

    assert outcome(artifact(name), change_ops, LENGTHS).startswith("shows")


def test_a_missing_hand_over_shows(artifact, monkeypatch):
    """Shared layers that attend to the first layer's selection, not to that of the nearest full one."""
    attend, kept = SparseMlaAttention.attend, {}

    def stale(self: Any, hidden: Any, weights: Any, cache: Any, step: Any, ops: Any, selected: Any = None) -> Any:
        attended = attend(self, hidden, weights, cache, step, ops, kept.get(id(step), selected))
        kept.setdefault(id(step), attended.selected)
        steps.append(step)  # so that no later one has its address
        return attended

    steps: list[Any] = []
    path = artifact("glm-dsa-float")
    assert outcome(path, lambda ops: None, LENGTHS) == "unnoticed"
    monkeypatch.setattr(SparseMlaAttention, "attend", stale)
    assert outcome(path, lambda ops: None, LENGTHS).startswith("shows")


@pytest.mark.parametrize("name", ["v32-float", "glm-dsa-float"])
def test_keys_that_dense_steps_do_not_write_show(artifact, name, monkeypatch):
    path, write = artifact(name), SparseMlaAttention._write_keys

    def sparse_only(self: Any, hidden: Any, sparse: Any, cache: Any, step: Any, ops: Any) -> None:
        if step.decode is not None and step.decode.longest > self.dense_tokens:
            write(self, hidden, sparse, cache, step, ops)

    assert outcome(path, lambda ops: None, LENGTHS) == "unnoticed"
    monkeypatch.setattr(SparseMlaAttention, "_write_keys", sparse_only)
    assert outcome(path, lambda ops: None, LENGTHS).startswith("shows")


@pytest.mark.parametrize("name", ["v32-float", "glm-dsa-float"])
def test_keys_in_the_next_slot_show(artifact, name):
    def change_ops(ops: Any) -> None:
        write = ops.sparse.write_rows
        ops.sparse.write_rows = lambda pages, slots, rows: write(pages, slots + 1, rows)

    assert outcome(artifact(name), change_ops, LENGTHS).startswith("shows")


def test_keys_written_by_a_mask_are_refused(artifact):
    """As other backends write them: how many rows a mask leaves only the device knows."""

    def change_ops(ops: Any) -> None:
        ops.sparse.write_rows = lambda pages, slots, rows: pages.write(slots, rows)

    assert "inside a step" in outcome(artifact("v32-float"), change_ops, LENGTHS)


def test_lengths_made_in_a_step_are_refused(artifact, monkeypatch):
    def made(decode: Any) -> Any:
        return torch.tensor(decode.q_lens, dtype=torch.int32), torch.tensor(decode.kv_lens, dtype=torch.int32)

    monkeypatch.setattr(sparse_module, "device_lens", made)
    assert "inside a step" in outcome(artifact("v32-float"), lambda ops: None, LENGTHS)


def test_heads_that_are_not_padded_are_refused(artifact, monkeypatch):
    monkeypatch.setattr(sparse_module, "absorbed_heads", lambda heads: heads)
    assert f"{SFA}: 6 query heads" in outcome(artifact("glm-dsa-six-heads-float"), lambda ops: None, LENGTHS)


PROLOG_MUTATIONS: dict[str, Change] = {
    "latent of queries not asked for": without("query_norm_flag"),
    "cache_mode of NZ pages": setting(cache_mode="PA_NZ"),
}


@pytest.mark.parametrize("name", PROLOG_MUTATIONS)
def test_a_wrong_call_of_the_prolog_does_not_pass(artifact, name):
    path = artifact("glm-dsa-prolog")

    def run(change: Change) -> harness.Run:
        ops = harness.make("ascend", torch.bfloat16)
        ops.npu.operators = Mutant(PROLOG, change)
        done = harness.generate(path, ops, lengths=(5, 20), new_tokens=2)
        assert ops.npu.operators.changed
        return done

    with emulate.use_rules(wide=False):
        expected = run(lambda args, kwargs: (args, kwargs))
        try:
            wrong = run(PROLOG_MUTATIONS[name])
        except (emulate.RefusedError, RuntimeError, IndexError) as error:
            print(f"{name}: {str(error).splitlines()[0]}")
            return
    assert harness.relative_error(wrong.logits, expected.logits) > 1e-2
