"""A model over ranks computes what one process computes, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import add_tokenizer
from measuring import NEW_TOKENS, Case
from tiny import make_checkpoint

HERE = Path(__file__).parent
MEASURING = HERE / "measuring.py"


@pytest.fixture(scope="module")
def cases(example_fp8: Path, artifact: Path, int8_artifact: Path, twelve: Path) -> dict[int, list[Case]]:
    """Cases by the number of ranks that run them."""
    of_example = [
        Case(str(artifact)),
        Case(str(artifact), dtype="bfloat16"),
        Case(str(artifact), backend="reference"),
        Case(str(int8_artifact), kv_cache_dtype="int8"),
        Case(str(example_fp8)),
    ]
    of_twelve = [Case(str(twelve)), Case(str(twelve), dtype="bfloat16"), Case(str(twelve), backend="reference")]
    # Two ranks run every set of operators and every form of weights. More ranks divide alike: what they add are their
    # numbers of rows, which more often differ, or are none.
    by_experts = {2: [*of_example, *of_twelve], 3: of_twelve[:2], 4: [of_example[0], of_twelve[2]]}
    chosen = {
        ranks: [replace(case, parallel=f"ep={ranks},tp=1") for case in several] for ranks, several in by_experts.items()
    }
    chosen[2].append(Case(str(artifact), parallel="ep=2,tp=2"))
    chosen[2].append(Case(str(twelve), backend="reference", parallel="tp=2"))
    chosen[4].append(Case(str(int8_artifact), kv_cache_dtype="int8", parallel="ep=4,tp=2"))
    chosen[4].append(Case(str(artifact), dtype="bfloat16", parallel="ep=4,tp=4"))
    return {1: [*of_example, *of_twelve], **chosen}


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with 12 float experts, which three ranks divide."""
    directory = tmp_path_factory.mktemp("twelve") / "model"
    make_checkpoint(directory, "v2-lite", n_routed_experts=12)
    add_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def measured(cases: dict[int, list[Case]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """`measured(ranks)`: the results of that many ranks, run once."""
    folder, done = tmp_path_factory.mktemp("measured"), {}

    def of(ranks: int) -> Any:
        if ranks not in done:
            list_of_cases, out = folder / f"cases-{ranks}", folder / f"results-{ranks}"
            list_of_cases.write_text(json.dumps([asdict(case) for case in cases[ranks]]), encoding="utf-8")
            launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            ended = subprocess.run(
                [sys.executable, *launcher, str(MEASURING), str(list_of_cases), str(out)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert ended.returncode == 0, ended.stderr[-4000:]
            done[ranks] = torch.load(out, weights_only=True)
        return done[ranks]

    return of


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_logits_and_tokens_are_those_of_one_process(measured: Callable[[int], Any], ranks: int) -> None:
    alone, several = measured(1), measured(ranks)
    expected = {_of_one(case): result for case, result in zip(alone["cases"], alone["results"], strict=True)}
    assert several["cases"]
    for case, found in zip(several["cases"], several["results"], strict=True):
        wanted = expected[_of_one(case)]
        assert found["greedy"] == wanted["greedy"], case
        assert found["seeded"] == wanted["seeded"], case
        for name in ("steps", "texts"):
            assert len(found[name]) == len(wanted[name])
            for ours, theirs in zip(found[name], wanted[name], strict=True):
                assert ours.dtype is theirs.dtype
                assert torch.equal(ours.view(torch.int8), theirs.view(torch.int8)), (case, name)


def _of_one(case: dict[str, Any]) -> str:
    return json.dumps({**case, "parallel": None})


def test_the_cases_hold_what_they_are_for(measured: Callable[[int], Any]) -> None:
    """Sequences that lose their blocks, ranks of unequal rows, and ranks without any."""
    for result in measured(1)["results"]:
        assert result["preempted"] > 0
        assert all(len(tokens) == NEW_TOKENS for tokens in (*result["greedy"], *result["seeded"]))
        assert result["greedy"] != result["seeded"]
    for ranks in (2, 3, 4):
        counts = measured(ranks)["counts"]
        assert any(0 < min(each) < max(each) for each in counts)
        assert any(min(each) == 0 for each in counts) or ranks == 2
