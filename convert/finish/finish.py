"""The last step: every file that is not a shard, and last the manifest, which makes a directory an artifact.

Every file is written whole and synced before the manifest appears, and every step gives the same bytes when repeated: a
kill anywhere in here costs the time of these few files. `rehearse` makes all of them before the work begins, from
everything known by then, so that no content of a source can make the first failure come at the end.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...engines.loader_config import loader_config
from ...engines.requirements import config_schemes
from ...engines.serving import serving_ranks
from ...errors import CheckpointError, ConversionError
from ...formats.artifact import (
    CARD_NAME,
    DESCRIPTION_NAME,
    FORMAT_VERSION,
    KV_CACHE_NAME,
    MANIFEST_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    ROPE_NAME,
    artifact_config,
    description,
)
from ...formats.checkpoint import CONFIG_NAME, INDEX_NAME
from ...formats.json_text import json_pieces
from ...formats.kv_cache import save_scales
from ...formats.output_files import PARTIAL_NAME, publish, write_file
from ...formats.rope_file import save_rope
from ...formats.schemes import Scheme
from ...inputs.files import file_sha256, inside, open_file
from ...models.recognition import type_as_text
from ...models.rope import rope_tables
from ...quant.weight_error import ErrorSums
from ...recipes.recipe import STORED
from ..calibrate.layer_report import LayerReport
from ..plan.plan import Job, Plan
from ..plan.prepare import Prepared
from ..write.journal import Record
from .card import model_card
from .fp4_error import fp4_error
from .role_totals import totals_by_role
from .side_files import card_front_matter, copy_side_files

if TYPE_CHECKING:
    from torch import Tensor


def rehearse(prepared: Prepared) -> int:
    """Make every file that `finish` will write, as far as its content is known, and discard it; return their size in
    bytes.

    Raises CheckpointError, before the work, for content that could not be written after it.
    """
    source, nbytes = prepared.checkpoint.directory, prepared.rope_bytes
    for name in prepared.side_files:
        descriptor = open_file(inside(source, name), CheckpointError)
        nbytes += os.fstat(descriptor).st_size
        os.close(descriptor)
    unknown = dict.fromkeys(range(len(prepared.plan.jobs)), ErrorSums(0.0, 0.0))
    files = {shard.name: {"size": shard.nbytes, "sha256": "0" * 64} for shard in prepared.plan.shards}
    files |= {name: {"size": 0, "sha256": "0" * 64} for name in (*prepared.side_files, RECIPE_NAME)}
    try:
        texts = (content for _, content in _texts(prepared, unknown))
        for content in chain(texts, [json_pieces(_manifest(prepared, files, unknown, ()))]):
            nbytes += sum(len(piece.encode()) for piece in content)
    except UnicodeEncodeError as error:
        text = error.object[max(0, error.start - 30) : error.end]
        raise CheckpointError(
            f"{source}: names or config.json hold {text!a}, half a surrogate pair, which no file of the artifact can "
            "hold; repair it"
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{source}: config.json is nested too deeply to be written again") from error
    return nbytes


def finish(prepared: Prepared, output: Path, record: Record, reports: Sequence[LayerReport]) -> None:
    """Write every file but the shards.

    `record` has the entry of every job and the hash of every shard, `reports` the measurements of calibration in each
    decoder layer. Raises OSError when the disk refuses; calling it again starts over.
    """
    stats = {index: entry.stats for index, entry in record.jobs.items()}
    copy_side_files(prepared.checkpoint.directory, output, list(prepared.side_files))
    small = list(prepared.side_files)
    if prepared.config.rope_pairs:
        _write_rope(prepared, output)
        small.append(ROPE_NAME)
    scales = [report.kv_cache.scale for report in reports if report.kv_cache is not None]
    if scales:
        _write_kv_cache_scales(scales, output)
        small.append(KV_CACHE_NAME)
    for name, content in _texts(prepared, stats):
        write_file(output, name, "".join(content).encode())
        if name != CARD_NAME:
            small.append(name)
    shards = enumerate(prepared.plan.shards)
    files = {shard.name: {"size": shard.nbytes, "sha256": record.hashes[number]} for number, shard in shards}
    files |= {name: _measured(output / name) for name in small}
    write_file(output, MANIFEST_NAME, "".join(json_pieces(_manifest(prepared, files, stats, reports))).encode())


def _measured(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path, ConversionError)}


def _texts(prepared: Prepared, stats: Mapping[int, ErrorSums]) -> Iterator[tuple[str, Iterable[str]]]:
    """The name and content, in pieces, of every text file but the manifest; each is made when asked for."""
    plan, recipe = prepared.plan, prepared.recipe
    totals = totals_by_role(plan.jobs, stats)
    report = {
        "recipe": recipe.name,
        "method": STORED if recipe.stored else recipe.chain,
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "copied_unknown_tensors": list(prepared.inventory.unknown),
        "dropped_tensors": list(prepared.inventory.dropped),
        "absent_mtp_layers": list(prepared.inventory.absent_mtp_layers),
        "roles": [total.as_dict() for total in totals],
    }
    front_matter = card_front_matter(prepared.checkpoint.directory)
    ranks = serving_ranks(prepared.config, _types(plan), plan.output_bytes)
    card = model_card(
        prepared.origin,
        recipe,
        totals,
        prepared.inventory.mtp_layers,
        front_matter,
        ranks,
        prepared.config.family.architecture,
        prepared.base_model,
        prepared.calibration,
    )
    yield RECIPE_NAME, [recipe.to_yaml()]
    yield REPORT_NAME, json_pieces(report)
    yield CARD_NAME, [card]
    yield INDEX_NAME, json_pieces(_index(plan))
    yield DESCRIPTION_NAME, json_pieces(description(_types(plan)))
    # Last of the texts: without config.json no loader takes the directory for a model.
    yield CONFIG_NAME, json_pieces(_config(prepared))


def _write_rope(prepared: Prepared, output: Path) -> None:
    partial = output / PARTIAL_NAME
    save_rope(rope_tables(prepared.config), partial)
    publish(partial, output / ROPE_NAME)


def _write_kv_cache_scales(scales: Sequence[Tensor], output: Path) -> None:
    partial = output / PARTIAL_NAME
    save_scales(scales, partial)
    publish(partial, output / KV_CACHE_NAME)


def _index(plan: Plan) -> dict[str, Any]:
    slots = [slot for job in plan.jobs for slot in job.outputs]
    return {
        "metadata": {"total_size": sum(slot.nbytes for slot in slots)},
        "weight_map": {slot.name: plan.shards[slot.shard].name for slot in slots},
    }


def _types(plan: Plan) -> dict[str, Scheme]:
    return {slot.name: job.scheme for job in plan.jobs for slot in job.outputs}


def _config(prepared: Prepared) -> dict[str, Any]:
    schemes, source = {job.source: job.scheme for job in prepared.plan.jobs}, prepared.checkpoint.config
    config = loader_config(source, prepared.config, prepared.inventory.mtp_layers)
    return artifact_config(config, **config_schemes(prepared.inventory.specs.values(), schemes))


def _manifest(
    prepared: Prepared,
    files: Mapping[str, Mapping[str, Any]],
    stats: Mapping[int, ErrorSums],
    reports: Sequence[LayerReport],
) -> dict[str, Any]:
    plan, config = prepared.plan, prepared.config
    stored = prepared.recipe.stored
    output_errors = {name: error for report in reports for name, error in report.linear_errors.items()}
    linears = {
        job.source: _linear(job, stats[job.index], stored, output_errors.get(job.source))
        for job in plan.jobs
        if job.scheme is not Scheme.FLOAT
    }
    origin = prepared.origin
    return {
        "format_version": FORMAT_VERSION,
        "npuq_version": __version__,
        "source": {
            "name": origin.name,
            "repo": origin.repo,
            "revision": origin.revision,
            "config_sha256": origin.config_sha256,
            "index_sha256": origin.index_sha256,
            **_stated_type(prepared),
            # The number of weights in each form of storage, and what was said about the source before the work.
            "forms": dict(Counter(weight.dtype for weight in prepared.source.weights.values())),
            "notes": list(prepared.statements),
            **fp4_error(prepared),
        },
        "architecture": {
            "model_type": config.model_type,
            "hidden_size": config.hidden_size,
            "moe_intermediate_size": 0 if config.moe is None else config.moe.moe_intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "n_routed_experts": config.n_routed_experts,
            "mtp_layers": list(prepared.inventory.mtp_layers),
        },
        "recipe": {"name": prepared.recipe.name, "sha256": files[RECIPE_NAME]["sha256"]},
        "conversion": prepared.identity,
        "totals": {
            "tensors": sum(len(job.outputs) for job in plan.jobs),
            "quantized_linears": len(linears),
            "source_bytes": plan.source_bytes,
            "output_bytes": plan.output_bytes,
        },
        "files": dict(sorted(files.items())),
        "linears": linears,
        # Rotation and smoothing: the weights are no longer the source's, though the model's function is the same.
        "transforms": [str(transform) for transform in prepared.recipe.transforms],
        **_calibration(prepared, reports),
    }


def _stated_type(prepared: Prepared) -> dict[str, Any]:
    """The source's own model_type, where the user told to read it as a family; loaders of the source look here."""
    stated = prepared.checkpoint.stated
    return {} if stated is None else {"model_type": type_as_text(stated)}


def _calibration(prepared: Prepared, reports: Sequence[LayerReport]) -> dict[str, Any]:
    """The calibration text, and the measurements on it in every layer; empty without calibration."""
    calibration = prepared.calibration
    if calibration is None:
        return {}
    return {
        "calibration": {
            "name": calibration.name,
            "sha256": calibration.sha256,
            "samples": calibration.samples,
            "sequence_length": calibration.sequence_length,
            "tokens": calibration.tokens.numel(),
            "layers": {str(layer): report.manifest_entry() for layer, report in enumerate(reports)},
        }
    }


def _linear(job: Job, stats: ErrorSums, stored: bool, output_error: float | None) -> dict[str, Any]:
    entry = {
        "scheme": job.scheme.value,
        "method": STORED if stored else job.method.value,
        "relative_error": stats.relative_error,
        "source_bytes": job.source_bytes,
        "bytes": job.output_bytes,
    }
    return entry if output_error is None else {**entry, "output_error": output_error}
