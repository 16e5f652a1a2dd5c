"""Output of generation: pieces of text as they come, and the completion of each prompt."""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass

from ..errors import GenerationError
from .engine import StepOutput
from .loop import Loop
from .sampler import SamplingParams
from .sequence import Sequence
from .text.detokenizing import TextStream
from .text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """Completion of a prompt.

    text: without the prompt, special tokens and the stop string. finish_reason: "stop" (end of sequence or a stop
    string) or "length". prefill_seconds, decode_seconds: wall time of the steps that the prompt took part in, which it
    shares with other prompts.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    prefill_seconds: float
    decode_seconds: float

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Piece:
    """The next text of prompt number `index`. The prompt's last piece has its `completion`."""

    index: int
    text: str
    completion: Completion | None = None


class Stream(abc.Iterator[Piece]):
    """Pieces of some prompts as they come. Several streams of a model can be open.

    The iteration ends when all prompts have their completion. Closing the stream (also by leaving a `with` block, or by
    dropping the last reference to it) ends the generation. May be read in any thread.
    """

    def __init__(
        self, loop: Loop, tokenizer: Tokenizer, prompts: abc.Sequence[abc.Sequence[int]], params: SamplingParams
    ):
        stops, stop_ids = tokenizer.split_stops(params.stop)
        self._inbox = _Inbox([TextStream(tokenizer, prompt, stops) for prompt in prompts])
        self._loop = loop
        loop.add(self._inbox, prompts, params, stop_ids)

    def __next__(self) -> Piece:
        inbox = self._inbox
        while True:
            try:
                self._loop.wait(inbox)
            except BaseException:
                self.close()
                raise
            if inbox.pieces:
                try:
                    return inbox.pieces.popleft()
                except IndexError:  # another thread took it
                    continue
            error = inbox.error  # once: another thread may close the stream
            if error is not None:
                self.close()
                raise error
            if not inbox.open and not inbox.pieces:  # in this order: the last piece comes before the end
                raise StopIteration

    def close(self) -> None:
        """End the generation of incomplete prompts and free their blocks. Unread pieces are lost."""
        self._loop.drop(self._inbox)
        self._inbox.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        inbox = getattr(self, "_inbox", None)
        if inbox is not None and inbox.open:
            self._loop.abandon(inbox)


class _Inbox:
    """Pieces and error of a stream that were not read yet. The loop refers to it, and not to the stream."""

    def __init__(self, texts: abc.Sequence[TextStream]):
        self.sequences: tuple[Sequence, ...] = ()
        self._places: dict[Sequence, int] = {}
        self.pieces: deque[Piece] = deque()
        self.error: GenerationError | None = None
        self.open = len(texts)
        self._texts = texts

    def expect(self, sequences: tuple[Sequence, ...]) -> None:
        self.sequences = sequences
        self._places = {sequence: place for place, sequence in enumerate(sequences)}

    def is_ready(self) -> bool:
        return bool(self.pieces) or self.error is not None or not self.open

    def receive(self, output: StepOutput) -> bool:
        if output.token is None:
            assert output.error is not None
            self.fail(output.error)
            return False
        sequence = output.sequence
        index = self._places[sequence]
        text = self._texts[index]
        # A token that ends a sequence (end of sequence, a stop that is a special token) has no text.
        given = "" if sequence.finish_reason == "stop" else text.add(output.token)
        reason = "stop" if text.stopped else sequence.finish_reason
        if reason is None:
            if given:
                self.pieces.append(Piece(index, given))
            return False
        given += text.flush()
        completion = Completion(
            text=text.text,
            token_ids=tuple(sequence.tokens[sequence.num_prompt_tokens :]),
            prompt_tokens=sequence.num_prompt_tokens,
            finish_reason=reason,
            prefill_seconds=sequence.prefill_seconds,
            decode_seconds=sequence.decode_seconds,
        )
        self.pieces.append(Piece(index, given, completion))
        self.open -= 1
        return text.stopped

    def fail(self, error: GenerationError) -> None:
        self.error = self.error or error

    def close(self) -> None:
        self.pieces.clear()
        self.error = None
        self.open = 0
