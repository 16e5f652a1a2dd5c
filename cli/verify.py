"""`npuq verify`: checks an artifact against its format and its engines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ..choices import ENGINES
from ..errors import NpuqError
from .options.reading import as_option
from .terminal.console import emit_json, json_option, show
from .terminal.progress import TerminalProgress, progress_options

if TYPE_CHECKING:
    from ..verification import RoleError, Verdict


@click.command()
@click.argument("artifact", type=click.Path())
@click.option("--source", type=click.Path(), help="The checkpoint it was made from: measures every linear's error.")
@click.option("--engine", type=click.Choice(ENGINES), help="Check that this engine can run it too.")
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks that --engine shall use.")
@click.option("--ep", is_flag=True, help="Expert parallelism: whole routed experts are spread over the ranks.")
@as_option("ARTIFACT (and --source)")
@progress_options
@json_option("Print the verdict as JSON.")
def command(
    artifact: str,
    source: str | None,
    engine: str | None,
    tp: int,
    ep: bool,
    family: str | None,
    progress: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check that ARTIFACT is whole and that npuq, vLLM-Ascend and SGLang can load it as it is.

    ARTIFACT and --source are directories, or user/repo on the hub, which is fetched first.

    Hashes, headers, completeness, shapes, the engines' requirements, and every stored value. Exit status 1, with each
    problem named, when anything is wrong. With --engine also when that engine has no parameter for a tensor, or no
    tensor for a parameter, reads config.json otherwise than npuq, or cannot run the model on --tp ranks; without
    --engine, notes report the first three. A note names the releases of the engine that were tested.
    """
    from ..engines import check_placement, tested_releases
    from ..verification import verify
    from .transfer import local_model

    if engine is None and (tp != 1 or ep):
        raise click.UsageError("--tp and --ep are about an engine: name it with --engine")
    where = local_model(artifact, quiet=quiet, progress=progress)
    original = None if source is None else local_model(source, quiet=quiet, progress=progress)
    with TerminalProgress(progress, quiet) as display:
        verdict = verify(where, original, family=family, progress=display)
    if engine is not None:
        # Verification has already reported an artifact whose config or description cannot be read.
        with suppress(NpuqError):
            found = check_placement(where, engine, tp, ep, family)
            notes = (note for note in verdict.notes if note not in found)
            tested = f"--engine: the requirements are those of {tested_releases(engine)}"
            verdict = replace(verdict, problems=(*verdict.problems, *found), notes=(*notes, tested))
    if as_json:
        emit_json(verdict.as_dict())
    else:
        _print(verdict)
    if not verdict.ok:
        sys.exit(1)


def _print(verdict: Verdict) -> None:
    for problem in verdict.problems:
        show(f"problem: {problem}")
    for note in verdict.notes:
        show(f"note: {note}")
    if verdict.roles:
        show(*_error_table(verdict.roles))
    counts = f"{verdict.files} files, {verdict.tensors} tensors, {verdict.linears} quantized linears"
    outcome = "ok" if verdict.ok else f"{len(verdict.problems)} problem{'s' if len(verdict.problems) > 1 else ''}"
    show(f"{verdict.path}: {outcome} ({counts})")


def _error_table(roles: Sequence[RoleError]) -> list[str]:
    """A line for each role: its weight error against the source, and the largest of one linear; `--json` has every
    linear."""
    header = f"{'role':<18} {'scheme':<13} {'linears':>8} {'weight error':>12} {'largest':>8}"
    lines = [
        f"{role.role:<18} {role.scheme:<13} {role.linears:>8} {role.relative_error:>12.2%} "
        f"{role.largest_error:>8.2%}  {role.largest_error_tensor}"
        for role in roles
    ]
    return [header, *lines]
