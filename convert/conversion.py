"""`convert_checkpoint`: a checkpoint directory becomes an artifact directory, resumably."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConversionError
from ..quant.artifact import OWN_FOLDER
from ..quant.checkpoint import Checkpoint
from ..quant.side_files import has_tokenizer
from ..torch_threads import single_threaded_torch
from .calibration.memory import calibrated_budget
from .calibration.states import remove_states, state_bytes
from .calibration.walk import CalibratedWalk
from .card import check_base_model
from .finish import finish
from .journal import Journal, Record
from .memory import PLAN_BYTES_PER_JOB, Budget, plan_budget
from .output import Finished, check_separate, claim, describe_state, free_bytes, write_error
from .pipeline import Durability, OnShard, run_plan
from .plan import Plan
from .prepare import CalibrationText, Prepared, prepare
from .progress import Progress, Silent
from .recipe import Target
from .report import totals_by_role
from .rewriting import RewrittenSource
from .shards import ShardFiles, Write

DEFAULT_SHARD_SIZE = 5_000_000_000
# Journal, description, index, card and rope tables: little beside the shards, but not nothing.
_EXTRA_BYTES = 64 << 20


@dataclass(frozen=True)
class Summary:
    """What a conversion did, or with `status` "planned" would do. Bytes, seconds; `jobs_resumed` were done before.

    `memory_bytes` bounds what the workers hold at a time, `plan_bytes` is about what the plan takes beside it.
    """

    status: str  # planned, converted, or finished (it was already)
    output: str
    recipe: str
    jobs: int
    jobs_resumed: int
    tensors: int
    shards: int
    source_bytes: int
    output_bytes: int
    workers: int
    memory_bytes: int
    plan_bytes: int
    disk_bytes_needed: int
    disk_bytes_free: int
    seconds: float
    peak_rss_bytes: int
    notes: tuple[str, ...]
    roles: tuple[Mapping[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Internals:
    """What tests and benchmarks turn: how often to sync, and the call that writes."""

    durability: Durability = field(default_factory=Durability)
    write: Write = os.pwrite


def convert_checkpoint(
    source: str | Path | Checkpoint,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    method: str | None = None,
    calibration: CalibrationText | None = None,
    workers: int | None = None,
    max_memory: int | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    base_model: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    on_shard: OnShard | None = None,
    internals: Internals | None = None,
) -> Summary:
    """Convert a checkpoint directory into an artifact directory; started again after any interruption, it continues.

    `recipe` is a name (w4a8, w8a8, float) or a YAML file. Without one a float checkpoint becomes w4a8, and one that
    ModelSlim or llm-compressor has quantized keeps its codes and scales. `method` replaces its method, and may be a
    chain such as rotate+smooth+gptq; `calibration` is the text that gptq and smooth need (a built-in one by default).
    `max_memory` bounds the working set in bytes beside the interpreter and torch; `max_shard_size` the bytes of each
    output file.
    `base_model` is the source's name on the hub (OWNER/NAME) for the artifact's card, where the source is a directory.
    The artifact does not depend on `workers`, `max_memory` or interruptions, to the byte. `dry_run` writes nothing.

    `source` may also be a checkpoint that is open (one on a hub, say), which is closed at the end. `on_shard` is called
    with the name and sha256 of each output shard whose bytes are final, in the calling thread.

    Raises CheckpointError and RecipeError for bad input, ConversionError when the output belongs to something else, the
    disk refuses, or memory does not suffice.
    """
    opened = source if isinstance(source, Checkpoint) else Path(source)
    output = Path(output)
    progress, internals = progress or Silent(), internals or Internals()
    started = time.monotonic()
    if max_shard_size < 1:
        raise ConversionError(f"--max-shard-size must be positive, not {max_shard_size}")
    check_separate(opened.directory if isinstance(opened, Checkpoint) else opened, output)
    if base_model is not None:
        check_base_model(base_model)
    prepared = replace(prepare(opened, recipe, method, max_shard_size, calibration), base_model=base_model)
    try:
        held = prepared.source.held_bytes if isinstance(prepared.source, RewrittenSource) else 0
        budget = plan_budget(prepared.plan, workers, max_memory, held)
        if prepared.calibration is not None:
            tokens, length = prepared.calibration.tokens.numel(), prepared.calibration.sequence_length
            budget = calibrated_budget(prepared.config, tokens, length, budget, max_memory)
        notes = _notes(prepared)
        if dry_run:
            notes = (*notes, f"output directory: {describe_state(output)}")
            roles = [total.as_dict() for total in totals_by_role(prepared.plan.jobs, {})]
            return _summary("planned", prepared, budget, output, 0, roles, started, notes)
        for note in notes:
            progress.note(note)
        claimed = claim(output, prepared.identity)
        if isinstance(claimed, Finished):
            # A kill between the manifest and their removal leaves hidden states that nothing needs.
            try:
                remove_states(output / OWN_FOLDER)
            except OSError as error:
                raise write_error(output, error) from error
            return _finished(prepared, budget, output, claimed, started, notes)
        try:
            return _run(prepared, budget, output, claimed, internals, progress, on_shard, started, notes)
        finally:
            claimed.close()
    finally:
        prepared.checkpoint.close()


def _run(
    prepared: Prepared,
    budget: Budget,
    output: Path,
    journal: Journal,
    internals: Internals,
    progress: Progress,
    on_shard: OnShard | None,
    started: float,
    notes: tuple[str, ...],
) -> Summary:
    plan, files = prepared.plan, ShardFiles(output, prepared.plan, internals.write)
    _forget_lost_shards(journal.record, files, plan, progress)
    walk = None
    if prepared.calibration is not None:
        walk = CalibratedWalk(prepared, prepared.calibration, files, journal, output, budget, progress)
        walk.forget_unvouched()
    resumed = list(journal.record.jobs)
    _warn_of_space(plan, resumed, output, _extra_bytes(prepared), progress)
    progress.start(plan.source_bytes, sum(plan.jobs[index].source_bytes for index in resumed))
    prepared.source.expect([job.source for job in plan.turns], {plan.jobs[index].source for index in resumed})
    try:
        if walk is not None:
            walk.run()
        run_plan(plan, prepared.source, files, journal, budget, internals.durability, progress, on_shard)
    finally:
        files.close()
    progress.note("shards are written; finishing")
    try:
        # Waking torch's threads takes longer than the rope tables that they would share.
        with single_threaded_torch():
            finish(prepared, output, journal.record)
        journal.path.unlink()
        remove_states(output / OWN_FOLDER)
    except OSError as error:
        raise write_error(output, error) from error
    roles = [total.as_dict() for total in totals_by_role(plan.jobs, journal.record.jobs)]
    return _summary("converted", prepared, budget, output, len(resumed), roles, started, notes)


def _forget_lost_shards(record: Record, files: ShardFiles, plan: Plan, progress: Progress) -> None:
    """Do again what the journal has of shards that are no longer as they were written."""
    for shard in sorted({plan.jobs[index].shard for index in record.jobs}):
        if not files.is_intact(shard):
            progress.note(f"{files.path(shard)}: is gone or changed since the interrupted run; making it again")
            record.hashes.pop(shard, None)
            for index in plan.shards[shard].jobs:
                record.jobs.pop(index, None)


def _extra_bytes(prepared: Prepared) -> int:
    """Disk beside the shards: small files, a download's window, hidden states."""
    extra = _EXTRA_BYTES + prepared.checkpoint.scratch_bytes
    if prepared.calibration is not None:
        extra += state_bytes(prepared.calibration.tokens.numel(), prepared.config.hidden_size)
    return extra


def _warn_of_space(plan: Plan, resumed: Sequence[int], output: Path, extra: int, progress: Progress) -> None:
    needed = plan.output_bytes + extra - sum(plan.jobs[index].output_bytes for index in resumed)
    free = free_bytes(output)
    if free < needed:
        progress.note(
            f"warning: {output} needs about {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free; "
            "when the disk fills up, make room and run the same command: it continues"
        )


def _notes(prepared: Prepared) -> tuple[str, ...]:
    """What a user should know of the checkpoint and the recipe before hours are spent."""
    inventory, notes = prepared.inventory, []
    if prepared.recipe.target is Target.NPUQ:
        notes.append(f"recipe {prepared.recipe.name}: for npuq's own runtime; vLLM-Ascend and SGLang will not load it")
    specs = inventory.specs.values()
    for number, rule in enumerate(prepared.recipe.rules, start=1):
        # The named recipes list roles that not every model has.
        if (rule.names or rule.layers) and not any(map(rule.matches, specs)):
            notes.append(f"recipe {prepared.recipe.name}: rule {number} speaks of no weight of this checkpoint")
    if not any(has_tokenizer(name) for name in prepared.side_files):
        notes.append("the checkpoint has no tokenizer: copy its files into the artifact before anything generates text")
    notes += prepared.statements
    if inventory.unknown:
        notes.append(f"{len(inventory.unknown)} unknown tensors copied as they are, first {inventory.unknown[0]!r}")
    if inventory.dropped:
        notes.append(f"{len(inventory.dropped)} recomputable buffer(s) left out, first {inventory.dropped[0]!r}")
    if inventory.absent_mtp_layers:
        layers = ", ".join(map(str, inventory.absent_mtp_layers))
        notes.append(f"config.json counts MTP layers ({layers}) that the checkpoint does not have")
    return tuple(notes)


def _finished(
    prepared: Prepared, budget: Budget, output: Path, claimed: Finished, started: float, notes: tuple[str, ...]
) -> Summary:
    jobs = len(prepared.plan.jobs)
    return _summary("finished", prepared, budget, output, jobs, claimed.report["roles"], started, notes)


def _summary(
    status: str,
    prepared: Prepared,
    budget: Budget,
    output: Path,
    resumed: int,
    roles: Sequence[Mapping[str, Any]],
    started: float,
    notes: tuple[str, ...],
) -> Summary:
    plan = prepared.plan
    return Summary(
        status=status,
        output=str(output),
        recipe=prepared.recipe.name,
        jobs=len(plan.jobs),
        jobs_resumed=resumed,
        tensors=sum(len(job.outputs) for job in plan.jobs),
        shards=len(plan.shards),
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        workers=budget.workers,
        memory_bytes=budget.nbytes,
        plan_bytes=len(plan.jobs) * PLAN_BYTES_PER_JOB,
        disk_bytes_needed=plan.output_bytes + _extra_bytes(prepared),
        disk_bytes_free=free_bytes(output),
        seconds=time.monotonic() - started,
        # Linux counts in KiB.
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        notes=notes,
        roles=tuple(roles),
    )
