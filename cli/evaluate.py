"""`npuq evaluate`: perplexity, and the divergence from the float source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..choices import KV_CACHE_DTYPES
from .options.loading import backend_option
from .options.reading import as_option
from .ranks import parallel_option, ranks_of_command
from .terminal.console import emit_json, json_option, say, show
from .terminal.progress import TerminalProgress, progress_options

if TYPE_CHECKING:
    from ..runtime import LayerError


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="UTF-8 text.")
@click.option("--source", type=click.Path(path_type=Path), help="The float checkpoint that MODEL was converted from.")
@as_option("MODEL (and --source)")
@click.option("--context", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of a context.")
@click.option("--layers", is_flag=True, help="Also the output error of every decoder layer against --source.")
@backend_option
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(KV_CACHE_DTYPES),
    default="auto",
    show_default=True,
    help="int8: MODEL attends to an int8 cache, throughout.",
)
@parallel_option
@click.option("--save", is_flag=True, help="Store the result in MODEL's manifest and model card.")
@progress_options
@json_option("Print the result as JSON.")
def command(
    model: Path,
    text: Path,
    source: Path | None,
    family: str | None,
    context: int,
    layers: bool,
    backend: str,
    kv_cache_dtype: str,
    parallel: str | None,
    save: bool,
    progress: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure MODEL, an artifact or an unquantized checkpoint (a directory, or user/repo), on a text.

    The text is cut into contexts of --context tokens, each preceded by the beginning-of-sequence token where the
    tokenizer has one. Every token is predicted from those before it in its context. With --source also the mean KL
    divergence (nats a token) of the source's predictions from the model's, and how often their first choices agree.
    With --layers also ‖model − source‖ / ‖source‖ of the hidden states after every decoder layer, and their cosine:
    accumulated over the layers, and of the layer alone, for the source's hidden states as inputs of both; with sparse
    attention also the share of the source's selected tokens that the model selects. This reads one layer of each at a
    time.

    Over several devices or processes: torchrun --nproc-per-node N -m npuq evaluate MODEL …

    With --save the artifact keeps the result, its model card shows it, and `npuq report` draws it.
    """
    from ..errors import GenerationError
    from ..formats.artifact import CARD_NAME
    from ..inputs.files import decoded, read_given_bytes
    from ..inputs.printable import name_as_text
    from ..runtime import evaluate, layer_errors
    from ..runtime.evaluation.perplexity import load_models
    from ..runtime.text.tokenizer_check import require_tokenizer
    from ..verification.evaluations import check_can_save, save_evaluation
    from .transfer import local_model

    if layers and source is None:
        raise click.UsageError("--layers compares with the float checkpoint: name it with --source")
    ranks = ranks_of_command()
    if layers and ranks.launch.size > 1:
        raise click.UsageError("--layers reads a layer at a time, in one process: start it without torchrun")
    stored = read_given_bytes(text, GenerationError)
    content, digest = decoded(stored, text, GenerationError), hashlib.sha256(stored).hexdigest()
    ranks.join()
    model = ranks.fetch(
        lambda silent: local_model(model, quiet=quiet or silent, progress=progress, before_weights=require_tokenizer)
    )
    if save and ranks.leads:
        check_can_save(model)
    if source is not None:
        named = source
        source = ranks.fetch(lambda silent: local_model(named, quiet=quiet or silent, progress=progress))
    errors: list[LayerError] = []
    models = load_models(model, source, backend, kv_cache_dtype, family, ranks.layout(parallel))
    if not models[0].leads:
        models[0].follow()
        return
    with TerminalProgress(progress, quiet) as display:
        result = evaluate(models[0], content, models[1], context, progress=display)
        models[0].close()
        if layers and source is not None:
            errors = layer_errors(model, content, source, context, backend, display, family)
    if save and not save_evaluation(model, result, name_as_text(text), digest, context, errors, kv_cache_dtype):
        # Also with --quiet: a request of the user's was not fulfilled.
        say(f"{model / CARD_NAME}: has no section of npuq's, so only the manifest keeps the result")
    values = asdict(result)
    if as_json:
        if layers:
            values["layers"] = [asdict(error) for error in errors]
        emit_json(values)
        return
    show(f"perplexity         {result.perplexity:.3f}  ({result.tokens} tokens)")
    if source is not None:
        show(f"source perplexity  {result.source_perplexity:.3f}")
        show(f"KL divergence      {result.kl_divergence:.5f}")
        show(f"top-1 agreement    {100 * (result.top1_agreement or 0.0):.2f} %")
    if errors:
        show(*_layer_table(errors))


def _layer_table(errors: Sequence[LayerError]) -> list[str]:
    sparse = any(error.own_selection_agreement is not None for error in errors)
    lines = ["", "layer     error   cosine   its own   cosine" + "  selection" * sparse]
    for error in errors:
        line = (
            f"{error.layer:>5}  {error.relative_error:>8.3%}  {error.cosine:.5f}  {error.own_relative_error:>8.3%}  "
            f"{error.own_cosine:.5f}"
        )
        agreement = error.own_selection_agreement
        lines.append(line if agreement is None else f"{line}  {agreement:>9.2%}")
    return lines
