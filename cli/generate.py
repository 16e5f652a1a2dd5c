"""`npuq generate`: text from a model, streamed to the terminal or as JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import emit_json, size

if TYPE_CHECKING:
    from ..runtime import Completion, LanguageModel


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A prompt; give several to run them together.")
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="A file that holds one prompt, after those of --prompt; - reads standard input.",
)
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template, as what a user says.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="Keep the K likeliest tokens; 0: all."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Keep the likeliest tokens that sum to P.",
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Keep tokens at least P times the likeliest.",
)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@click.option("--seed", type=click.IntRange(min=0), help="Makes sampling repeatable, whatever else runs beside it.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "reference", "ascend"]), default="auto", show_default=True)
@click.option("--device", help="Which NPU the ascend backend runs on, like npu:1.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Compute dtype; default: the backend's own.")
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "int8"]),
    default="auto",
    show_default=True,
    help="int8: a smaller cache, for artifacts that were calibrated.",
)
@click.option("--cache-size", type=size, default="2GiB", show_default=True, help="Memory for the KV cache.")
@click.option(
    "--json", "as_json", is_flag=True, help="JSON when all are done: an object, or of several prompts a list."
)
def command(
    model: Path,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    chat: bool,
    backend: str,
    device: str | None,
    dtype: str | None,
    kv_cache_dtype: str,
    cache_size: int,
    as_json: bool,
    stops: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Generate text with MODEL, a quantized artifact or an unquantized checkpoint: a directory, or user/repo.

    Without --temperature the result is greedy: the same prompt gives the same text. One prompt is streamed as it
    comes; several run together and are printed in their order. Prompts are continued as they are; --chat makes a
    conversation of them.
    """
    texts = [*prompts, *_from_file(prompt_file)]
    if not texts:
        raise click.UsageError("give a prompt with --prompt or --prompt-file")
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
    for option, values in (("--prompt", prompts), ("--stop", stops)):
        if any("\ud800" <= character <= "\udfff" for value in values for character in value):
            raise click.UsageError(f"{option}: is not UTF-8 text")

    import torch

    from ..runtime import EngineConfig, SamplingParams, load
    from ..runtime.tokenizer_files import require_tokenizer
    from .transfer import local_model

    params = SamplingParams(stop=stops, **sampling)
    compute = None if dtype is None else getattr(torch, dtype)
    directory = local_model(model, quiet=as_json)
    require_tokenizer(directory)
    runner = load(directory, backend, compute, device, engine=EngineConfig(cache_size), kv_cache_dtype=kv_cache_dtype)
    inputs = [runner.tokenizer.chat([{"role": "user", "content": text}]) for text in texts] if chat else texts
    if as_json:
        results = [_as_dict(completion) for completion in runner.generate(inputs, params)]
        emit_json(results if len(results) > 1 else results[0])
    else:
        _print_stream(runner, inputs, texts, params)


def _from_file(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--prompt-file {path}: cannot be read as UTF-8 text: {error}") from error
    return [text]


def _print_stream(runner: LanguageModel, inputs: Any, texts: list[str], params: Any) -> None:
    """One prompt's text as it comes; of several, each whole text under its prompt, as soon as those before it are."""
    if len(texts) == 1:
        for piece in runner.stream(inputs, params):
            click.echo(piece.text, nl=False)
            sys.stdout.flush()
        click.echo()
        return
    done: dict[int, Completion] = {}
    printed = 0
    for piece in runner.stream(inputs, params):
        if piece.completion is not None:
            done[piece.index] = piece.completion
        while printed in done:
            click.echo(f"=== {printed + 1}: {_one_line(texts[printed])}\n{done[printed].text}\n")
            printed += 1


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"


def _as_dict(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "finish_reason": completion.finish_reason,
        "prefill_seconds": completion.prefill_seconds,
        "decode_seconds": completion.decode_seconds,
    }
