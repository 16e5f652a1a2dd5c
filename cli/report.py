"""`npuq report`: one HTML page about an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from .options.reading import as_option
from .terminal.console import emit_json, json_option, show
from .terminal.progress import TerminalProgress, progress_options


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The page to write; an earlier report is replaced.",
)
@as_option("ARTIFACT")
@progress_options
@json_option("Print the numbers as JSON; write no page.")
def command(artifact: Path, output: Path, family: str | None, progress: str, quiet: bool, as_json: bool) -> None:
    """Write a page about ARTIFACT (a directory, or user/repo): sizes, errors, scales, calibration, provenance.

    One HTML file that opens without a network. It shows the results of conversion, calibration and `npuq evaluate
    --save` that the artifact holds; of one that ModelSlim made, sizes and scales. Needs plotly: pip install
    'npuq[report]'.
    """
    from ..report import check_output, read_facts, write_report
    from .transfer import local_model

    if not as_json:
        check_output(output)
    directory = local_model(artifact, quiet=quiet, progress=progress)
    with TerminalProgress(progress, quiet) as display:
        # The name of a directory in the hub's cache, a commit, means nothing to a reader.
        facts = read_facts(directory, display, None if directory == artifact else str(artifact), family)
    if as_json:
        emit_json(facts.as_dict())
        return
    write_report(facts, output)
    if not quiet:
        show(output)
