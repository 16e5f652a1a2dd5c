"""`convert_checkpoint`: a checkpoint directory becomes an artifact directory, resumably."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConversionError, NpuqError
from ..formats.artifact import CARD_NAME, OWN_FOLDER
from ..formats.checkpoint import JOURNAL_NAME, Checkpoint
from ..formats.output_files import write_error
from ..inputs.files import FileStamp
from ..models.config_reader import shown
from ..parallel.pool import Pool
from ..parallel.torch_threads import single_threaded_torch
from ..progress import Progress, Silent
from ..quant.weight_error import ErrorSums
from .calibrate.settings import CalibrationText
from .calibrate.states import remove_states
from .finish.card import check_base_model
from .finish.finish import finish, rehearse
from .finish.role_totals import totals_by_role
from .finish.side_files import card_front_matter
from .plan.memory import PLAN_BYTES_PER_JOB, Budget, plan_budget
from .plan.plan import Job
from .plan.prepare import Prepared, prepare
from .plan.space import Space, plan_space
from .plan.summary import Summary, starting_notes
from .tally import Tally, data_free_effort
from .write.journal import Journal, Record
from .write.output import Finished, check_separate, claim, look
from .write.pipeline import Durability, OnShard, run_plan
from .write.resume import (
    forget_changed_output,
    forget_changed_source,
    forget_impossible,
    forget_lost_shards,
    stamps_now,
)
from .write.shards import ShardFiles, Write

# The walk runs the model, on torch: only conversions that calibrate import it.
if TYPE_CHECKING:
    from .calibrate.layer_report import LayerReport
    from .calibrate.walk import CalibratedWalk

DEFAULT_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class Internals:
    """Settings for tests and benchmarks: intervals between syncs, and the call that writes."""

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
    family: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    on_shard: OnShard | None = None,
    internals: Internals | None = None,
) -> Summary:
    """Convert a checkpoint directory into an artifact directory; started again after any interruption, it continues.

    `recipe` is a name (w4a8, w8a8, float) or a YAML file. Without one a float checkpoint becomes w4a8, and a checkpoint
    quantized by ModelSlim or llm-compressor keeps its codes and scales. `method` replaces the recipe's method, and may
    be a chain such as rotate+smooth+gptq; `calibration` is the text that gptq and smooth need (a built-in one by
    default). `max_memory` bounds the working set in bytes beside the interpreter and torch; `max_shard_size` the bytes
    of each output file. `base_model` is the source's name on the hub (OWNER/NAME) for the artifact's card, where the
    source is a directory. `family` names a family of models (deepseek_v3, say): a source whose config.json has an
    unknown model_type is read as one of it. The artifact does not depend on `workers`, `max_memory` or interruptions,
    to the byte. `dry_run` writes nothing; the summary's `refusal` gives the reason why a run would refuse the output
    directory or the disk. `force` starts although the disk has too little room.

    `source` may also be an open checkpoint (one on a hub, say), which is closed at the end. `on_shard` is called in the
    calling thread with the name and sha256 of each output shard whose bytes are final.

    Raises CheckpointError and RecipeError for bad input, ConversionError when the output belongs to something else, the
    disk has too little room or refuses, or memory does not suffice.
    """
    opened = source if isinstance(source, Checkpoint) else Path(source)
    output = Path(output)
    if max_shard_size < 1:
        raise ConversionError(f"--max-shard-size must be positive, not {max_shard_size}")
    check_separate(opened.directory if isinstance(opened, Checkpoint) else opened, output)
    if base_model is not None:
        check_base_model(base_model)
    started = time.monotonic()
    prepared = replace(prepare(opened, recipe, method, max_shard_size, calibration, family), base_model=base_model)
    try:
        small_bytes = rehearse(prepared)
        run = _Conversion(
            prepared, _budget(prepared, workers, max_memory), output, small_bytes, started, starting_notes(prepared)
        )
        if dry_run:
            return run.planned(force)
        return run.converted(force, progress or Silent(), on_shard, internals or Internals())
    finally:
        prepared.checkpoint.close()


def _budget(prepared: Prepared, workers: int | None, max_memory: int | None) -> Budget:
    budget = plan_budget(prepared.plan, workers, max_memory, prepared.source.held_bytes)
    if prepared.calibration is None:
        return budget
    from .calibrate.memory import calibrated_budget

    tokens, length = prepared.calibration.tokens.numel(), prepared.calibration.sequence_length
    return calibrated_budget(prepared.config, tokens, length, budget, max_memory)


@dataclass(frozen=True)
class _Conversion:
    """A conversion after all decisions, before its work."""

    prepared: Prepared
    budget: Budget
    output: Path
    small_bytes: int
    started: float
    notes: tuple[str, ...]

    def planned(self, force: bool) -> Summary:
        """Summarize a run without writing anything."""
        roles = self._roles({})
        try:
            found = look(self.output, self.prepared.identity)
        except NpuqError as error:
            return self._summary("planned", 0, roles, self._space(Record()), "refused", str(error))
        if isinstance(found, Finished):
            notes = self._finished_notes()
            return self._summary("planned", 0, roles, self._space(None), "finished", notes=notes)
        state, record = ("new", Record()) if found is None else ("unfinished", found)
        space, refusal = self._space(record), None
        if not force and not space.suffices:
            refusal = _too_full(space, self.output)
        return replace(
            self._summary("planned", len(record.jobs), roles, space, state, refusal),
            expected_seconds=self._expected_seconds(record),
        )

    def converted(self, force: bool, progress: Progress, on_shard: OnShard | None, internals: Internals) -> Summary:
        """Run the conversion, or recognize a finished artifact."""
        for note in self.notes:
            progress.note(note)
        found = look(self.output, self.prepared.identity)
        if isinstance(found, Finished):
            # A kill after the manifest leaves the files of an unfinished conversion.
            _remove_remains(self.output, progress)
            notes = self._finished_notes()
            for note in notes[len(self.notes) :]:
                progress.note(note)
            jobs = len(self.prepared.plan.jobs)
            return self._summary(
                "finished", jobs, found.role_totals["roles"], self._space(None), "finished", notes=notes
            )
        space = self._space(found or Record())
        if not force and not space.suffices:
            raise ConversionError(_too_full(space, self.output))
        if not space.suffices:
            progress.note(f"warning: {space.shortage(self.output)}; when the disk fills up, make room and run again")
        journal = claim(self.output, self.prepared.identity)
        try:
            return self._run(journal, space, internals, progress, on_shard)
        finally:
            journal.close()

    def _run(
        self, journal: Journal, space: Space, internals: Internals, progress: Progress, on_shard: OnShard | None
    ) -> Summary:
        prepared, plan, record = self.prepared, self.prepared.plan, journal.record
        calibration = prepared.calibration
        walk: CalibratedWalk | None = None
        reports: tuple[LayerReport, ...] = ()
        effort: Callable[[Job], float] = data_free_effort
        if calibration is not None:
            from .calibrate.effort import calibrated_effort
            from .calibrate.walk import CalibratedWalk

            effort = calibrated_effort(prepared)
        tally = Tally(plan, progress, effort)
        files = ShardFiles(self.output, plan, internals.write)
        try:
            found = prepared.checkpoint.stamps
            forget_impossible(record, plan)
            forget_lost_shards(record, files, plan, progress)
            if calibration is not None:
                walk = CalibratedWalk(prepared, calibration, files, journal, self.output, self.budget, tally)
                walk.forget_unvouched()
            kept = set() if walk is None else walk.kept_jobs
            if record.jobs:
                with Pool(self.budget.workers) as pool:
                    forget_changed_source(record, prepared.source, plan, found, kept, pool, progress)
                    forget_changed_output(record, files, plan, pool, progress)
            if walk is not None:
                walk.forget_unvouched()
            _settle(journal, found)
            resumed = list(record.jobs)
            tally.start(resumed)
            prepared.source.announce([job.source for job in plan.turns], {plan.jobs[index].source for index in resumed})
            if walk is not None:
                reports = walk.run()
                kept = walk.kept_jobs
            run_plan(plan, prepared.source, files, journal, self.budget, internals.durability, tally, on_shard)
            self._refuse_moving_source(journal, found, kept, progress)
        finally:
            files.close()
        progress.note("shards are written; finishing")
        try:
            # Waking torch's threads would take longer than computing the small rope tables alone.
            with single_threaded_torch():
                finish(prepared, self.output, record, reports)
        except OSError as error:
            raise write_error(self.output, error) from error
        _remove_remains(self.output, progress)
        roles = self._roles({index: entry.stats for index, entry in record.jobs.items()})
        return self._summary("converted", len(resumed), roles, space, "unfinished" if resumed else "new")

    def _refuse_moving_source(
        self, journal: Journal, before: Sequence[FileStamp], kept: Collection[int], progress: Progress
    ) -> None:
        """Raise ConversionError where the source has changed since its weights were read."""
        now, record = stamps_now(self.prepared.checkpoint), journal.record
        if tuple(now) == tuple(before):
            return
        # Compare the files that have these names now, not the open ones.
        self.prepared.checkpoint.close()
        done = len(record.jobs)
        with Pool(self.budget.workers) as pool:
            forget_changed_source(record, self.prepared.source, self.prepared.plan, now, kept, pool, progress)
        _settle(journal, now)
        if len(record.jobs) < done:
            raise ConversionError(
                f"{self.prepared.checkpoint.directory}: {done - len(record.jobs)} of its weights changed while it was "
                "converted; run the same command: it makes these again"
            )

    def _finished_notes(self) -> tuple[str, ...]:
        """Notes for the user on a finished artifact: its card stays as it is."""
        wanted = self.prepared.base_model
        named = card_front_matter(self.output).get("base_model")
        if wanted is None or named == wanted:
            return self.notes
        now = "no base_model" if named is None else f"base_model {shown(named)}"
        return (
            *self.notes,
            f"{self.output / CARD_NAME}: the artifact is finished, and its card keeps {now}: write "
            f"'base_model: {wanted}' there, between the first two lines ---",
        )

    def _space(self, record: Record | None) -> Space:
        """The disk space beside a record of finished jobs; None: every job is finished."""
        return plan_space(self.prepared, self.output, record, self.small_bytes)

    def _roles(self, stats: Mapping[int, ErrorSums]) -> list[Mapping[str, Any]]:
        return [total.as_dict() for total in totals_by_role(self.prepared.plan.jobs, stats)]

    def _expected_seconds(self, record: Record) -> float | None:
        prepared = self.prepared
        if prepared.calibration is None:
            return None
        from .calibrate.devices import arithmetic_on
        from .calibrate.effort import expected_seconds

        return expected_seconds(prepared, arithmetic_on(prepared.device), self.budget.workers, record.jobs)

    def _summary(
        self,
        status: str,
        resumed: int,
        roles: Sequence[Mapping[str, Any]],
        space: Space,
        output_state: str,
        refusal: str | None = None,
        notes: tuple[str, ...] | None = None,
    ) -> Summary:
        plan = self.prepared.plan
        return Summary(
            status=status,
            output=str(self.output),
            recipe=self.prepared.recipe.name,
            jobs=len(plan.jobs),
            jobs_resumed=resumed,
            tensors=sum(len(job.outputs) for job in plan.jobs),
            shards=len(plan.shards),
            source_bytes=plan.source_bytes,
            output_bytes=plan.output_bytes,
            workers=self.budget.workers,
            memory_bytes=self.budget.nbytes,
            plan_bytes=len(plan.jobs) * PLAN_BYTES_PER_JOB,
            needed_disk_bytes=space.needed,
            missing_disk_bytes=space.missing,
            free_disk_bytes=space.free,
            seconds=time.monotonic() - self.started,
            expected_seconds=None,
            # Linux counts in KiB.
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            notes=self.notes if notes is None else notes,
            roles=tuple(roles),
            output_state=output_state,
            refusal=refusal,
        )


def _too_full(space: Space, output: Path) -> str:
    """The reason why a conversion does not start, and the remedy."""
    return (
        f"{space.shortage(output)}: make room, choose another disk, or start all the same with --force (when the disk "
        "fills up, make room and run the same command: it continues)"
    )


def _settle(journal: Journal, found: Sequence[FileStamp]) -> None:
    try:
        journal.settle(found)
    except OSError as error:
        raise write_error(journal.path, error) from error


def _remove_remains(output: Path, progress: Progress) -> None:
    """Remove the files of an unfinished conversion. The artifact is complete with and without them."""
    try:
        (output / JOURNAL_NAME).unlink(missing_ok=True)
        remove_states(output / OWN_FOLDER)
    except OSError as error:
        progress.note(f"{error.filename or output}: is not needed any more, and cannot be removed: {error.strerror}")
