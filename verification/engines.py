"""Stage *engines*: schemes that no engine loads, and the problems of each engine with the others."""

from __future__ import annotations

from collections.abc import Iterator

from ..engines.placement import ENGINES, loading_notes, loading_problems, slow_path_notes
from ..engines.requirements import violations
from ..formats.artifact import DESCRIPTION_NAME, read_description_keys
from ..recipes.recipe import Target
from .subject import Subject


def engine_problems(subject: Subject) -> Iterator[str]:
    """A line for each weight whose scheme a loader would refuse or misread."""
    for violation in violations(subject.specs, subject.schemes.__getitem__, subject.target):
        yield f"{DESCRIPTION_NAME}: {violation}"


def engine_notes(subject: Subject) -> Iterator[str]:
    """A line for each way in which an engine would fail to load all of an artifact that npuq made for engines."""
    if subject.is_own and subject.target is Target.ENGINES:
        keys = read_description_keys(subject.directory)
        for engine in ENGINES:
            yield from loading_problems(engine, subject.checkpoint.config, subject.described, keys)
            yield from loading_notes(engine, subject.config, subject.described)
        yield from slow_path_notes(subject.specs, subject.schemes)
