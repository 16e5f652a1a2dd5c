"""The run of one process among several that make an artifact: its journal, its claims, and what runs before it left.

All is in npuq/ranks/ of the output: a journal for each run, new at each start, and the claims. A journal has one
writer, so that no file system has to add to a file from two machines. For each shard one journal speaks: that of the
last claim whose run has written down so. It did so after it had checked, and taken over, what the one before it said.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from ...errors import ConversionError
from ...formats.artifact import MANIFEST_NAME, OWN_FOLDER
from ...formats.checkpoint import JOURNAL_NAME
from ...formats.output_files import make_folder, new_file, refuse_link, sync_directory, write_error
from ...parallel.threads import start_all
from ...progress import Progress
from ..plan.plan import Plan
from ..write.journal import Journal, Record
from ..write.output import CLAIMS_FOLDER, RUNS_FOLDER, begun_by_several, refuse_difference
from .claims import RUN_NAME, Claims
from .holder import Holder
from .liveness import Heartbeat, Pulse, State, Watch
from .share import Share

# No file system lacks these for files, but some lack links.
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class Run:
    """This process at work in `output`. Make it with `begin`; a context manager that ends it.

    Raises ConversionError where the file system refuses.
    """

    def __init__(self, output: Path, journal: Journal, pulse: Pulse):
        self.journal = journal
        self._output, self._pulse = output, pulse
        self._folder = output / RUNS_FOLDER
        self._claims = Claims(output / CLAIMS_FOLDER)
        self._watch = Watch(self._folder, journal.touch, pulse)
        self._mine: dict[int, int] = {}  # shard → number of the claim
        self._heartbeat = Heartbeat(self._beat, pulse)

    @classmethod
    def begin(cls, output: Path, identity: Mapping[str, str], share: Share, pulse: Pulse | None = None) -> Run:
        """Start a run. Raises ConversionError for another conversion's directory, and while one process converts into
        it alone."""
        name = f"{share.rank}-of-{share.size}-{secrets.token_hex(8)}.jsonl"
        folder = output / RUNS_FOLDER
        try:
            for each in (output / OWN_FOLDER, folder, output / CLAIMS_FOLDER):
                make_folder(each)
            _mark(output, identity, name)
            beginning, _ = Journal.look(output / JOURNAL_NAME)
            refuse_difference(output, beginning.identity, identity)
            journal = Journal.create(folder / name, identity, Holder.here(share).as_json())
        except OSError as error:
            raise _error(output, error) from error
        run = cls(output, journal, pulse or Pulse())
        try:
            start_all([run._heartbeat.thread])
        except BaseException:
            journal.close()
            raise
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        self.journal.close()

    def end(self) -> None:
        """Give all shards back. Whatever happens, no line of the journal follows."""
        self._heartbeat.stop()
        with suppress(OSError, ConversionError):
            self.journal.end()
        self.journal.refuse(ConversionError(f"{self.journal.path}: has ended"))

    def take(self, shards: Iterable[int], plan: Plan, progress: Progress) -> None:
        """Claim shards; wait for each while another run has it."""
        for shard in sorted(shards):  # in one order: of two runs, none waits for what the other will not give back
            said = False
            while (state := self._try(shard)) is not None:
                if not said:
                    progress.note(self._held(plan.shards[shard].name, state))
                    said = True
                time.sleep(min(1.0, self._pulse.beat / 4))

    def take_now(self, shards: Iterable[int], plan: Plan) -> None:
        """Claim shards. Raises ConversionError for one that another run has."""
        for shard in sorted(shards):
            if (state := self._try(shard)) is not None:
                raise ConversionError(f"{self._held(plan.shards[shard].name, state)}, and run this again")

    def read_earlier(self, plan: Plan) -> Record:
        """Read into the record of this run's journal what earlier ones did of the claimed shards; return it.

        The journal itself has it, and speaks for these shards, once it is settled.
        """
        try:
            found = _spoken(self._output, self._claims, self.journal.identity, plan, sorted(self._mine), self._mine)
        except OSError as error:
            raise _error(self._output, error) from error
        self.journal.record = _joined(found)
        return self.journal.record

    def _try(self, shard: int) -> State | None:
        """Claim a shard; the state of the run that has it, or None."""
        try:
            number, run = self._claims.newest(shard, self._claims.all().get(shard, {}))
            state = self._watch.state(run)
            if not state.over:
                return state
            if not self._claims.take(shard, number + 1, self.journal.path.name):
                return State(over=False)  # another was faster
        except OSError as error:
            raise _error(self._output, error) from error
        self._mine[shard] = number + 1
        return None

    def _held(self, name: str, state: State) -> str:
        who = "another process" if state.holder is None else str(state.holder)
        seen = ""
        if state.age:
            seen = (
                f", whose last sign of life is {state.age:.0f} s old; without any for {self._pulse.silent:.0f} s, it "
                "counts as dead"
            )
        return f"{self._output}: {name} is being made by {who}{seen}: wait for it, or end it"

    def _beat(self) -> None:
        self.journal.touch()
        for shard, number in dict(self._mine).items():
            if self._claims.newest(shard, {number: None})[0] != number:
                self.journal.refuse(
                    ConversionError(
                        f"{self._output}: this process stood still for so long that another took over its shards; it "
                        "ends, and nothing is lost"
                    )
                )


def done_so_far(output: Path, identity: Mapping[str, str], plan: Plan) -> Record:
    """What all runs have done together. Changes nothing. Raises ConversionError."""
    try:
        claims = Claims(output / CLAIMS_FOLDER)
        return _joined(_spoken(output, claims, identity, plan, range(len(plan.shards)), {}))
    except OSError as error:
        raise _error(output, error) from error


def last_claims(output: Path, shards: Sequence[int]) -> dict[int, Share]:
    """The ranks that last claimed each of some shards, where any among several did."""
    found = {}
    for shard, claims in Claims(output / CLAIMS_FOLDER).all().items():
        runs = [RUN_NAME.fullmatch(name) for _, name in sorted(claims.items()) if name is not None]
        shares = [Share(int(run[1]), int(run[2])) for run in runs if run is not None]
        # One process alone claims all shards to finish them.
        if shard in shards and (several := [share for share in shares if share.size > 1]):
            found[shard] = several[-1]
    return found


def remove_runs(output: Path) -> None:
    """Remove the journals and claims of all runs, and their folder unless it holds another file. Raises OSError."""
    folder = output / RUNS_FOLDER
    for each in (folder, output / CLAIMS_FOLDER):
        refuse_link(each)
    if not begun_by_several(output):
        return
    for shard, claims in Claims(output / CLAIMS_FOLDER).all().items():
        for number in claims:
            with suppress(FileNotFoundError, IsADirectoryError):
                (output / CLAIMS_FOLDER / f"{shard}.{number}").unlink()
    for path in folder.iterdir():
        if RUN_NAME.fullmatch(path.name.removesuffix(".partial")):
            with suppress(FileNotFoundError, IsADirectoryError):
                path.unlink()
    for each in (output / CLAIMS_FOLDER, folder):
        with suppress(OSError):
            each.rmdir()


def _spoken(
    output: Path,
    claims: Claims,
    identity: Mapping[str, str],
    plan: Plan,
    shards: Iterable[int],
    mine: Mapping[int, int],
) -> list[Record]:
    """The records that speak for some shards, each with their jobs and hashes only. mine: the numbers of this run's
    claims; those before them count."""
    found = claims.all()
    journals: dict[str, Record] = {}

    def journal(name: str) -> Record:
        if name not in journals:
            journals[name] = _read(output / RUNS_FOLDER / name, identity)
        return journals[name]

    spoken: dict[str, Record] = {}
    _, alone = Journal.look(output / JOURNAL_NAME)  # of one process, before there were several
    for shard in shards:
        known = found.get(shard, {})
        if shard in mine:  # a listing may be old: these are looked up by name
            known = {number: claims.run(shard, number) for number in range(1, mine[shard])}
        names = [known[number] for number in sorted(known, reverse=True)]
        speaker = next((name for name in names if name is not None and shard in journal(name).shards), None)
        record = alone if speaker is None else journal(speaker)
        part = spoken.setdefault(speaker or "", Record(sources=record.sources))
        part.jobs |= {index: record.jobs[index] for index in plan.shards[shard].jobs if index in record.jobs}
        part.hashes |= {shard: record.hashes[shard]} if shard in record.hashes else {}
    return list(spoken.values())


def _joined(records: Sequence[Record]) -> Record:
    """The content of several records about different shards. Their source's stamps are unknown where they differ."""
    stamps = {record.sources for record in records if record.jobs}
    whole = Record(sources=stamps.pop() if len(stamps) == 1 else ())
    for record in records:
        whole.jobs.update(record.jobs)
        whole.hashes.update(record.hashes)
    return whole


def _read(path: Path, identity: Mapping[str, str]) -> Record:
    """The record of a run; an empty one of a journal that is lost, damaged or of another conversion."""
    try:
        beginning, record = Journal.look(path)
    except (FileNotFoundError, ConversionError):
        return Record()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link
            return Record()
        raise
    return record if beginning.identity == identity else Record()


def _mark(output: Path, identity: Mapping[str, str], name: str) -> None:
    """Mark the directory as this conversion's, where nothing does yet: of runs that start at once, one does."""
    mark = output / JOURNAL_NAME
    if os.path.lexists(mark):
        return
    partial = output / RUNS_FOLDER / f"{name}.partial"
    try:
        with new_file(partial) as file:
            file.write(Journal.first_line(identity))
        try:
            os.link(partial, mark)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            partial.replace(mark)
        sync_directory(mark.parent)
    finally:
        partial.unlink(missing_ok=True)


def _error(output: Path, error: OSError) -> ConversionError:
    if isinstance(error, FileNotFoundError) and (output / MANIFEST_NAME).exists():
        return ConversionError(f"{output}: was finished by another process meanwhile: nothing is left to do")
    return write_error(output, error)
