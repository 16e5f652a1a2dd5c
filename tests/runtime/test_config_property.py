"""What ModelConfig accepts, every backend computes, and as transformers does; what it refuses never reaches one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import npuq.runtime
from npuq.errors import BackendError, CheckpointError
from npuq.models.config import ModelConfig

TOKENS = torch.randint(2, 40, (19,), generator=torch.Generator().manual_seed(5)).tolist()

_YARN = st.fixed_dictionaries(
    {
        "rope_type": st.just("yarn"),
        "factor": st.sampled_from([1.0, 4.0, 40.0]),
        "original_max_position_embeddings": st.sampled_from([8, 64]),
    },
    optional={
        "mscale": st.sampled_from([0.707, 1.0]),
        "mscale_all_dim": st.sampled_from([0.707, 1.0]),
        "beta_fast": st.sampled_from([1.0, 32.0]),
        "attention_factor": st.sampled_from([0.5, 1.3]),
        "truncate": st.booleans(),
    },
)
# Dynamic NTK is not among them: tables must fix the length that its frequencies depend on (docs/artifact.md).
_ROPES = st.one_of(
    st.just({"rope_type": "default"}),
    st.fixed_dictionaries(
        {"rope_type": st.just("linear"), "factor": st.sampled_from([1.0, 3.0])},
        optional={"mscale_all_dim": st.sampled_from([0.5, 1.0])},
    ),
    _YARN,
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.just(8.0),
            "low_freq_factor": st.just(1.0),
            "high_freq_factor": st.just(4.0),
            "original_max_position_embeddings": st.just(16),
        },
        optional={"mscale_all_dim": st.just(1.0)},
    ),
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small configs of both families: most are models, and the rest is refused."""
    family = draw(st.sampled_from(["v2", "v3"]))
    heads = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 2))
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(40, 70)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        # transformers' V2 wants a multiple of the heads.
        "hidden_size": heads * draw(st.integers(1, 40)),
        "intermediate_size": draw(st.integers(1, 70)),
        "moe_intermediate_size": draw(st.integers(1, 70)),
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "q_lora_rank": draw(st.none() | st.integers(1, 40)),
        # The cache's layout takes multiples of 16, and every backend refuses others.
        "kv_lora_rank": draw(st.sampled_from([16, 32, 48, 48, 20])),
        "qk_rope_head_dim": draw(st.sampled_from([15, 16, 16, 32, 32, 6])),
        # transformers' V2 makes complex numbers of views, whose strides must be even.
        "qk_nope_head_dim": 2 * draw(st.integers(1, 20)),
        "v_head_dim": draw(st.integers(1, 40)),
        "n_routed_experts": draw(st.sampled_from([1, 2, 4, 6, 8])),
        "n_shared_experts": draw(st.integers(1, 2)),
        "num_experts_per_tok": draw(st.integers(1, 4)),
        "n_group": draw(st.sampled_from([1, 1, 2, 4, 8])),
        "topk_group": draw(st.integers(1, 2)),
        "routed_scaling_factor": draw(st.sampled_from([0.5, 1.0, 2.5])),
        "norm_topk_prob": draw(st.booleans()) if family == "v3" else False,
        "rope_parameters": {"rope_theta": 10000.0, **draw(_ROPES)},
        "max_position_embeddings": 64,
    }
    if family == "v2":
        values["topk_method"] = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    return {"family": family, **values}


def model_type(family: str) -> dict[str, str]:
    return {"model_type": {"v2": "deepseek_v2", "v3": "deepseek_v3"}[family]}


BACKENDS = ("reference", "cpu")
# What differed once, beside what is drawn.
_ONE = {
    "family": "v3",
    "vocab_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "mscale_all_dim": 1.0},
}
ACCEPTED: list[bool] = []


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example(values=_ONE)  # one expert a token: its weight is normalised to 1 all the same
@example(values={**_ONE, "n_group": 8})  # groups of one expert have no second best
@example(values={**_ONE, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4})  # all that the groups hold
@given(values=configs())
def check_one(values: dict[str, Any], make_checkpoint: Callable[..., Any]) -> None:
    family, rest = values["family"], {key: value for key, value in values.items() if key != "family"}
    try:
        ModelConfig.from_dict({**model_type(family), **rest})
    except CheckpointError:
        ACCEPTED.append(False)
        return
    ACCEPTED.append(True)
    with tempfile.TemporaryDirectory() as folder:
        # The grouped matmul of transformers' default takes rows of 16 bytes alone.
        golden = make_checkpoint(Path(folder), family, **rest)
        golden.set_experts_implementation("eager")
        with torch.inference_mode():
            expected = golden(torch.tensor([TOKENS])).logits[0]
        refused = [message for backend in BACKENDS if isinstance(message := compare(folder, backend, expected), str)]
        assert len(refused) in (0, len(BACKENDS)) and len(set(refused)) <= 1, refused


def compare(folder: str, backend: str, expected: torch.Tensor) -> str | None:
    """Load and compute; the message where the backend refuses to."""
    try:
        ours = next(npuq.runtime.load(folder, backend).logits([TOKENS]))
    except BackendError as error:
        return str(error)
    error = float((ours.float() - expected).norm() / expected.norm())
    assert error < 1e-3, (backend, error)
    return None


def test_what_is_accepted_is_computed_as_transformers_does(make_checkpoint: Callable[..., Any]) -> None:
    ACCEPTED.clear()
    check_one(make_checkpoint=make_checkpoint)
    assert 25 <= sum(ACCEPTED) < len(ACCEPTED)
