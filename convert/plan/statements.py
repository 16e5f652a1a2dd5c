"""Contradictions between two statements of a checkpoint about one thing: a line each, with the statement that counts.

They are decided as transformers and the engines decide them. Statements that neither could read are refused where they
are read (`models/inventory.py`, `models/config.py`, `formats/checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...dtypes import CODES, FLOAT_CODES, torch_name
from ...errors import CheckpointError
from ...formats.artifact import description_path
from ...formats.checkpoint import INDEX_NAME, Checkpoint
from ...formats.sources.fp8 import FP8_CODE, claims_fp8, is_beside_fp8, stated_blocks
from ...formats.sources.grouped_int4 import GROUP, GroupedInt4, claimed_otherwise
from ...formats.sources.ties import tied_names
from ...formats.sources.weights import WeightSource
from ...inputs.files import inside, is_inside
from ...inputs.json_text import read_object
from ...models.config import TEXT_CONFIG, ModelConfig
from ...models.config_reader import shown
from ...models.inventory import Inventory
from ...models.sparse_mla import SparseMla, SparseMlaDefaults
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
    raw, directory = checkpoint.text_config, checkpoint.directory
    return [
        *_read_as(checkpoint, config),
        *_head(raw, config, shared),
        *_tied_at_the_top(checkpoint.config, config),
        *_mtp_layers(config, inventory),
        *_draft_heads(source, heads),
        *_shared_selections(raw, config),
        *_indexer_rope(config),
        *_dtype(raw, config, inventory, source),
        *_quantization(checkpoint, source),
        *_rope(raw),
        *_groups(raw, config),
        *_architectures(checkpoint.config, config),
        *_end_of_sequence(raw, directory),
        *_index(checkpoint, shared),
    ]


def _read_as(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[str]:
    """The reading of an unknown model_type as a family: what engines find in its place, and which defaults count."""
    stated, family = checkpoint.stated, config.family
    if stated is None:
        return
    code = ", and no auto_map, which names code for the source" if "auto_map" in stated else ""
    yield (
        f"config.json has model_type {shown(stated.get('model_type'))} and architectures "
        f"{shown(stated.get('architectures'))}, and is read as {family.model_type}: the artifact's has model_type "
        f"{family.model_type!r} and architectures ['{family.architecture}'], which engines know{code}"
    )
    stated = config.moe_keys()
    taken = [f"{key} {value}" for key, value in stated.items() if checkpoint.text_config.get(key) is None]
    if taken:
        yield f"config.json leaves out keys for which defaults of {family.model_type} count: {', '.join(taken)}"


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


def _tied_at_the_top(raw: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    if config.family.text_types and raw.get("tie_word_embeddings") is True and not config.tie_word_embeddings:
        yield (
            f"config.json ties embedding and head at the top, and {TEXT_CONFIG} does not: {TEXT_CONFIG} counts, and "
            "the artifact's config.json unties them at both places"
        )


def _mtp_layers(config: ModelConfig, inventory: Inventory) -> Iterator[str]:
    first = config.num_hidden_layers
    uncounted = [layer for layer in inventory.mtp_layers if layer >= first + config.num_nextn_predict_layers]
    if uncounted:
        yield (
            f"the checkpoint has MTP layers (layer {_listed(uncounted)}) that config.json does not count "
            f"(num_nextn_predict_layers {config.num_nextn_predict_layers}): the artifact's counts them"
        )
    if inventory.absent_mtp_layers:
        yield (
            f"config.json counts MTP layers that the checkpoint does not have (layer "
            f"{_listed(inventory.absent_mtp_layers)}): the artifact's does not count them"
        )
    if inventory.partial_mtp_layers:
        yield (
            f"layers {_listed(inventory.partial_mtp_layers)} are MTP layers behind a gap, or neither whole nor counted "
            "by config.json: left out, since no loader runs them"
        )


def _shared_selections(raw: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    others = [key for key in ("index_topk_pattern", "index_topk_freq") if raw.get(key) is not None]
    if others and config.attention.stated().get("index_topk_pattern"):
        yield (
            f"config.json has indexer_types and {others[0]}, which name different layers that share a selection: the "
            "list counts, as in transformers; the artifact's index_topk_pattern says the same to vLLM, which reads no "
            "list"
        )


def _indexer_rope(config: ModelConfig) -> Iterator[str]:
    attention, defaults = config.attention, config.family.attention
    if not (isinstance(attention, SparseMla) and isinstance(defaults, SparseMlaDefaults)):
        return
    stated, usual = attention.indexer.rope_interleave, defaults.indexer_rope_interleave
    if stated != usual:
        yield (
            f"config.json has indexer_rope_interleave {shown(stated)}, where {config.family.model_type} has "
            f"{shown(usual)}: npuq and the engines follow config.json; transformers (5.24) ignores the key, and "
            f"selects other tokens in sequences longer than {attention.indexer.topk}"
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
    code = config.dtype_code
    others = [
        name
        for name, spec in inventory.specs.items()
        if spec.kept_dtype is None and source.weights[name].dtype in FLOAT_CODES and source.weights[name].dtype != code
    ]
    if others:
        yield (
            f"{len(others)} tensors are stored in another dtype than config.json's {_name(config)}, first "
            f"{others[0]!r} ({source.weights[others[0]].dtype}): read, and where they stay float written, as stored; "
            "loaders compute in config.json's"
        )


def _quantization(checkpoint: Checkpoint, source: WeightSource) -> Iterator[str]:
    """A line for each claim of quantization_config that the stored tensors deny; the tensors count."""
    claim, described = checkpoint.text_config.get("quantization_config"), description_path(checkpoint.directory)
    yield from _fp8(claim, source)
    yield from _grouped_int4(claim, source)
    if any(name.endswith(".input_scale") and is_beside_fp8(checkpoint.tensors, name) for name in checkpoint.tensors):
        yield "scales of FP8 activations are left out: the artifact's operators quantize activations for each token"
    if not claim:
        return
    method = _method(claim)
    if described is not None:
        yield (
            f"config.json has a quantization_config ({method}) beside {described.name}: the description counts; the "
            "engines would take the other"
        )
    elif not source.is_quantized and all(weight.dtype in CODES for weight in source.weights.values()):
        yield f"config.json has a quantization_config ({method}), and no weight is quantized: they are read as stored"


def _grouped_int4(claim: Any, source: WeightSource) -> Iterator[str]:
    grouped = sum(weight.dtype == GroupedInt4.dtype for weight in source.weights.values())
    otherwise = claimed_otherwise(claim) if grouped else None
    if otherwise is not None:
        yield f"{grouped} weights are stored in int4 groups of {GROUP}, and config.json {otherwise}: storage counts"


def _fp8(claim: Any, source: WeightSource) -> Iterator[str]:
    stored: dict[str, list[str]] = {}
    for name, weight in source.weights.items():
        if weight.dtype.startswith(FP8_CODE):
            stored.setdefault(weight.dtype.removeprefix(FP8_CODE).strip(), []).append(name)
    if not stored:
        return
    counts = ", ".join(f"{len(names)} {form}" for form, names in stored.items())
    if not claim:
        yield f"weights are FP8 ({counts}), and config.json has no quantization_config: they are read as stored"
        return
    if not claims_fp8(claim):
        yield (
            f"weights are FP8 ({counts}), and config.json's quantization_config ({_method(claim)}) says otherwise: "
            "they are read as stored"
        )
        return
    blocks = stated_blocks(claim)
    if not blocks and any("x" in form for form in stored):
        yield (
            f"weights are FP8 ({counts}), and config.json has no weight_block_size: the shapes of their scales tell "
            "the blocks"
        )
    for form, names in stored.items():
        if blocks and "x" not in form:
            yield (
                f"config.json has FP8 blocks of {' or '.join(f'{block[0]}x{block[1]}' for block in blocks)}, and "
                f"{len(names)} weights have scales {form}, first {names[0]!r}: they are read as stored"
            )


def _method(claim: Any) -> str:
    return shown(claim.get("quant_method") if isinstance(claim, Mapping) else claim)


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
    moe = config.moe
    if moe is None:
        return
    if moe.topk_method == "greedy":
        if (raw.get("n_group") or 1) != 1:
            yield (
                f"config.json has n_group {shown(raw['n_group'])}, and topk_method greedy, which has no groups: the "
                "artifact's config.json has one group, because engines would use them"
            )
        return
    for key in ("n_group", "topk_group"):
        if key in raw and raw[key] is None:
            yield f"config.json has {key} null: read as one group of all experts, which the artifact's config.json says"


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
    listed = checkpoint.weight_map
    missing = [name for name in checkpoint.tensors if listed is not None and name not in listed and name != shared]
    if missing:
        yield (
            f"{INDEX_NAME} does not list {len(missing)} tensors that the shards have, first {missing[0]!r}: they "
            "count, as in other loaders"
        )


def _name(config: ModelConfig) -> str:
    return torch_name(config.dtype_code)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
