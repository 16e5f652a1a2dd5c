"""The course of a conversation: questions and commands in, answers out."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ...errors import GenerationError, NpuqError
from ..terminal.console import OutputError
from . import commands
from .chat_model import ChatModel, Ending, Reply, StopReply
from .screen import Screen
from .transcript import Transcript

_QUOTES: Final = '"""'
ReadLine = Callable[[], str]
"""Returns a line without its end; raises EOFError at the end."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer, with times from the question on."""

    question: str
    content: str
    reasoning: str
    ending: Ending
    first_token_seconds: float | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The turn as a JSON object."""
        values = asdict(self)
        ending = values.pop("ending")
        return values | ending

    def summary(self) -> str:
        """A line on tokens, speed and the prefix cache."""
        words = []
        tokens, first = self.ending.completion_tokens, self.first_token_seconds
        if tokens is not None:
            rate = (tokens - 1) / max(self.seconds - (first or 0), 1e-9)
            words.append(f"{tokens} tokens" + (f" at {rate:.1f} tokens/s" if tokens > 1 else ""))
        words.append("no text" if first is None else f"the first after {first:.2f} s")
        if self.ending.prompt_tokens is not None:
            read = f"{self.ending.prompt_tokens} tokens of conversation"
            if self.ending.cached_tokens is not None:
                read += f", {self.ending.cached_tokens} of them from the prefix cache"
            words.append(read)
        return "last answer: " + "; ".join(words)


class Session:
    """A conversation with a model. settings: fields of SamplingParams that the user has given.

    interactive: a person types. Then an error in an answer is a line, Ctrl-C stops an answer, and the conversation goes
    on; otherwise both end it.
    """

    def __init__(
        self,
        model: ChatModel,
        screen: Screen,
        transcript: Transcript,
        settings: Mapping[str, Any],
        *,
        interactive: bool,
    ):
        self.model = model
        self.screen = screen
        self.transcript = transcript
        self.settings = dict(settings)
        self.interactive = interactive
        self.turns: list[Turn] = []
        self._interrupted = False  # Ctrl-C was the last thing typed

    def run(self, read_line: ReadLine) -> None:
        """Ask what is typed, until its end or /exit. Raises KeyboardInterrupt after Ctrl-C twice."""
        while self._go_on(read_line):
            continue

    def ask(self, question: str) -> None:
        """Ask the model and print its answer. An answer that was stopped is kept as far as it came."""
        content: list[str] = []
        reasoning: list[str] = []
        self.transcript.unanswered = question
        started = time.perf_counter()
        first = None
        reply = self.model.reply(self.transcript.messages(question), self.settings)
        try:
            with self._stoppable(reply):
                for delta in reply:
                    first = first or time.perf_counter() - started
                    content.append(delta.content)
                    reasoning.append(delta.reasoning)
                    self.screen.show(delta)
        finally:
            reply.close()
            if first is not None:
                self.screen.end()
        turn = Turn(question, "".join(content), "".join(reasoning), reply.ending, first, time.perf_counter() - started)
        if first is None and self._interrupted:
            self.screen.note("stopped before any text came; /retry asks again")
            return
        self.turns.append(turn)
        self.transcript.answered(question, turn.content, turn.reasoning)
        if self._interrupted:
            self.screen.note("(stopped; Ctrl-C again, or Ctrl-D, leaves)")
        elif reply.ending.finish_reason == "length":
            self.screen.note("(the answer reached its limit of tokens)")

    def set(self, name: str, value: Any) -> None:
        """Change a setting; None takes it back. Raises GenerationError, and then changes nothing."""
        changed = {**self.settings, name: value}
        if value is None:
            if name not in self.settings:
                raise GenerationError(f"{name} is not set")
            del changed[name]
        self.model.check(changed)
        self.settings = changed

    def clear(self) -> None:
        """Start over."""
        self.transcript.clear()
        self.turns = []

    def load(self, path: Path) -> None:
        """Replace the conversation by that of a file; a question at its end is asked."""
        self.transcript.load(path)
        self.turns = []
        self.screen.note(f"{len(self.transcript.messages())} messages")
        if self.transcript.unanswered is not None:
            self.ask(self.transcript.unanswered)

    def stats(self) -> Iterator[str]:
        """Lines on the conversation and its last answer."""
        size = f"{len(self.transcript.turns)} messages"
        last = self.turns[-1] if self.turns else None
        if last is not None and last.ending.prompt_tokens is not None:
            used = last.ending.prompt_tokens + (last.ending.completion_tokens or 0)
            size += f", {used} tokens" + ("" if self.model.context is None else f" of {self.model.context}")
        yield f"{self.model.name}: {size}"
        if last is not None:
            yield last.summary()

    def _go_on(self, read_line: ReadLine) -> bool:
        """Take what is typed next; False to leave."""
        try:
            message, is_quoted = _message(read_line)
            self._interrupted = False
            return self._take(message, is_quoted=is_quoted)
        except EOFError:
            return False
        except KeyboardInterrupt:
            if not self.interactive or self._interrupted:
                raise
            self._interrupted = True
            self.screen.note("(Ctrl-C again, or Ctrl-D, leaves)")
        except NpuqError as error:
            if not self.interactive or isinstance(error, OutputError):
                raise
            self.screen.note(f"npuq: {error}")
        return True

    def _take(self, message: str, *, is_quoted: bool) -> bool:
        """Ask a message or obey a command; False to leave."""
        if not message.strip():
            return True
        if message.startswith("//") and not is_quoted:
            message = message[1:]
        elif message.startswith("/") and not is_quoted:
            return commands.run(self, message)
        self.ask(message)
        return True

    @contextmanager
    def _stoppable(self, reply: Reply) -> Iterator[None]:
        """Let Ctrl-C stop the reply; once more before it has ended is a KeyboardInterrupt."""
        if not self.interactive:
            yield
            return

        def stop(number: int, frame: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._interrupted = True
            reply.stop()

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        except StopReply:
            pass
        finally:
            signal.signal(signal.SIGINT, before)


def _message(read_line: ReadLine) -> tuple[str, bool]:
    """A message, and whether it was quoted: a line, or the lines between three quotes and three more.

    Raises GenerationError for bytes that are no text, and for quotes without an end.
    """
    message = read_line()
    is_quoted = message.startswith(_QUOTES)
    if is_quoted:
        try:
            message = message.removeprefix(_QUOTES)
            while not message.endswith(_QUOTES):
                message += "\n" + read_line()
        except EOFError:
            raise GenerationError(f"the message that begins with {_QUOTES} has no end") from None
        message = message.removesuffix(_QUOTES).strip("\n")
    if any("\ud800" <= character <= "\udfff" for character in message):
        raise GenerationError("the message is not UTF-8 text")
    return message, is_quoted
