"""`npuq verify`: is an artifact all that its format promises?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from .console import emit_json

if TYPE_CHECKING:
    from ..convert import VerifyReport


@click.command()
@click.argument("artifact", type=click.Path())
@click.option("--source", type=click.Path(), help="The checkpoint it was made from: measures every linear's error.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(artifact: str, source: str | None, as_json: bool) -> None:
    """Check that ARTIFACT is whole and that npuq, vLLM-Ascend and SGLang can load it as it is.

    ARTIFACT and --source are directories, or user/repo on the hub, which is fetched first.

    Hashes, headers, completeness, shapes, the engines' rules, and every stored value. Exit status 1, with each problem
    named, when anything is wrong.
    """
    from ..convert import verify
    from .transfer import local_model

    where = local_model(artifact, quiet=as_json)
    report = verify(where, None if source is None else local_model(source, quiet=as_json))
    if as_json:
        emit_json(report.as_dict())
    else:
        _print(report)
    if not report.ok:
        sys.exit(1)


def _print(report: VerifyReport) -> None:
    for problem in report.problems:
        click.echo(f"problem: {problem}")
    for error in report.errors:
        click.echo(f"{error.relative_error:>8.3%}  {error.scheme:<13} {error.name}")
    counts = f"{report.files} files, {report.tensors} tensors, {report.linears} quantized linears"
    verdict = "ok" if report.ok else f"{len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}"
    click.echo(f"{report.path}: {verdict} ({counts})")
