"""Contradictions between two statements of a checkpoint about one thing: a line each, with the statement that counts.

They are decided as transformers and the engines decide them. Statements that neither could read are refused where they
are read (`models/inventory.py`, `models/config.py`, `formats/checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...formats.artifact import description_path
from ...formats.checkpoint import INDEX_NAME, Checkpoint, read_weight_map
from ...formats.safetensors import CODES
from ...formats.sources.compressed_tensors import is_compressed
from ...formats.sources.ties import tied_names
from ...formats.sources.weights import WeightSource
from ...inputs.files import inside, is_inside
from ...inputs.json_text import read_object
from ...models.config import ModelConfig
from ...models.config_reader import shown
from ...models.inventory import Inventory
from ...runtime.text.generation_config import NAME as GENERATION_NAME
from ...units import format_bytes


def statements(
    checkpoint: Checkpoint,
    config: ModelConfig,
    inventory: Inventory,
    source: WeightSource,
    shared: str | None,
    heads: Sequence[str] = (),
) -> list[str]:
    """A line for each contradiction; `shared` is the tied name that `share_tied` found missing, `heads` those of
    `missing_heads`."""
    raw, directory = checkpoint.config, checkpoint.directory
    return [
        *_head(raw, config, shared),
        *_mtp_layers(config, inventory),
        *_draft_heads(source, heads),
        *_shared_selections(config),
        *_dtype(raw, config, inventory, source),
        *_quantization(raw, directory, source),
        *_rope(raw),
        *_groups(raw, config),
        *_architectures(raw, config),
        *_end_of_sequence(raw, directory),
        *_index(checkpoint, shared),
    ]


def _head(raw: Mapping[str, Any], config: ModelConfig, shared: str | None) -> Iterator[str]:
    if raw.get("tie_word_embeddings") is not True:
        return
    embedding, head = tied_names(config.family)
    if shared is None:
        yield (
            f"config.json ties embedding and head, and the checkpoint stores both: {head!r} is used as it is stored, "
            "as transformers does where the two differ; the artifact's config.json unties them"
        )
        return
    stored = embedding if shared == head else head
    yield (
        f"embedding and head are tied: the artifact stores {stored!r} a second time as {shared!r}, because vLLM never "
        "ties them, and its config.json unties them"
    )


def _mtp_layers(config: ModelConfig, inventory: Inventory) -> Iterator[str]:
    first = config.num_hidden_layers
    uncounted = [layer for layer in inventory.mtp_layers if layer >= first + config.num_nextn_predict_layers]
    if uncounted:
        yield (
            f"the checkpoint has MTP layers ({_listed(uncounted)}) that config.json does not count "
            f"(num_nextn_predict_layers {config.num_nextn_predict_layers}): the artifact's counts them"
        )
    if inventory.partial_mtp_layers:
        yield (
            f"layers {_listed(inventory.partial_mtp_layers)} are MTP layers behind a gap, or neither whole nor counted "
            "by config.json: left out, since no loader runs them"
        )


def _shared_selections(config: ModelConfig) -> Iterator[str]:
    if config.attention.disputed:
        yield (
            f"config.json states twice {config.attention.disputed}: the list counts, then the pattern, as in "
            "transformers; vLLM-Ascend goes by pattern and frequency, and computes another model: keep one statement"
        )


def _draft_heads(source: WeightSource, heads: Sequence[str]) -> Iterator[str]:
    if heads:
        size = source.weights[heads[0]].nbytes
        yield (
            f"the checkpoint ships no head for its MTP layer: rotation stores {heads[0]!r} ({format_bytes(size)}), the "
            "main model's head with the MTP layer's own norm folded in. vLLM-Ascend drafts with it; SGLang drafts with "
            "the main model's head in any case: it accepts fewer drafts, and generates the same text"
        )


def _dtype(raw: Mapping[str, Any], config: ModelConfig, inventory: Inventory, source: WeightSource) -> Iterator[str]:
    if raw.get("torch_dtype") is not None and raw.get("dtype") not in (None, raw["torch_dtype"]):
        yield f"config.json has dtype {_name(config)} and torch_dtype {shown(raw['torch_dtype'])}: dtype counts"
    code = CODES[config.dtype]
    others = [
        name
        for name, spec in inventory.specs.items()
        if spec.kept_dtype is None and source.weights[name].dtype in {"BF16", "F16", "F32"} - {code}
    ]
    if others:
        yield (
            f"{len(others)} tensors are stored in another dtype than config.json's {_name(config)}, first "
            f"{others[0]!r} ({source.weights[others[0]].dtype}): read, and where they stay float written, as stored; "
            "loaders compute in config.json's"
        )


def _quantization(raw: Mapping[str, Any], directory: Path, source: WeightSource) -> Iterator[str]:
    quantization = raw.get("quantization_config")
    stored_fp8 = [name for name, weight in source.weights.items() if weight.dtype == "F8_E4M3"]
    if stored_fp8 and not (isinstance(quantization, Mapping) and quantization.get("weight_block_size")):
        yield (
            f"{len(stored_fp8)} weights are FP8, and config.json has no weight_block_size: they are read in blocks of "
            "128x128, which the shapes of their scales agree with"
        )
    if not quantization:
        return
    method = shown(quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization)
    described = description_path(directory)
    if described is not None:
        yield (
            f"config.json has a quantization_config ({method}) beside {described.name}: the description counts; the "
            "engines would take the other"
        )
    elif not stored_fp8 and not is_compressed(raw):
        yield (f"config.json has a quantization_config ({method}), and no weight is quantized: they are read as stored")


def _rope(raw: Mapping[str, Any]) -> Iterator[str]:
    one, other = raw.get("rope_scaling"), raw.get("rope_parameters")
    if one and other and one != other:
        yield "config.json has rope_scaling and, differently, rope_parameters: rope_scaling counts, as in transformers"
    counts = one or other
    theta = counts.get("rope_theta") if isinstance(counts, Mapping) else None
    if theta is not None and raw.get("rope_theta") not in (None, theta):
        there, beside = shown(theta), shown(raw["rope_theta"])
        yield f"config.json has rope_theta {beside} beside the rope parameters' {there}: theirs counts"


def _groups(raw: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    if config.moe is not None and config.moe.topk_method == "greedy" and (raw.get("n_group") or 1) != 1:
        yield (
            f"config.json has n_group {shown(raw['n_group'])}, and topk_method greedy, which has no groups: the "
            "artifact's config.json has one group, because engines would use them"
        )


def _architectures(raw: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    named = raw.get("architectures")
    if named and named != [config.family.architecture]:
        yield (
            f"config.json has model_type {config.model_type!r}, and architectures {shown(named)}: npuq and "
            "transformers go by the first, engines by the second"
        )


def _end_of_sequence(raw: Mapping[str, Any], directory: Path) -> Iterator[str]:
    if not is_inside(directory, GENERATION_NAME):
        return
    try:
        generation = read_object(inside(directory, GENERATION_NAME), CheckpointError)
    except CheckpointError:
        return  # the readers of this file report it
    ours, theirs = _ids(raw.get("eos_token_id")), _ids(generation.get("eos_token_id"))
    if theirs and not ours <= theirs:
        yield (
            f"config.json ends texts at token {_listed(sorted(ours))}, {GENERATION_NAME} at "
            f"{_listed(sorted(theirs))}: the latter counts, as in transformers"
        )


def _ids(value: Any) -> set[int]:
    return {item for item in (value if isinstance(value, list) else [value]) if type(item) is int}


def _index(checkpoint: Checkpoint, shared: str | None) -> Iterator[str]:
    listed = read_weight_map(checkpoint.directory)
    missing = [name for name in checkpoint.tensors if listed is not None and name not in listed and name != shared]
    if missing:
        yield (
            f"{INDEX_NAME} does not list {len(missing)} tensors that the shards have, first {missing[0]!r}: they "
            "count, as in other loaders"
        )


def _name(config: ModelConfig) -> str:
    return str(config.dtype).removeprefix("torch.")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
