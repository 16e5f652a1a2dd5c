"""The summary of a conversion, done or planned, and notes before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...formats.schemes import Scheme
from ...native.library import description, library
from ...recipes.recipe import Target
from ...runtime.text.tokenizer_check import tokenizer_problem
from .prepare import Prepared


@dataclass(frozen=True)
class Summary:
    """The result of a conversion, or of its plan where `status` is "planned". Sizes in bytes, times in seconds.

    `jobs_resumed` were done by an earlier run. `memory_bytes` bounds the working set of the workers, `plan_bytes`
    estimates the plan beside it. `expected_seconds` estimates the rest of a planned conversion that calibrates; else
    None. `needed_disk_bytes` is the whole artifact's, `missing_disk_bytes` the part not written yet. `rank` tells, of a
    conversion planned for several ranks, what the one with the most work has: `ranks`, `shards` (None where all share
    each), `source_bytes`, `memory_bytes`, `expected_seconds`. `refusal` is the reason why a run would not start; None
    where it would.
    """

    status: str  # planned, converted, share (of the shards is made), or finished (by an earlier run)
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
    needed_disk_bytes: int
    missing_disk_bytes: int
    free_disk_bytes: int
    seconds: float
    expected_seconds: float | None
    rank: Mapping[str, Any] | None
    peak_rss_bytes: int
    notes: tuple[str, ...]
    roles: tuple[Mapping[str, Any], ...]
    output_state: str  # as the run found the output: new, unfinished, finished or refused
    refusal: str | None

    def as_dict(self) -> dict[str, Any]:
        """Fields as values for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def starting_notes(prepared: Prepared) -> tuple[str, ...]:
    """Notes for the user on checkpoint, recipe and machine, before hours are spent."""
    inventory, notes = prepared.inventory, []
    if prepared.recipe.target is Target.NPUQ:
        notes.append(f"recipe {prepared.recipe.name}: for npuq's own runtime; vLLM-Ascend and SGLang will not load it")
    specs, layers = inventory.specs.values(), prepared.config.num_hidden_layers
    for number, rule in enumerate(prepared.recipe.rules, start=1):
        # The named recipes list roles that not every model has.
        if (rule.names or rule.layers) and not any(rule.matches(spec, layers) for spec in specs):
            notes.append(f"recipe {prepared.recipe.name}: rule {number} speaks of no weight of this checkpoint")
    if problem := tokenizer_problem(prepared.side_files):
        notes.append(f"npuq generate and evaluate will not run the artifact as it will be: {problem}")
    notes += prepared.statements
    if inventory.unknown:
        notes.append(f"{len(inventory.unknown)} unknown tensors copied as they are, first {inventory.unknown[0]!r}")
    if inventory.dropped:
        notes.append(f"{len(inventory.dropped)} recomputable buffer(s) left out, first {inventory.dropped[0]!r}")
    searching = not prepared.recipe.stored and any(job.scheme is not Scheme.FLOAT for job in prepared.plan.jobs)
    if searching and library() is None:
        notes.append(f"quantizing takes about 40 times as long as it could: it is done by {description()}")
    return tuple(notes)
