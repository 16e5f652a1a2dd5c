"""A conversation with a model in this process."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import GenerationError
from .chat_model import Delta, Ending, Message

if TYPE_CHECKING:
    from ...runtime import LanguageModel, SamplingParams, Stream


class LocalChat:
    """A loaded model. params: sampling where no setting says otherwise. variables: of the chat template."""

    def __init__(self, model: LanguageModel, params: SamplingParams, variables: Mapping[str, Any]):
        self.model = model
        self.params = params
        self.name = model.directory.resolve().name
        self.context: int | None = model.context
        self.notes: list[str] = []
        self._variables = variables

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise GenerationError for an unknown setting and a value of a wrong type or out of range."""
        for name in ("n", "logprobs"):
            if name in settings:
                raise GenerationError(f"{name} cannot be set here: an answer is one text")
        self.sampling(settings)

    def sampling(self, settings: Mapping[str, Any]) -> SamplingParams:
        """The parameters of an answer: without a limit of tokens it may fill the context."""
        return type(self.params).of(self.params, {"max_new_tokens": self.model.context, **settings})

    def reply(self, messages: Sequence[Message], settings: Mapping[str, Any]) -> LocalReply:
        """Begin an answer."""
        return LocalReply(self, messages, self.sampling(settings))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation in the chat template."""
        return self.model.tokenizer.chat(messages, chat_template_kwargs=self._variables)

    def close(self) -> None:
        """End the use of the model."""
        self.model.close()


class LocalReply:
    """An answer as the model makes it."""

    def __init__(self, chat: LocalChat, messages: Sequence[Message], params: SamplingParams):
        self.ending = Ending()
        self._stopped = False
        self._stream: Stream | None = None
        self._deltas = self._generate(chat, messages, params)

    def __iter__(self) -> LocalReply:
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def stop(self) -> None:
        """End the answer after the step that runs: what the step computes stays in the prefix cache."""
        self._stopped = True
        if self._stream is not None:
            self._stream.cancel()

    def close(self) -> None:
        """Free the blocks of the cache."""
        self._deltas.close()

    def _generate(
        self, chat: LocalChat, messages: Sequence[Message], params: SamplingParams
    ) -> Generator[Delta, None, None]:
        prompt = chat.prompt(messages)
        if len(prompt) >= chat.model.context:
            raise GenerationError(
                f"the conversation has {len(prompt)} tokens and the context is {chat.model.context}; "
                "/undo takes the last question back, /clear starts over"
            )
        self._stream = chat.model.stream([prompt], params, reply=chat.model.reply_format)
        if self._stopped:  # before there was a stream to cancel
            self._stream.cancel()
        with self._stream as pieces:
            for piece in pieces:
                if piece.completion is not None:
                    self.ending = Ending(
                        piece.completion.finish_reason,
                        piece.completion.prompt_tokens,
                        piece.completion.cached_tokens,
                        piece.completion.completion_tokens,
                    )
                if piece.text or piece.reasoning:
                    yield Delta(piece.text, piece.reasoning)
