"""`npuq generate`: text from a model, streamed to the terminal or as JSON."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import GenerationError, NpuqWarning
from ..inputs.printable import printable
from .options.loading import Loading, loading_options
from .options.prompts import Prompt, encode, prompt_options, read_prompts, template_note, template_variables
from .options.sampling import given_options, notes, sampling_options
from .ranks import parallel_option, ranks_of_command
from .terminal.console import complain, emit_json, json_option, say, write

if TYPE_CHECKING:
    from ..runtime import Completion, Stream


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@prompt_options
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template, as a user's message.")
@click.option("--system", metavar="TEXT", help="With --chat or --messages: the system message of each conversation.")
@click.option(
    "--chat-template-kwargs",
    metavar="JSON",
    help="With --chat or --messages: other variables of the template, like '{\"thinking\": true}'.",
)
@sampling_options(max_new_tokens=256)
@click.option(
    "--stop",
    "stops",
    multiple=True,
    metavar="TEXT",
    help="End before this text, or at this special token; may be repeated.",
)
@loading_options
@parallel_option
@click.option("--quiet", is_flag=True, help="No notes on stderr.")
@json_option("A JSON list, an object a prompt, when all are done.")
def command(
    model: Path,
    prompts: tuple[str, ...],
    prompt_files: tuple[Path, ...],
    messages_files: tuple[Path, ...],
    jsonl_files: tuple[Path, ...],
    chat: bool,
    system: str | None,
    chat_template_kwargs: str | None,
    stops: tuple[str, ...],
    loading: Loading,
    parallel: str | None,
    quiet: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text with MODEL, a quantized artifact or an unquantized checkpoint: a directory, or user/repo.

    Without options, sampling follows the model's generation_config.json, and is greedy without one: stderr shows it.
    Greedy, or with a --seed, the same prompt gives the same text, whatever runs beside it; a prompt that is long enough
    to be read in several steps may be cut elsewhere in other company, which changes logits in their last digits. One
    prompt is streamed as it comes; several run together and are printed in their order. Prompts are continued as they
    are; --chat makes a conversation of each, and --messages has one in a file. stderr says which it was.

    Over several devices or processes: torchrun --nproc-per-node N -m npuq generate MODEL …
    """
    ranks = ranks_of_command()
    # Standard input is that of all ranks, and only rank 0 reads it.
    if not (prompts or prompt_files or messages_files or jsonl_files):
        raise click.UsageError("give a prompt with --prompt, --prompt-file, --messages or --jsonl")
    texts = read_prompts(prompts, prompt_files, messages_files, jsonl_files) if ranks.leads else []
    if ranks.leads and not texts:
        raise click.UsageError(f"{jsonl_files[0]}: holds no prompt")
    if ranks.leads and not chat and not any(prompt.is_conversation for prompt in texts):
        for option, value in (("--system", system), ("--chat-template-kwargs", chat_template_kwargs)):
            if value is not None:
                raise click.UsageError(f"{option} is for conversations: add --chat, or give --messages")
    # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
    for option, values in (("--prompt", prompts), ("--stop", stops), ("--system", (system or "",))):
        if any("\ud800" <= character <= "\udfff" for value in values for character in value):
            raise click.UsageError(f"{option}: is not UTF-8 text")
    variables = template_variables(chat_template_kwargs)
    given = given_options(sampling)
    if stops:
        given["stop"] = stops

    if quiet:
        warnings.simplefilter("ignore", NpuqWarning)

    from ..runtime import EngineConfig, SamplingParams, Tokenizer
    from ..runtime.text.generation_config import default_sampling, read_generation_config
    from ..runtime.text.replies.formats import PLAIN, find_format

    ranks.join()
    # All refusals come before the weights are opened: options, then the small files, then the prompts.
    try:
        SamplingParams.of(SamplingParams(), given)
    except GenerationError as error:
        raise click.UsageError(str(error)) from error

    directory = ranks.fetch(lambda silent: loading.find(model, quiet=quiet or silent))
    defaults = default_sampling(directory, read_generation_config(directory))
    params = SamplingParams.of(defaults, given)
    tokenizer = Tokenizer(directory)
    inputs = [encode(prompt, tokenizer, chat=chat, system=system, variables=variables) for prompt in texts]
    tokenizer.split_stops(params.stop)
    # A text is continued as it is, and so is what stands in it; one format is for all prompts of a command.
    talks = all(chat or prompt.is_conversation for prompt in texts)
    reply = find_format(tokenizer) if talks else PLAIN
    runner = loading.load(directory, tokenizer, EngineConfig(loading.cache_size), ranks.layout(parallel))
    if not runner.leads:
        runner.follow()
        return
    started = time.perf_counter()
    with runner.stream(inputs, params, reply=reply) as pieces:
        if not quiet:  # after the last possible refusal
            for note in (template_note(texts, tokenizer, chat=chat), *notes(params, defaults, given)):
                say(note)
        completions = _collect(pieces) if as_json else _print(pieces, texts, quiet=quiet)
    runner.close()
    if as_json:
        emit_json([_as_dict(completion, talks=talks) for completion in completions])
    if not quiet:
        say(_speed(completions, time.perf_counter() - started))


def _collect(pieces: Stream) -> list[Completion]:
    done = {piece.index: piece.completion for piece in pieces if piece.completion is not None}
    return [done[index] for index in sorted(done)]


def _print(pieces: Stream, prompts: list[Prompt], *, quiet: bool) -> list[Completion]:
    """Print one prompt's text as it comes; of several, each whole text under its prompt, in their order.

    One prompt's reasoning goes to stderr, so that stdout has the answer alone.
    """
    done: dict[int, Completion] = {}
    printed, thinks = 0, False
    for piece in pieces:
        if piece.completion is not None:
            done[piece.index] = piece.completion
        if len(prompts) == 1:
            if not quiet:
                complain("\n" if thinks and piece.text else piece.reasoning)
            thinks = bool(piece.reasoning) or (thinks and not piece.text)
            write(_shown(piece.text))
            continue
        while printed in done:
            write(f"=== {printed + 1}: {prompts[printed].title}\n{_shown(done[printed].text)}\n\n")
            printed += 1
    if len(prompts) == 1:
        write("\n")
        if thinks and not quiet:
            complain("\n")
    return [done[index] for index in range(len(prompts))]


def _shown(text: str) -> str:
    """The text itself for a file or a pipe; for a terminal without control sequences."""
    return printable(text, keep="\n\t") if sys.stdout.isatty() else text


def _speed(completions: list[Completion], seconds: float) -> str:
    """Tokens a second: of one prompt by its own steps, of several by their common time."""
    prompt_tokens = sum(completion.prompt_tokens for completion in completions)
    new_tokens = sum(completion.completion_tokens for completion in completions)
    if len(completions) > 1:
        rate = new_tokens / max(seconds, 1e-9)
        return f"{prompt_tokens} prompt tokens, {new_tokens} new tokens in {seconds:.2f} s: {rate:.1f} new tokens/s"
    (only,) = completions
    read = f"{prompt_tokens} prompt tokens in {only.prefill_seconds:.2f} s"
    if new_tokens < 2:  # the first comes with the prompt's own step
        return read
    rate = (new_tokens - 1) / max(only.decode_seconds, 1e-9)
    return f"{read}, {new_tokens} new tokens at {rate:.1f} tokens/s"


def _as_dict(completion: Completion, *, talks: bool) -> dict[str, Any]:
    return {
        "text": completion.text,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "finish_reason": completion.finish_reason,
        "prefill_seconds": completion.prefill_seconds,
        "decode_seconds": completion.decode_seconds,
        **({"reasoning": completion.reasoning, "reasoning_tokens": completion.reasoning_tokens} if talks else {}),
    }
