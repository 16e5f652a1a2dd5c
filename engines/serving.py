"""Serving of an artifact by vLLM-Ascend and SGLang: the number of NPUs, and the commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..formats.artifact import CARD_PATH
from ..formats.schemes import Scheme
from ..models.config import ModelConfig
from .parameters import SGLANG_VARIABLES
from .placement import ENGINES, placement_problems

DEVICE_BYTES: Final = 64_000_000_000
"""Bytes of device memory of an Atlas A2's NPU, the smallest that these models are served on."""

# The share of it for weights: the rest is for the cache, activations and communication.
_WEIGHTS_SHARE: Final = 0.75
_RANKS: Final = (1, 2, 4, 8, 16, 32, 64)


def serving_ranks(config: ModelConfig, schemes: Mapping[str, Scheme], nbytes: int) -> int | None:
    """The fewest ranks with whole experts that hold `nbytes` of weights, and over which both engines can spread them.

    `schemes` is the description. None where no number of ranks suffices.
    """
    for ranks in _RANKS:
        fits = nbytes / ranks <= _WEIGHTS_SHARE * DEVICE_BYTES
        if fits and not any(
            line for engine in ENGINES for line in placement_problems(engine, config, schemes, ranks, ranks > 1)
        ):
            return ranks
    return None


def serving_section(ranks: int | None, nbytes: int, *, mtp: bool, architecture: str = "") -> str:
    """Markdown: the commands for this many ranks, or the reason for none; `mtp` where MTP layers can draft.

    `architecture` is the class that engines build (`Family.architecture`).
    """
    if ranks is None:
        return (
            "### vLLM-Ascend, SGLang\n\n"
            f"No number of NPUs of {DEVICE_BYTES / 1e9:.0f} GB runs this artifact as it is: "
            f"`npuq verify {CARD_PATH} --engine vllm-ascend --tp N --ep` says what is in the way.\n"
        )
    whole = ranks > 1
    vllm = f"vllm serve {CARD_PATH} --quantization ascend --trust-remote-code"
    sglang = f"python -m sglang.launch_server --model-path {CARD_PATH} --device npu --trust-remote-code"
    if architecture in SGLANG_VARIABLES:
        sglang = f"{SGLANG_VARIABLES[architecture]} {sglang}"
    if whole:
        vllm += f" \\\n  --tensor-parallel-size {ranks} --enable-expert-parallel"
        sglang += f" \\\n  --tp-size {ranks} --ep-size {ranks}"
    size = f"{DEVICE_BYTES / 1e9:.0f} GB"
    holds = (
        f"{ranks} NPUs of {size} hold the weights, {nbytes / ranks / 1e9:.3g} GB each, and leave room for the cache;\n"
        "more ranks must divide heads and experts as these do."
        if whole
        else f"One NPU of {size} holds the weights. For more, split attention by tensor parallelism and keep experts\n"
        "whole: `--tensor-parallel-size N --enable-expert-parallel`, `--tp-size N --ep-size N`."
    )
    drafts = (
        "\nThe multi-token-prediction layer drafts tokens: in vLLM-Ascend with\n"
        """`--speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'`; in SGLang the draft model needs\n"""
        "`--quantization modelslim`.\n"
    )
    return (
        f"### On NPUs\n\n{holds}\n\n"
        f"### vLLM-Ascend\n\n```bash\n{vllm}\n```\n\n"
        "It finds `quant_model_description.json` by itself; the flag makes it fail early where it cannot.\n\n"
        f"### SGLang\n\n```bash\n{sglang}\n```\n\n"
        "It finds the description by itself. Keep `--ep-size` equal to `--tp-size`: tensor parallelism inside the\n"
        "experts adds the bias of down projections once a rank and gives wrong output.\n"
        f"{drafts if mtp else ''}"
    )
