"""Tensors are addressed by part: a checkpoint's names stand in models/ alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import npuq

ROOT = Path(npuq.__file__).parent
ELSEWHERE = {"tests", "benchmarks", "examples", "build", "models", "docs"}
NAMES = re.compile(
    r"""kv_a_proj|kv_b_proj|\b[qkvo]_(?:[ab]_)?proj\b|e_score_correction|(?:gate|up|down)_proj\b|embed_tokens|eh_proj
    |\benorm\b|\bhnorm\b|shared_head|layernorm|lm_head\.weight|mlp\.(?:gate|experts|shared)|model\.(?:layers|norm)
    |self_attn|inv_freq""",
    re.VERBOSE,
)
# What is named there is not a checkpoint's tensor.
ALLOWED = {
    "engines/parameters.py": "what the engines' own loading code looks for in a name",
    "formats/kv_cache.py": "the key of a file of our own",
}


def production_files() -> list[Path]:
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return sorted(path for path in found if not path.parts[0].startswith(".") and path.parts[0] not in ELSEWHERE)


# Widths of multi-head latent attention: its attention code and its operators alone know them, and the config.json of
# a model that is made in memory.
WIDTHS = re.compile(r"kv_lora_rank|qk_(?:nope|rope)_head_dim|v_head_dim|q_lora_rank")
KNOW_WIDTHS = (
    "runtime/attention/mla.py",
    "runtime/attention/sparse_mla.py",
    "runtime/ops/",
    "runtime/diagnostics/bench/synthetic.py",
)


def test_there_are_files_to_look_at() -> None:
    assert len(production_files()) > 150


@pytest.mark.parametrize("path", production_files(), ids=str)
def test_no_names_of_checkpoints_outside_models(path: Path) -> None:
    found = [line for line in (ROOT / path).read_text().splitlines() if NAMES.search(line)]
    assert bool(found) == (str(path) in ALLOWED), found


@pytest.mark.parametrize("path", production_files(), ids=str)
def test_no_widths_of_mla_outside_its_code(path: Path) -> None:
    if not str(path).startswith(KNOW_WIDTHS):
        assert [line for line in (ROOT / path).read_text().splitlines() if WIDTHS.search(line)] == []
