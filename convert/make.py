"""The work of a conversion, after all decisions: what was done before is checked, shards are made, then the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConversionError
from ..formats.artifact import OWN_FOLDER
from ..formats.checkpoint import JOURNAL_NAME
from ..formats.output_files import write_error
from ..inputs.files import FileStamp
from ..parallel.pool import Pool
from ..parallel.torch_threads import single_threaded_torch
from ..progress import Progress
from .calibrate.states import remove_states
from .finish.finish import finish
from .plan.memory import Budget
from .plan.plan import Job
from .plan.prepare import Prepared
from .ranks.liveness import Pulse
from .ranks.run import Run, last_claims, remove_runs
from .tally import Tally, data_free_effort
from .write.journal import Journal, Record
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
    from ..runtime.ranks.group import Group
    from .calibrate.layer_report import LayerReport
    from .calibrate.walk import CalibratedWalk
    from .ranks.team import Team

# Names of unfinished shards in a message.
_FEW = 8


@dataclass(frozen=True)
class Internals:
    """Settings for tests and benchmarks: intervals between syncs, the call that writes, and the heartbeat of ranks."""

    durability: Durability = field(default_factory=Durability)
    write: Write = os.pwrite
    pulse: Pulse = field(default_factory=Pulse)


@dataclass(frozen=True)
class Made:
    """Shards that are made: the number of jobs that an earlier run did, and calibration's report of each layer."""

    resumed: int
    reports: tuple[LayerReport, ...]


@dataclass(frozen=True)
class Maker:
    """Makes the files of a prepared conversion in a directory."""

    prepared: Prepared
    budget: Budget
    output: Path
    internals: Internals
    progress: Progress

    def shards(
        self,
        journal: Journal,
        numbers: Sequence[int] | None = None,
        on_shard: OnShard | None = None,
        team: Team | None = None,
    ) -> Made:
        """Make some shards (default: all), as far as the journal's record has not. Afterwards the journal has them.

        numbers: those that the journal, one among several, speaks for from then on.
        """
        prepared, plan, record, progress = self.prepared, self.prepared.plan, journal.record, self.progress
        calibration = prepared.calibration
        walk: CalibratedWalk | None = None
        reports: tuple[LayerReport, ...] = ()
        shards = range(len(plan.shards)) if numbers is None else numbers
        turns = plan.turns_of(shards)
        effort: Callable[[Job], float] = data_free_effort
        if calibration is not None:
            from ..runtime.ranks.group import ALONE
            from .calibrate.effort import calibrated_effort
            from .calibrate.walk import CalibratedWalk

            effort = calibrated_effort(prepared)
        tally = Tally(plan, turns, progress, effort)
        files = ShardFiles(self.output, plan, self.internals.write)
        try:
            found = prepared.checkpoint.stamps
            forget_impossible(record, plan)
            forget_lost_shards(record, files, plan, progress)
            if calibration is not None:
                group = ALONE if team is None else team.group
                walk = CalibratedWalk(prepared, calibration, files, journal, self.output, self.budget, tally, group)
                walk.forget_unvouched()
            kept = set() if walk is None else walk.kept_jobs
            if record.jobs:
                with Pool(self.budget.workers) as pool:
                    forget_changed_source(record, prepared.source, plan, found, kept, pool, progress)
                    forget_changed_output(record, files, plan, pool, progress)
            if walk is not None:
                walk.forget_unvouched()
            self._settle(journal, found, () if numbers is None else numbers)
            resumed = list(record.jobs)
            task = tally.task(resumed)
            progress.start(task if team is None or walk is not None else team.whole(task))
            prepared.source.announce([job.source for job in turns], {plan.jobs[index].source for index in resumed})
            if walk is not None:
                reports = walk.run()
                kept = walk.kept_jobs
            durability = self.internals.durability
            run_plan(plan, prepared.source, files, journal, self.budget, durability, tally, on_shard, shards)
            self._refuse_moving_source(journal, found, kept)
        finally:
            files.close()
        return Made(len(resumed), reports)

    def walk_along(self, group: Group) -> None:
        """On a rank but the first: do this rank's part of the calibrated walk of `shards`."""
        from .calibrate.walk import CalibratedWalk

        prepared, calibration = self.prepared, self.prepared.calibration
        assert calibration is not None
        files = ShardFiles(self.output, prepared.plan)
        CalibratedWalk(prepared, calibration, files, None, self.output, self.budget, None, group).run()

    def rest(self, record: Record, reports: Sequence[LayerReport]) -> None:
        """Write every file but the shards; the record has all of these. Then remove what no finished artifact needs."""
        self.progress.note("shards are written; finishing")
        try:
            # Waking torch's threads would take longer than computing the small rope tables alone.
            with single_threaded_torch():
                finish(self.prepared, self.output, record, reports)
        except OSError as error:
            raise write_error(self.output, error) from error
        remove_remains(self.output, self.progress)

    def rest_after_ranks(self, run: Run) -> Record:
        """`rest`, after several ranks have made the shards, by a run that nobody works beside; return their record.

        Raises ConversionError where a rank works still, or a shard is not finished.
        """
        prepared, plan = self.prepared, self.prepared.plan
        run.take_now(range(len(plan.shards)), plan)
        record, files = run.read_earlier(plan), ShardFiles(self.output, plan)
        found, progress = prepared.checkpoint.stamps, self.progress
        forget_impossible(record, plan)
        forget_lost_shards(record, files, plan, progress)
        with Pool(self.budget.workers) as pool:
            forget_changed_source(record, prepared.source, plan, found, (), pool, progress)
        self._refuse_unfinished(record)
        self.rest(record, ())
        return record

    def _refuse_unfinished(self, record: Record) -> None:
        plan = self.prepared.plan
        left = [number for number in range(len(plan.shards)) if number not in record.hashes]
        if not left:
            return
        ranks = last_claims(self.output, left)

        def told(number: int) -> str:
            jobs = plan.shards[number].jobs
            done = sum(index in record.jobs for index in jobs)
            who = f"{ranks[number]} had it last" if number in ranks else "no rank has begun it"
            return f"{plan.shards[number].name} ({done} of {len(jobs)} weights; {who})"

        few = "; ".join(map(told, left[:_FEW])) + (f"; and {len(left) - _FEW} more" if len(left) > _FEW else "")
        raise ConversionError(
            f"{self.output}: {len(left)} of {len(plan.shards)} shards are not finished: {few}. Start those ranks again "
            "(--shard-of), or convert without the option: one process makes what is left"
        )

    def _refuse_moving_source(self, journal: Journal, before: Sequence[FileStamp], kept: Collection[int]) -> None:
        """Raise ConversionError where the source has changed since its weights were read."""
        now, record = stamps_now(self.prepared.checkpoint), journal.record
        if tuple(now) == tuple(before):
            return
        # Compare the files that have these names now, not the open ones.
        self.prepared.checkpoint.close()
        done = len(record.jobs)
        with Pool(self.budget.workers) as pool:
            forget_changed_source(record, self.prepared.source, self.prepared.plan, now, kept, pool, self.progress)
        self._settle(journal, now)
        if len(record.jobs) < done:
            raise ConversionError(
                f"{self.prepared.checkpoint.directory}: {done - len(record.jobs)} of its weights changed while it was "
                "converted; run the same command: it makes these again"
            )

    def _settle(self, journal: Journal, found: Sequence[FileStamp], shards: Sequence[int] = ()) -> None:
        try:
            journal.settle(found, shards)
        except OSError as error:
            raise write_error(journal.path, error) from error


def remove_remains(output: Path, progress: Progress) -> None:
    """Remove the files of an unfinished conversion. The artifact is complete with and without them."""
    try:
        remove_runs(output)
        (output / JOURNAL_NAME).unlink(missing_ok=True)
        remove_states(output / OWN_FOLDER)
    except OSError as error:
        progress.note(f"{error.filename or output}: is not needed any more, and cannot be removed: {error.strerror}")
