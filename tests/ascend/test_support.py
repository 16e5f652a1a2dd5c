"""Versions and chips, as messages a user can act on. Needs no torch_npu."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from npuq.errors import BackendError
from npuq.formats.schemes import Scheme
from npuq.models.mla import Mla
from npuq.runtime.ops import LinearPart
from npuq.runtime.ops.ascend.attention.limits import (
    PrefillForm,
    absorbed_heads,
    check_indexer,
    check_mla,
    pad_heads,
    prefill_form,
    takes_prolog,
)
from npuq.runtime.ops.ascend.support import check_versions, explain_import_error, require_soc, soc_of
from npuq.runtime.ops.ascend.weights import AscendWeights, scale_words


@pytest.mark.parametrize("npu", ["2.13.0", "2.13.0.post1", "2.13.0rc1"])
def test_a_pair_of_one_release_fits(npu):
    check_versions("2.13.0+cpu", npu)


@pytest.mark.parametrize("torch_version,npu", [("2.12.0", "2.13.0"), ("2.13.1+cpu", "2.13.0")])
def test_another_release_is_refused_naming_both(torch_version, npu):
    with pytest.raises(BackendError) as error:
        check_versions(torch_version, npu)
    assert torch_version in str(error.value) and npu in str(error.value) and "\n" not in str(error.value)


def test_a_pair_that_does_not_fit_is_told_both_remedies():
    with pytest.raises(BackendError) as error:
        check_versions("2.13.0+cpu", "2.10.0.post7")
    assert str(error.value) == (
        "torch_npu 2.10.0.post7 is built for torch 2.10.0, but torch 2.13.0+cpu is installed: "
        "pip install torch==2.10.0+cpu --index-url https://download.pytorch.org/whl/cpu, "
        "or pip install 'torch_npu==2.13.0.*'"
    )


@pytest.mark.parametrize("name", ["Ascend910B1", "Ascend910B4-1", "Ascend910_9391", "ascend910b2"])
def test_a2_and_a3_run(name):
    assert require_soc(name).int4_experts


@pytest.mark.parametrize("name", ["Ascend310P3", "Ascend910_9599", "Ascend950PR"])
def test_310p_and_a5_are_refused_with_the_reason(name):
    with pytest.raises(BackendError, match="int4 grouped matmul"):
        require_soc(name)


def test_a5_is_not_mistaken_for_a3():
    assert "A5" in soc_of("Ascend910_9599").family
    assert "A3" in soc_of("Ascend910_9382").family


def test_an_unknown_chip_is_refused():
    with pytest.raises(BackendError, match="Ascend610"):
        require_soc("Ascend610")


def test_an_import_error_for_another_reason_keeps_its_text():
    assert "bad magic" in explain_import_error("2.13.0", ImportError("bad magic number"))


def test_scale_words_hold_the_bits_and_nothing_else():
    scales = torch.tensor([1.0, 0.5, 3.0e-5])
    words = scale_words(scales)
    assert words.dtype == torch.int64
    assert (words >> 32).tolist() == [0, 0, 0]
    assert words[0] == 0x3F800000 and words[1] == 0x3F000000


CONFIG = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}


@pytest.mark.parametrize(
    "change,said",
    [
        ({"heads": 256}, "256 attention heads"),
        ({"kv_lora_rank": 256}, "kv_lora_rank 256"),
        ({"v_head_dim": 160}, "qk_nope_head_dim 128 with v_head_dim 160"),
        ({"qk_nope_head_dim": 192}, "qk_nope_head_dim 192 with v_head_dim 128"),
        ({"qk_nope_head_dim": 456, "v_head_dim": 520}, "multiple of 16 up to 512"),
        ({"qk_rope_head_dim": 32}, "qk_rope_head_dim 32"),
    ],
)
def test_attention_that_the_operators_do_not_take_is_refused(change, said):
    values = {"heads": 16, "q_lora_rank": None, **CONFIG}
    check_mla("layer", Mla(**values))
    with pytest.raises(BackendError, match=said):
        check_mla("layer", Mla(**{**values, **change}))


@pytest.mark.parametrize(
    "widths,form",
    [
        ((128, 64, 128), PrefillForm.ROPE_BESIDE),
        ((192, 64, 256), PrefillForm.JOINED),  # GLM-4.7-Flash, GLM-5
        ((192, 64, 128), None),
        ((64, 64, 128), PrefillForm.JOINED),
        ((448, 64, 512), PrefillForm.JOINED),
        ((450, 64, 514), None),
        ((16, 8, 24), None),
    ],
)
def test_the_form_of_prefill_attention_follows_the_widths_of_heads(widths, form):
    assert prefill_form(*widths) is form


def test_absorbed_attention_takes_the_next_power_of_two():
    assert [absorbed_heads(heads) for heads in (1, 2, 3, 5, 20, 64, 100, 128)] == [1, 2, 4, 8, 32, 64, 128, 128]
    query = torch.ones(2, 20, 3)
    padded = pad_heads(query, 32)
    assert padded.shape == (2, 32, 3) and torch.equal(padded[:, :20], query) and not padded[:, 20:].any()
    assert pad_heads(query, 20) is query


def test_the_prolog_is_for_its_documented_sizes():
    widths = Mla(128, 1536, 512, 128, 64, 128)
    assert takes_prolog(7168, widths) and takes_prolog(6144, replace(widths, heads=64, q_lora_rank=2048))
    for change in ({"q_lora_rank": 768}, {"heads": 20}, {"qk_nope_head_dim": 256}, {"q_lora_rank": None}):
        assert not takes_prolog(7168, replace(widths, **change))
    assert not takes_prolog(4097, widths)


@pytest.mark.parametrize(
    "heads,head_dim,topk,said",
    [
        (64, 128, 2048, None),
        (32, 128, 2048, None),  # GLM-5
        (1, 128, 1, None),
        (64, 128, 8192, None),
        (65, 128, 2048, "index_n_heads 65 (at most 64)"),
        (64, 64, 2048, "index_head_dim 64 (must be 128)"),
        (64, 128, 2049, "index_topk 2049 (must be at most 2048, or one of 3072, 4096, 5120, 6144, 7168, 8192)"),
        (64, 128, 9216, "index_topk 9216"),
    ],
)
def test_an_indexer_of_other_sizes_is_refused(heads, head_dim, topk, said):
    if said is None:
        check_indexer("wq_b", heads, head_dim, topk)
        return
    with pytest.raises(BackendError, match=re.escape(f"wq_b: the NPU's lightning indexer does not take {said}")):
        check_indexer("wq_b", heads, head_dim, topk)


def test_experts_whose_inputs_the_w4a8_matmul_does_not_take_are_refused():
    part = LinearPart("mlp.experts.0.down_proj", Scheme.W4A8, torch.zeros(8, 96, dtype=torch.int8))
    with pytest.raises(BackendError, match=r"experts\.0\.down_proj.*multiple of 64"):
        AscendWeights(torch.device("cpu"), torch.bfloat16).w4a8_experts([[part]])


def test_the_documented_table_is_the_measured_one():
    """docs/ascend.md shows launches.json, which the rig measures."""
    folder = Path(__file__).parent
    table = json.loads((folder / "launches.json").read_text())
    rows = {}
    for line in (folder.parents[1] / "docs" / "ascend.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.setdefault(cells[0], cells[1:])  # the first table: the second compares with the engines
    assert rows["operator"] == list(table)
    assert rows["**launches**"] == [f"**{case['total']}**" for case in table.values()]
    for kind in {kind for case in table.values() for kind in case["launches"]}:
        space, name = kind.split(".", 1)
        shown = rows[f"`{name}`" + (" (aten)" if space == "aten" else "")]
        assert shown == [str(case["launches"].get(kind, "")) for case in table.values()]
