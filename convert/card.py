"""The model card of an artifact: what it is, how it was made, what it lost, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from ..quant.artifact import CARD_BEGIN, CARD_END, CARD_PATH
from ..quant.scales import Method
from .calibration.texts import Calibration
from .prepare import Origin
from .recipe import Recipe, Target, Transform
from .report import RoleTotals

# Kept from the source's card: the artifact stands under the source's terms.
_INHERITED = ("license", "license_name", "license_link", "language")

_ENGINES = f"""\
### vLLM-Ascend

```bash
vllm serve {CARD_PATH} --quantization ascend --trust-remote-code
```

It finds `quant_model_description.json` by itself; the flag makes it fail early where it cannot. 4-bit experts run with
tensor parallelism up to 16 unless expert parallelism is on (`--enable-expert-parallel`).

### SGLang

```bash
python -m sglang.launch_server --model-path {CARD_PATH} --device npu --trust-remote-code --ep-size N
```

It finds the description by itself. Split experts by expert parallelism (`--ep-size` equal to `--tp-size`): tensor
parallelism inside the experts adds the bias of `down_proj` once a rank and gives wrong output.
"""

_MTP_NOTE = """\
The artifact keeps the multi-token-prediction layers; as SGLang's draft model they need `--quantization modelslim`.
"""

_NPUQ_ONLY = """\
This artifact is for npuq's own runtime: vLLM-Ascend and SGLang refuse float routed experts in this layout. Give them
the source checkpoint, or convert it with the recipe `w4a8` or `w8a8`.
"""

_LOAD_NPUQ = f"""\
### npuq

```python
import npuq

model = npuq.load("{CARD_PATH}")
```

```bash
npuq generate {CARD_PATH} --prompt "Once upon a time"
```
"""


def model_card(
    origin: Origin,
    recipe: Recipe,
    totals: Sequence[RoleTotals],
    mtp_layers: Sequence[int],
    source_front_matter: Mapping[str, object],
    calibration: Calibration | None = None,
) -> str:
    """README.md of an artifact, front matter included. Depends on its arguments alone: no dates, hosts or paths."""
    front = {key: source_front_matter[key] for key in _INHERITED if key in source_front_matter}
    quantized = any(total.scheme != "FLOAT" for total in totals)
    tags = ["npuq", "ascend", "moe", *(["quantized", recipe.name] if quantized else [])]
    if origin.repo is not None:
        front |= {"base_model": origin.repo, "base_model_relation": "quantized"}
    front |= {"library_name": "npuq", "pipeline_tag": "text-generation", "tags": tags}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        CARD_BEGIN,
        f"# {origin.name}, {recipe.name}\n",
        _summary(origin.name, recipe, totals, mtp_layers, calibration),
        "## Size and error\n",
        _error_table(totals),
        "## Loading\n",
        _LOAD_NPUQ,
        _ENGINES if recipe.target is Target.ENGINES else _NPUQ_ONLY,
    ]
    if recipe.target is Target.ENGINES and mtp_layers:
        sections.append(_MTP_NOTE)
    sections += ["## Recipe\n", f"```yaml\n{recipe.to_yaml()}```\n", f"{CARD_END}\n"]
    return "\n".join(sections)


_TRANSFORMS = {
    Transform.ROTATE: "The residual stream was rotated (Hadamard) with norms folded in.",
    Transform.SMOOTH: "Channels were smoothed between norms and linears, values and o_proj, up_proj and down_proj.",
}
_METHODS = {
    Method.MINMAX: "Scales per output channel, symmetric, from each row's largest value.",
    Method.MSE: "Scales per output channel, symmetric, of least squared error.",
    Method.GPTQ: "Scales per output channel, symmetric; codes by GPTQ and coordinate descent.",
}


def _how(recipe: Recipe, calibration: Calibration | None) -> str:
    """How codes were found, in sentences."""
    parts = [*(_TRANSFORMS[transform] for transform in recipe.transforms), _METHODS[recipe.method]]
    if calibration is None:
        parts.append("No calibration data.")
    else:
        parts.append(
            f"Calibrated on {calibration.samples} windows of {calibration.sequence_length} tokens "
            f"({calibration.name}, sha256 of the tokens {calibration.sha256[:16]}…), "
            "with scales for an int8 KV cache (`--kv-cache-dtype int8`, npuq's runtime alone)."
        )
    return " ".join(parts)


def _summary(
    source_name: str,
    recipe: Recipe,
    totals: Sequence[RoleTotals],
    mtp_layers: Sequence[int],
    calibration: Calibration | None,
) -> str:
    before = sum(total.source_bytes for total in totals)
    after = sum(total.output_bytes for total in totals)
    lines = [
        f"`{source_name}` converted by npuq with the recipe `{recipe.name}`: "
        f"{_size(before)} of weights became {_size(after)} ({after / before:.0%}).",
    ]
    if recipe.stored:
        lines.append("The source was quantized already: codes and scales are as they were there, to the bit.")
    elif any(total.scheme != "FLOAT" for total in totals):
        lines.append(f"{_how(recipe, calibration)} Activations are quantized to 8 bits per token at run time.")
    if mtp_layers:
        lines.append(f"Multi-token-prediction layers: {', '.join(map(str, mtp_layers))}.")
    return "\n".join(lines) + "\n"


def _error_table(totals: Sequence[RoleTotals]) -> str:
    lines = [
        "Error: √(Σ(w − ŵ)² / Σw²) of the dequantized against the source weights.",
        "",
        "| role | scheme | tensors | before | after | error | largest |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for total in totals:
        errors = "– | –"
        if total.relative_error is not None:
            errors = f"{total.relative_error:.2%} | {total.largest_error:.2%}"
        lines.append(
            f"| {total.role} | {total.scheme} | {total.tensors} | {_size(total.source_bytes)} | "
            f"{_size(total.output_bytes)} | {errors} |"
        )
    return "\n".join(lines) + "\n"


def _size(nbytes: int) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "KB")):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.3g} {unit}"
    return f"{nbytes} B"
