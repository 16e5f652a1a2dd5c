"""`npuq chat`: a conversation in the terminal, with a model in this process or behind a server's URL."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from ..errors import GenerationError, NpuqWarning
from ..inputs.files import read_given_text, reason
from .conversation.screen import Screen, ask
from .conversation.server_chat import ServerChat, is_url
from .conversation.session import ReadLine, Session
from .conversation.transcript import Transcript
from .options.loading import LOADING, Loading, loading_options
from .options.prompts import template_variables
from .options.sampling import given_options, notes, sampling_options
from .terminal.console import emit_json, format_bytes, json_option, say

if TYPE_CHECKING:
    from .conversation.chat_model import ChatModel
    from .conversation.local_chat import LocalChat

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_MOST_MESSAGE_BYTES: Final = 8 << 20
# Ctrl-C and the first text wait for a step of the prompt.
_STEP_SECONDS: Final = 0.5
_OF_A_MODEL: Final = (*LOADING, "chat_template")
_OF_A_SERVER: Final = ("model_name", "api_key_file")


@click.command()
@click.argument("model", metavar="MODEL|URL")
@click.option("--system", metavar="TEXT", help="The system message of the conversation.")
@click.option("--load", "conversation", type=_FILE, help="Go on with a conversation of a file, as /save writes it.")
@click.option("--no-reasoning", is_flag=True, help="Do not show the reasoning before an answer.")
@click.option(
    "--chat-template-kwargs", metavar="JSON", help="Other variables of the template, like '{\"thinking\": true}'."
)
@sampling_options(max_new_tokens=None)
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End an answer before this text; may be repeated.")
@click.option(
    "--chat-template", type=_FILE, help="Of a MODEL: a Jinja file in the place of the model's own chat template."
)
@loading_options
@click.option("--model", "model_name", metavar="NAME", help="Of a URL: a model of the server. [default: its first]")
@click.option("--api-key-file", type=_FILE, help="Of a URL: a file with the server's API key. [default: $NPUQ_API_KEY]")
@click.option("--quiet", is_flag=True, help="No notes on stderr at the start.")
@json_option("For a conversation from a pipe: a document with all answers, when all are done.")
def command(
    model: str,
    system: str | None,
    conversation: Path | None,
    no_reasoning: bool,
    chat_template_kwargs: str | None,
    stops: tuple[str, ...],
    chat_template: Path | None,
    loading: Loading,
    model_name: str | None,
    api_key_file: Path | None,
    quiet: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Talk to a model: MODEL is an artifact or a checkpoint, URL a server of OpenAI's protocol, like `npuq serve`.

    A line is a message, and /help lists the commands. Ctrl-C stops an answer and keeps what came; twice, or Ctrl-D,
    leaves. Each answer starts from what the prefix cache holds of the conversation. Lines of a pipe are asked one after
    the other, and stdout gets the answers alone.
    """
    interactive = sys.stdin.isatty()
    if as_json and interactive:
        raise click.UsageError("--json is for a conversation from a pipe, as in: npuq chat … --json < questions.txt")
    context = click.get_current_context()
    foreign = _OF_A_MODEL if is_url(model) else _OF_A_SERVER
    for parameter in context.command.params:
        if parameter.name in foreign and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            kind = "a server's URL" if is_url(model) else "a model in this process"
            raise click.UsageError(f"{parameter.opts[0]} is not for {kind}")
    for option, values in (("--stop", stops), ("--system", (system or "",))):
        if any("\ud800" <= character <= "\udfff" for value in values for character in value):
            raise click.UsageError(f"{option}: is not UTF-8 text")
    variables = template_variables(chat_template_kwargs)
    settings = given_options(sampling)
    if stops:
        settings["stop"] = list(stops)
    transcript = Transcript(system)
    if conversation is not None:
        transcript.load(conversation)
        transcript.system = transcript.system if system is None else system
    if quiet:
        warnings.simplefilter("ignore", NpuqWarning)

    talker: ChatModel
    if is_url(model):
        talker = ServerChat(model, model_name, _api_key(api_key_file), variables)
    else:
        talker = _load(Path(model), settings, chat_template, variables, quiet, loading)
    talker.check(settings)
    screen = Screen(reasoning=not no_reasoning, answers=not as_json)
    session = Session(talker, screen, transcript, settings, interactive=interactive)
    if not quiet:
        room = "" if talker.context is None else f", {talker.context} tokens of context"
        for note in talker.notes:
            say(note)
        say(f"{talker.name}{room}" + ("; /help lists the commands, Ctrl-D leaves" if interactive else ""))
    try:
        session.run(_typed() if interactive else _piped())
    finally:
        talker.close()
    if interactive and sys.stdout.isatty():
        say("")
    if as_json:
        emit_json(
            {"model": talker.name, "system": transcript.system, "turns": [turn.as_dict() for turn in session.turns]}
        )


def _load(
    path: Path,
    settings: Mapping[str, Any],
    template: Path | None,
    variables: Mapping[str, Any],
    quiet: bool,
    loading: Loading,
) -> LocalChat:
    """The model in this process. All refusals come before its weights are opened."""
    from ..runtime import EngineConfig, SamplingParams, Tokenizer
    from ..runtime.text.generation_config import default_sampling, read_generation_config
    from .conversation.local_chat import LocalChat

    try:
        SamplingParams.of(SamplingParams(), settings)
    except GenerationError as error:
        raise click.UsageError(str(error)) from error

    directory = loading.find(path, quiet=quiet)
    defaults = default_sampling(directory, read_generation_config(directory))
    params = SamplingParams.of(defaults, settings)
    tokenizer = Tokenizer(directory, template)
    if not tokenizer.has_chat_template:
        raise GenerationError(f"{directory}: has no chat template; give one with --chat-template FILE")
    tokenizer.split_stops(params.stop)
    model = loading.load(directory, tokenizer, EngineConfig(loading.cache_size, step_seconds=_STEP_SECONDS))
    chat = LocalChat(model, defaults, variables)
    held = f"a KV cache of {model.cache_tokens} tokens ({format_bytes(model.cache_bytes)})"
    chat.notes = [*notes(params, defaults, settings), held]
    return chat


def _api_key(path: Path | None) -> str | None:
    """The key of a file's first line, else of the environment; None without one."""
    if path is None:
        return os.environ.get("NPUQ_API_KEY") or None
    lines = read_given_text(path, GenerationError, 1 << 16).split("\n")
    if not lines[0].strip():
        raise click.UsageError(f"{path}: its first line must be the API key")
    return lines[0].strip()


def _typed() -> ReadLine:
    """Lines of the terminal."""
    read = ask("> ")

    def line() -> str:
        try:
            return read()
        except UnicodeDecodeError as cause:
            raise GenerationError("the message is not UTF-8 text") from cause

    return line


def _piped() -> ReadLine:
    """Lines of standard input, which is no terminal."""
    number = 0

    def line() -> str:
        nonlocal number
        number += 1
        try:
            content = sys.stdin.buffer.readline(_MOST_MESSAGE_BYTES + 1)
        except (OSError, ValueError) as cause:  # ValueError: it was closed
            raise GenerationError(f"standard input cannot be read: {reason(cause)}") from cause
        if not content:
            raise EOFError
        if len(content) > _MOST_MESSAGE_BYTES:
            raise GenerationError(f"line {number} of standard input has more than {_MOST_MESSAGE_BYTES} bytes")
        try:
            return content.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as cause:
            raise GenerationError(f"line {number} of standard input is not UTF-8 text") from cause

    return line
