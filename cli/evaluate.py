"""`npuq evaluate`: perplexity, and the divergence from the float source."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from .console import emit_json, progress_bar


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="UTF-8 text.")
@click.option("--source", type=click.Path(path_type=Path), help="The float checkpoint that MODEL was converted from.")
@click.option("--context", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of a window.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "reference", "ascend"]), default="auto", show_default=True)
@click.option("--save", is_flag=True, help="Store the result in MODEL's manifest and model card.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: Path, text: Path, source: Path | None, context: int, backend: str, save: bool, quiet: bool, as_json: bool
) -> None:
    """Measure MODEL, an artifact or an unquantized checkpoint (a directory, or user/repo), on a text.

    The text is cut into windows of --context tokens, each preceded by the beginning-of-sequence token where the
    tokenizer has one, and every token is predicted from those before it in its window. With --source also the mean KL
    divergence (nats a token) of the source's predictions from the model's and how often their first choices agree.
    With --save the artifact keeps the result, and its model card shows it.
    """
    from ..convert.stored_evaluation import check_storable, store_evaluation
    from ..errors import GenerationError
    from ..quant.artifact import CARD_NAME
    from ..runtime import evaluate
    from .transfer import local_model

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"{text}: cannot be read as UTF-8 text: {error}") from error
    model = local_model(model, quiet=quiet)
    if save:
        check_storable(model)
    source = None if source is None else local_model(source, quiet=quiet)
    with progress_bar(0, quiet=quiet, description="windows", unit="") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = evaluate(model, content, source, context, backend, progress)
    if save and not store_evaluation(model, result, text, context):
        # Also with --quiet: the user asked for something that was not done.
        click.echo(f"{model / CARD_NAME}: has no section of npuq's, so only the manifest keeps the result", err=True)
    values = asdict(result)
    if as_json:
        emit_json(values)
        return
    click.echo(f"perplexity         {result.perplexity:.3f}  ({result.tokens} tokens)")
    if source is not None:
        click.echo(f"source perplexity  {result.source_perplexity:.3f}")
        click.echo(f"KL divergence      {result.kl_divergence:.5f}")
        click.echo(f"top-1 agreement    {100 * (result.top1_agreement or 0.0):.2f} %")
