"""`npuq inspect`: the tensors of a checkpoint or an artifact, by role."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .options.reading import as_option
from .terminal.console import emit_json, format_bytes, json_option, show
from .terminal.progress import progress_options

if TYPE_CHECKING:
    from ..verification import Inspection


@click.command()
@click.argument("path", type=click.Path())
@as_option("PATH")
@progress_options
@json_option("Print it as JSON.")
def command(path: str, family: str | None, progress: str, quiet: bool, as_json: bool) -> None:
    """Show the tensors of a checkpoint or artifact (a directory, or user/repo) by role: schemes, bits, bytes, error."""
    from ..verification import inspect
    from .transfer import local_model

    inspection = inspect(local_model(path, quiet=quiet, progress=progress), family)
    if as_json:
        emit_json(inspection.as_dict())
    else:
        show(*_table(inspection))


def _table(inspection: Inspection) -> list[str]:
    from ..verification.evaluations import evaluated_on

    made = f", recipe {inspection.recipe}, from {inspection.source}" if inspection.recipe else ""
    kind = inspection.kind.replace("_", " ")
    width = max([13, *(len(line.scheme) for line in inspection.lines)])
    stated = inspection.stated_model_type
    read = "" if stated is None else f", read as one: config.json says {stated!a}"
    lines = [
        f"{kind}: {inspection.model_type}, {inspection.layers} layers, {inspection.experts} experts{made}{read}",
        f"{'role':<18} {'scheme':<{width}} {'tensors':>8} {'bits':>6} {'before':>9} {'bytes':>9} {'weight error':>12}",
    ]
    for line in inspection.lines:
        before = "" if line.source_bytes is None else format_bytes(line.source_bytes)
        error = "" if line.relative_error is None else f"{line.relative_error:.2%}"
        lines.append(
            f"{line.role:<18} {line.scheme:<{width}} {line.tensors:>8} {line.bits:>6.2f} {before:>9} "
            f"{format_bytes(line.output_bytes):>9} {error:>12}"
        )
    total = format_bytes(sum(line.output_bytes for line in inspection.lines))
    lines.append(f"{total} in all")
    lines += [
        f"perplexity {result['perplexity']:.3f} on {evaluated_on(result)}, context {result['context']}"
        for result in inspection.evaluations
    ]
    return [line.rstrip() for line in lines]
