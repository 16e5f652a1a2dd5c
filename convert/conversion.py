"""`convert_checkpoint`: a checkpoint directory becomes an artifact directory, resumably."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from ..errors import ConversionError, NpuqError
from ..formats.artifact import CARD_NAME
from ..formats.checkpoint import Checkpoint
from ..models.config_reader import shown
from ..progress import Progress, Silent
from ..quant.weight_error import ErrorSums
from .calibrate.settings import CalibrationText
from .finish.card import check_base_model
from .finish.finish import rehearse
from .finish.role_totals import totals_by_role
from .finish.side_files import card_front_matter
from .make import Internals, Maker, remove_remains
from .plan.memory import PLAN_BYTES_PER_JOB, Budget, plan_budget
from .plan.prepare import Prepared, prepare
from .plan.space import Space, plan_space
from .plan.summary import Summary, starting_notes
from .ranks.run import Run, done_so_far
from .ranks.share import Share
from .tally import data_free_effort, data_free_seconds
from .write.journal import Record
from .write.output import Finished, begun_by_several, check_separate, claim, look
from .write.pipeline import OnShard

__all__ = ["DEFAULT_SHARD_SIZE", "Internals", "Part", "convert_checkpoint"]

# What calibrates runs the model, on torch, and so does the network between ranks: only those conversions import it.
if TYPE_CHECKING:
    from .ranks.team import Team

DEFAULT_SHARD_SIZE = 5_000_000_000


class Part(Enum):
    """The part of a conversion that a process does, where it is neither a rank's share nor one of a team."""

    WHOLE = "whole"
    FINISH = "finish"  # the rest, after shares have made all shards


AnyPart: TypeAlias = Union[Part, Share, "Team"]


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
    part: AnyPart = Part.WHOLE,
    ranks: int = 1,
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

    `part` is what this process does of a conversion by several, on one file system and with the same arguments: a
    `Share(rank, size)` of the shards, and after all of them `Part.FINISH`; or with a `Team` what falls to its rank. The
    artifact does not depend on it. One process that does the whole continues what several began, and they what one
    began. A dry run tells of the rank with the most work among `ranks`.

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
            prepared=prepared,
            budget=_budget(prepared, workers, max_memory),
            output=output,
            small_bytes=small_bytes,
            started=started,
            notes=starting_notes(prepared),
            ranks=_ranks(part, ranks),
        )
        if dry_run:
            return run.planned(force)
        shown_at = progress or Silent() if isinstance(part, (Part, Share)) else part.progress
        maker = Maker(prepared, run.budget, output, internals or Internals(), shown_at)
        return run.converted(part, force, maker, on_shard)
    finally:
        prepared.checkpoint.close()


def _ranks(part: AnyPart, planned: int) -> int:
    """The number of ranks that a part is one of, or a plan is for."""
    if isinstance(part, Part):
        return planned
    return part.size if isinstance(part, Share) else part.share.size


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
    ranks: int

    def planned(self, force: bool) -> Summary:
        """Summarize a run without writing anything."""
        roles = self._roles({})
        try:
            found = self._look()
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
            rank=self._rank(record) if self.ranks > 1 else None,
        )

    def converted(self, part: AnyPart, force: bool, maker: Maker, on_shard: OnShard | None) -> Summary:
        """Run the conversion, or the part of it that is this process's; or recognize a finished artifact."""
        progress = maker.progress
        for note in self.notes:
            progress.note(note)
        if self.prepared.calibration is not None and isinstance(part, Share):
            raise ConversionError(
                f"method {self.prepared.recipe.chain} calibrates layer after layer, on all ranks at a time, and a "
                "share of the shards alone cannot: start them with torchrun"
            )
        found = self._look()
        if not isinstance(part, (Part, Share)):
            part.agree(self.prepared.identity | {"output": "finished" if isinstance(found, Finished) else ""})
        if isinstance(found, Finished):
            # A kill after the manifest leaves the files of an unfinished conversion.
            if isinstance(part, (Part, Share)) or part.leads:
                remove_remains(self.output, progress)
            notes = self._finished_notes()
            for note in notes[len(self.notes) :]:
                progress.note(note)
            jobs = len(self.prepared.plan.jobs)
            return self._summary(
                "finished", jobs, found.role_totals["roles"], self._space(None), "finished", notes=notes
            )
        space = self._space(found or Record())
        if part is Part.FINISH:
            if self.prepared.calibration is not None:
                raise ConversionError(
                    f"--finish follows shares of the shards, and method {self.prepared.recipe.chain} has none: give "
                    "the same command without it"
                )
            return self._after_shares(maker, len(self.prepared.plan.jobs), space)
        if not force and not space.suffices:
            raise ConversionError(_too_full(space, self.output))
        if not space.suffices:
            progress.note(f"warning: {space.shortage(self.output)}; when the disk fills up, make room and run again")
        if isinstance(part, Share):
            return self._share(maker, part, space)
        if not isinstance(part, Part):
            return self._together(maker, part, space)
        if begun_by_several(self.output):
            return self._all(maker, space)
        return self._alone(maker, space, on_shard)

    def _look(self) -> Record | Finished | None:
        """The state of the output directory, as `look` finds it; a record of what all its ranks did."""
        found = look(self.output, self.prepared.identity)
        if isinstance(found, Record) and begun_by_several(self.output):
            return done_so_far(self.output, self.prepared.identity, self.prepared.plan)
        return found

    def _alone(self, maker: Maker, space: Space, on_shard: OnShard | None) -> Summary:
        """Convert in this process alone."""
        journal = claim(self.output, self.prepared.identity)
        try:
            made = maker.shards(journal, on_shard=on_shard)
            maker.rest(journal.record, made.reports)
        finally:
            journal.close()
        return self._converted(journal.record, made.resumed, space)

    def _share(self, maker: Maker, share: Share, space: Space, team: Team | None = None) -> Summary:
        """Make a rank's share of the shards."""
        plan = self.prepared.plan
        with Run.begin(self.output, self.prepared.identity, share, maker.internals.pulse) as run:
            if team is not None:
                team.works(run)
            shards = share.shards(plan)
            run.take(shards, plan, maker.progress)
            run.read_earlier(plan)
            made = maker.shards(run.journal, shards, team=team)
        return self._summary("share", made.resumed, self._roles({}), space, "unfinished")

    def _all(self, maker: Maker, space: Space, team: Team | None = None) -> Summary:
        """Make everything, where several may have begun, or help."""
        plan = self.prepared.plan
        with Run.begin(self.output, self.prepared.identity, Share(), maker.internals.pulse) as run:
            if team is not None:
                team.works(run)
            shards = range(len(plan.shards))
            run.take(shards, plan, maker.progress)
            run.read_earlier(plan)
            made = maker.shards(run.journal, shards, team=team)
            maker.rest(run.journal.record, made.reports)
            return self._converted(run.journal.record, made.resumed, space)

    def _after_shares(self, maker: Maker, resumed: int, space: Space) -> Summary:
        """Make of finished shards an artifact."""
        with Run.begin(self.output, self.prepared.identity, Share(), maker.internals.pulse) as run:
            record = maker.rest_after_ranks(run)
        return self._converted(record, resumed, space)

    def _together(self, maker: Maker, team: Team, space: Space) -> Summary:
        """Convert with all ranks of a launch; the last part is rank 0's."""
        if self.prepared.calibration is not None:
            summary = self._walked(maker, team, space)
        else:
            summary = self._share(maker, team.share, space, team)
            team.meet()
            if team.leads:
                summary = self._after_shares(maker, summary.jobs_resumed, space)
        team.part()
        return summary

    def _walked(self, maker: Maker, team: Team, space: Space) -> Summary:
        """Convert with calibration: rank 0 makes all shards, with the help of the others."""
        from .calibrate.devices import result_depends_on

        team.agree({"arithmetic": result_depends_on(self.prepared.device)})
        if team.leads:
            return self._all(maker, space, team)
        maker.walk_along(team.group)
        return self._summary("share", 0, self._roles({}), space, "unfinished")

    def _converted(self, record: Record, resumed: int, space: Space) -> Summary:
        roles = self._roles({index: entry.stats for index, entry in record.jobs.items()})
        return self._summary("converted", resumed, roles, space, "unfinished" if resumed else "new")

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
        return plan_space(self.prepared, self.output, record, self.small_bytes, self.ranks)

    def _roles(self, stats: Mapping[int, ErrorSums]) -> list[Mapping[str, Any]]:
        return [total.as_dict() for total in totals_by_role(self.prepared.plan.jobs, stats)]

    def _expected_seconds(self, record: Record) -> float | None:
        prepared = self.prepared
        if prepared.calibration is None:
            return None
        from .calibrate.devices import arithmetic_on
        from .calibrate.effort import expected_seconds

        return expected_seconds(prepared, arithmetic_on(prepared.device), self.budget.workers, record.jobs)

    def _rank(self, record: Record) -> dict[str, Any]:
        """The work of a rank, of the one with most: shards, bytes, memory and expected seconds."""
        prepared, plan, workers, ranks = self.prepared, self.prepared.plan, self.budget.workers, self.ranks
        memory = self.budget.nbytes + len(plan.jobs) * PLAN_BYTES_PER_JOB
        if prepared.calibration is not None:
            seconds = self._expected_seconds(record) or 0.0
            return {"ranks": ranks, "shards": None, "source_bytes": plan.source_bytes, "memory_bytes": memory} | {
                "expected_seconds": seconds / ranks
            }
        # The costliest shard goes first, and to rank 0: none has more work than one shard beyond another's.
        shares = [Share(rank, ranks).shards(plan) for rank in range(ranks)]
        jobs = [[plan.jobs[index] for number in share for index in plan.shards[number].jobs] for share in shares]
        left = [sum(data_free_effort(job) for job in mine if job.index not in record.jobs) for mine in jobs]
        most = left.index(max(left))
        return {
            "ranks": ranks,
            "shards": len(shares[most]),
            "source_bytes": sum(job.source_bytes for job in jobs[most]),
            "memory_bytes": memory,
            "expected_seconds": data_free_seconds(left[most]) / workers,
        }

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
            rank=None,
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
