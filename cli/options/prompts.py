"""Prompts of a command: texts and conversations, from options and files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ...choices import TEMPLATE_ARGUMENTS
from ...errors import GenerationError
from ...inputs.files import read_given_text, read_stream_text
from ...inputs.json_text import parse_json, parse_object
from ...inputs.printable import printable

if TYPE_CHECKING:
    from ...runtime import Tokenizer

_F = TypeVar("_F", bound=Callable[..., Any])
_FILE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)


@dataclass(frozen=True)
class Prompt:
    """A text, or the messages of a conversation. where: the option, file or line that it came from."""

    content: str | list[Any]
    where: str

    @property
    def is_conversation(self) -> bool:
        return not isinstance(self.content, str)

    @property
    def title(self) -> str:
        """The prompt in a line: its text, or that of its last message."""
        content: Any = self.content
        if isinstance(content, list):
            last = content[-1] if content else ""
            content = last.get("content") if isinstance(last, dict) else last
        line = printable(" ".join(str(content).split()))
        return line if len(line) <= 80 else line[:79] + "…"


def prompt_options(function: _F) -> _F:
    """Add the options that give prompts to a command: `prompts`, `prompt_files`, `messages_files`, `jsonl_files`."""
    options = [
        click.option(
            "--prompt", "prompts", multiple=True, metavar="TEXT", help="A prompt; give several to run them together."
        ),
        click.option(
            "--prompt-file",
            "prompt_files",
            multiple=True,
            type=_FILE,
            help="A file that holds one prompt, its last line end left out; may be repeated; - reads standard input.",
        ),
        click.option(
            "--messages",
            "messages_files",
            multiple=True,
            type=_FILE,
            help="A JSON file with the messages of a conversation, for the chat template; may be repeated.",
        ),
        click.option(
            "--jsonl",
            "jsonl_files",
            multiple=True,
            type=_FILE,
            help='A file with a prompt a line, in JSON: a text, {"prompt": …} or {"messages": …}; may be repeated.',
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def read_prompts(
    prompts: Sequence[str], prompt_files: Sequence[Path], messages_files: Sequence[Path], jsonl_files: Sequence[Path]
) -> list[Prompt]:
    """The prompts of the options, in this order. Raises UsageError for a file that does not hold what it should."""
    if sum(str(path) == "-" for path in (*prompt_files, *messages_files, *jsonl_files)) > 1:
        raise click.UsageError("-: standard input can be read once only")
    given = [Prompt(text, "--prompt") for text in prompts]
    try:
        # Editors and `echo` end a file with a newline that is not meant as part of the prompt.
        given += [Prompt(_read(path).removesuffix("\n"), str(path)) for path in prompt_files]
        given += [
            _conversation(parse_json(_read(path), str(path), GenerationError), str(path)) for path in messages_files
        ]
        given += [prompt for path in jsonl_files for prompt in _lines(path)]
    except GenerationError as error:
        raise click.UsageError(str(error)) from error
    return given


def encode(
    prompt: Prompt, tokenizer: Tokenizer, *, chat: bool, system: str | None, variables: dict[str, Any]
) -> list[int]:
    """Token ids of a prompt: a conversation's by the chat template, and a text's too with `chat`.

    Raises GenerationError, naming the file that a conversation came from.
    """
    if not chat and not prompt.is_conversation:
        return tokenizer.encode(str(prompt.content))
    try:
        return tokenizer.chat(prompt.content, system=system, chat_template_kwargs=variables)
    except GenerationError as error:
        if not prompt.is_conversation:
            raise
        raise GenerationError(f"{prompt.where}: {error}") from error


def template_variables(text: str | None) -> dict[str, Any]:
    """The variables of --chat-template-kwargs. Raises UsageError for what is no object of them."""
    if text is None:
        return {}
    try:
        variables = parse_object(text, "--chat-template-kwargs", GenerationError)
    except GenerationError as error:
        raise click.UsageError(str(error)) from error
    taken = ", ".join(sorted(TEMPLATE_ARGUMENTS & variables.keys()))
    if taken:
        raise click.UsageError(f"--chat-template-kwargs: {taken} cannot be given there")
    return variables


def template_note(prompts: Sequence[Prompt], tokenizer: Tokenizer, *, chat: bool) -> str:
    """A line that says whether the prompts went through the chat template."""
    templated = sum(chat or prompt.is_conversation for prompt in prompts)
    if templated == len(prompts):
        return "prompt: in the model's chat template"
    plain = "as it is" if len(prompts) == 1 else "as they are"
    if templated:
        return f"prompts: {templated} in the model's chat template, {len(prompts) - templated} {plain}"
    hint = " (--chat puts it into the model's chat template)" if tokenizer.has_chat_template else ""
    return f"prompt: {plain}{hint}"


def _lines(path: Path) -> Iterator[Prompt]:
    """The prompts of a file of JSON lines; empty lines are left out."""
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        value = parse_json(line, where, GenerationError)
        text = value.get("prompt") if isinstance(value, dict) else value
        if isinstance(text, str):
            yield Prompt(text, where)
        elif isinstance(value, dict) and "messages" in value:
            yield _conversation(value, where)
        else:
            raise GenerationError(f'{where}: must be a text, {{"prompt": …}} or {{"messages": …}}')


def _conversation(value: Any, where: str) -> Prompt:
    """A conversation: a list of messages, or an object that has them as `messages`."""
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise GenerationError(f'{where}: holds no messages; give [{{"role": "user", "content": "…"}}]')
    return Prompt(messages, where)


def _read(path: Path) -> str:
    if str(path) == "-":
        return read_stream_text(sys.stdin.buffer, path, GenerationError)
    return read_given_text(path, GenerationError)
