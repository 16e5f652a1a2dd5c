"""Output of generation: pieces of text as they come, and the completion of each prompt."""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass, replace

from ..errors import GenerationError
from .engine import StepOutput
from .loop import Loop
from .request import Request
from .sampling.logprobs import TokenLogprobs
from .sequence import Sequence
from .text.replies.parts import CallDelta, Part, ToolCall
from .text.replies.reply import Reply
from .text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """Completion of a prompt.

    text: without the prompt, special tokens and the stop string. finish_reason: "stop" (end of sequence or a stop
    string), "length", or "tool_calls" (the same as "stop", after tool calls). prefill_seconds, decode_seconds: wall
    time of the steps that the prompt took part in, which it shares with other prompts. token_ids: with the token that
    ended the completion, if one did. logprobs: of the tokens whose text is in `text`, if the request asks for them.
    cached_tokens: those of the prompt that the cache held. prompt_logprobs: of the prompt's tokens from the second on,
    if the request asks for them; of the first of n alone. reasoning, tool_calls, malformed_calls: what the reply's
    format found, and calls in its text that are none. reasoning_tokens: with the markers around the reasoning.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    prefill_seconds: float
    decode_seconds: float
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_tokens: int = 0
    malformed_calls: int = 0

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Piece:
    """The next text of completion number `index`; of n completions a prompt, the first prompt's come first.

    With a reply's format, a piece brings text, or reasoning, or a part of a tool call, and never two of them. The last
    piece has the `completion`. token_ids, logprobs: of the tokens whose text this piece brings or begins; logprobs only
    if the request asks for them.
    """

    index: int
    text: str
    completion: Completion | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    reasoning: str = ""
    call: CallDelta | None = None


class Stream(abc.Iterator[Piece]):
    """Pieces of some prompts as they come. Several streams of a model can be open.

    The iteration ends when all prompts have their completion. Closing the stream (also by leaving a `with` block, or by
    dropping the last reference to it) ends the generation. May be read in any thread.
    """

    def __init__(self, loop: Loop, tokenizer: Tokenizer, request: Request):
        self._inbox = Inbox(tokenizer, request)
        self._loop = loop
        loop.add(self._inbox, request, self._inbox.stop_ids)

    def __next__(self) -> Piece:
        inbox = self._inbox
        while True:
            try:
                self._loop.wait(inbox)
            except BaseException:
                self.close()
                raise
            if inbox.cancelled:
                self.close()
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

    def cancel(self) -> None:
        """Let the iteration end, and with it the generation, after the step that runs. For signal handlers."""
        self._inbox.cancelled = True

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


class Inbox:
    """Pieces and error of a request that were not read yet. The loop refers to it, and not to its reader.

    stop_ids: tokens that end its sequences. Raises GenerationError for stop strings that cannot be found.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request):
        params = request.params
        stops, self.stop_ids = tokenizer.split_stops(params.stop)
        prompts = [prompt for prompt in request.prompts for _ in range(params.n)]
        replies = [Reply(tokenizer, prompt, stops, params.min_tokens, request.reply) for prompt in prompts]
        self.sequences: tuple[Sequence, ...] = ()
        self._places: dict[Sequence, int] = {}
        self.pieces: deque[Piece] = deque()
        self.error: GenerationError | None = None
        self.open = len(replies)
        self.cancelled = False
        self._replies = replies
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in replies]
        self._of_text: list[list[TokenLogprobs]] = [[] for _ in replies]

    def expect(self, sequences: tuple[Sequence, ...]) -> None:
        self.sequences = sequences
        self._places = {sequence: place for place, sequence in enumerate(sequences)}

    def is_ready(self) -> bool:
        return bool(self.pieces) or self.error is not None or not self.open or self.cancelled

    def receive(self, output: StepOutput) -> bool:
        if output.token is None:
            assert output.error is not None
            self.fail(output.error)
            return False
        sequence = output.sequence
        index = self._places[sequence]
        reply = self._replies[index]
        if output.logprobs is not None:
            self._logprobs[index].append(output.logprobs)
        # A token that ends a sequence (end of sequence, a stop that is a special token) has no text.
        parts = [] if sequence.finish_reason == "stop" else reply.add(output.token)
        reason = "stop" if reply.stopped else sequence.finish_reason
        if reason is None:
            self.pieces.extend(self._piece(index, part, sequence) for part in parts)
            return False
        pieces = [self._piece(index, part, sequence) for part in [*parts, *reply.flush()] or [Part()]]
        completion = Completion(
            text=reply.text,
            token_ids=tuple(sequence.tokens[sequence.num_prompt_tokens :]),
            prompt_tokens=sequence.num_prompt_tokens,
            finish_reason="tool_calls" if reply.calls and reason == "stop" else reason,
            prefill_seconds=sequence.prefill_seconds,
            decode_seconds=sequence.decode_seconds,
            logprobs=None if sequence.params.logprobs is None else tuple(self._of_text[index]),
            cached_tokens=sequence.num_reused or 0,
            prompt_logprobs=None if sequence.prompt_logprobs is None else tuple(sequence.prompt_logprobs),
            reasoning=reply.reasoning,
            tool_calls=reply.calls,
            reasoning_tokens=reply.reasoning_tokens,
            malformed_calls=reply.malformed_calls,
        )
        self.pieces.extend([*pieces[:-1], replace(pieces[-1], completion=completion)])
        self.open -= 1
        return reply.stopped

    def _piece(self, index: int, part: Part, sequence: Sequence) -> Piece:
        offset = sequence.num_prompt_tokens
        token_ids = tuple(sequence.tokens[offset + number] for number in part.tokens)
        given = self._logprobs[index]
        logprobs = tuple(given[number] for number in part.tokens) if given else ()
        if not part.reasoning and part.call is None:
            self._of_text[index] += logprobs
        return Piece(index, part.text, None, token_ids, logprobs, part.reasoning, part.call)

    def fail(self, error: GenerationError) -> None:
        self.error = self.error or error

    def close(self) -> None:
        self.pieces.clear()
        self.error = None
        self.open = 0
