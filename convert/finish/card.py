"""The model card of an artifact: its contents, origin, errors, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import yaml

from ...engines.serving import serving_section
from ...errors import ConversionError
from ...formats.artifact import CARD_BEGIN, CARD_END, CARD_PATH
from ...inputs.names import RepoId
from ...quant.scales import Method
from ...recipes.recipe import Recipe, Target, Transform
from ...units import format_bytes
from ..plan.prepare import Origin
from .role_totals import RoleTotals

if TYPE_CHECKING:
    from ..calibrate.texts import Calibration

# Kept from the source's card: its terms hold for the artifact too.
_INHERITED = ("license", "license_name", "license_link", "language")

_NPUQ_ONLY = """\
This artifact is for npuq's own runtime: vLLM-Ascend and SGLang refuse float routed experts in this form. Give them
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


def check_base_model(name: str) -> None:
    """Raise ConversionError unless `name` can be a repository's on the hub."""
    if not RepoId.fits(name):
        raise ConversionError(f"--base-model {name[:100]!r}: must be OWNER/NAME, as the source is called on the hub")


def model_card(
    origin: Origin,
    recipe: Recipe,
    totals: Sequence[RoleTotals],
    mtp_layers: Sequence[int],
    source_front_matter: Mapping[str, object],
    ranks: int | None,
    architecture: str,
    base_model: str | None = None,
    calibration: Calibration | None = None,
) -> str:
    """README.md of an artifact, front matter included. Depends on its arguments alone: no dates, hosts or paths.

    `ranks` is the number of ranks in the serve commands (`serving_ranks`), `architecture` the class that engines build;
    `base_model` is the source's name on the hub, where it is not the repository of `origin`.
    """
    front = {key: source_front_matter[key] for key in _INHERITED if key in source_front_matter}
    quantized = any(total.scheme != "FLOAT" for total in totals)
    tags = ["npuq", "ascend", "moe", *(["quantized", recipe.name] if quantized else [])]
    base = base_model or origin.repo
    if base is not None:
        front |= {"base_model": base, "base_model_relation": "quantized"}
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
        serving_section(
            ranks, sum(total.output_bytes for total in totals), mtp=bool(mtp_layers), architecture=architecture
        )
        if recipe.target is Target.ENGINES
        else _NPUQ_ONLY,
    ]
    sections += ["## Recipe\n", f"```yaml\n{recipe.to_yaml()}```\n", f"{CARD_END}\n"]
    return "\n".join(sections)


_TRANSFORMS = {
    Transform.ROTATE: "The residual stream was rotated (Hadamard) with norms folded in.",
    Transform.SMOOTH: (
        "Channels were smoothed between norms and linears, values and the output projection, up and down projections."
    ),
}
_METHODS = {
    Method.MINMAX: "Scales per output channel, symmetric, from each row's largest value.",
    Method.MSE: "Scales per output channel, symmetric, of least squared error.",
    Method.GPTQ: "Scales per output channel, symmetric; codes by GPTQ and coordinate descent.",
}


def _how(recipe: Recipe, calibration: Calibration | None) -> str:
    """The method of quantization, in sentences."""
    parts = [*(_TRANSFORMS[transform] for transform in recipe.transforms), _METHODS[recipe.method]]
    if calibration is None:
        parts.append("No calibration data.")
    else:
        parts.append(
            f"Calibrated on {calibration.samples} samples of {calibration.sequence_length} tokens "
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
        f"{format_bytes(before)} of weights became {format_bytes(after)} ({after / before:.0%}).",
    ]
    if recipe.stored:
        lines.append("The source was quantized already: codes and scales are as they were there, to the bit.")
    elif any(total.scheme != "FLOAT" for total in totals):
        lines.append(f"{_how(recipe, calibration)} Activations are quantized to 8 bits per token at run time.")
    if mtp_layers:
        lines.append(_kept_mtp(mtp_layers))
    return "\n".join(lines) + "\n"


def _kept_mtp(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"It keeps its multi-token-prediction layer (layer {layers[0]}, from 0)."
    return f"It keeps its {len(layers)} multi-token-prediction layers (layers {layers[0]} to {layers[-1]}, from 0)."


def _error_table(totals: Sequence[RoleTotals]) -> str:
    lines = [
        "Weight error: √(Σ(w − ŵ)² / Σw²) of the dequantized against the source's weights, over all of a role;",
        "largest: of one tensor.",
        "",
        "| role | scheme | tensors | before | after | weight error | largest |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for total in totals:
        errors = "– | –"
        if total.relative_error is not None:
            errors = f"{total.relative_error:.2%} | {total.largest_error:.2%}"
        lines.append(
            f"| {total.role} | {total.scheme} | {total.tensors} | {format_bytes(total.source_bytes)} | "
            f"{format_bytes(total.output_bytes)} | {errors} |"
        )
    return "\n".join(lines) + "\n"
