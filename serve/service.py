"""The state that all requests share: the model, its thread, limits, access, numbers."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, ParamSpec, TypeVar

import anyio
import anyio.to_thread

from ..errors import GenerationError
from ..runtime import LanguageModel, Request, SamplingParams
from ..runtime.text.replies.formats import ReplyFormat
from .chat.conversations import Conversations
from .engine_thread import EngineThread, Generation
from .http.access import Access
from .http.errors import ApiError, EndedError, bad_request
from .limits import MOST_RETRY_SECONDS, Limits
from .memory import TRIM_SECONDS, trimmer
from .metrics import Metrics

P = ParamSpec("P")
T = TypeVar("T")

_WORKERS: Final = 4
"""Threads that tokenize, render templates and compile grammars: never the event loop's."""


class Service:
    """A model that is served.

    names: under which clients ask for it; answers have the first. params: of requests that say nothing else. log: takes
    a line a request; log_prompts: and their prompts. failed: takes the error of a step that failed as a whole.
    reply_format: how the model writes reasoning and tool calls; None: as its chat template says.
    has_page: whether there is a page at `/`.
    """

    def __init__(
        self,
        model: LanguageModel,
        names: Sequence[str],
        params: SamplingParams,
        limits: Limits | None = None,
        access: Access | None = None,
        log: Callable[[str], None] = lambda line: None,
        log_prompts: bool = False,
        failed: Callable[[BaseException], None] | None = None,
        reply_format: ReplyFormat | None = None,
        has_page: bool = True,
    ):
        self.model = model
        self.names = tuple(names)
        self.params = params
        self.limits = limits or Limits()
        self.access = access or Access()
        self.log = log
        self.conversations = Conversations(model, reply_format)
        self.has_page = has_page
        self.log_prompts = log_prompts
        self.created = int(time.time())
        self.engine = EngineThread(model, failed)
        self.metrics = Metrics(model.engine)
        self.draining = False
        self._workers = anyio.CapacityLimiter(_WORKERS)
        self._entered = 0
        self._generations: set[Generation] = set()
        self._trimming: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine's thread, which tells this event loop of its pieces."""
        self.model.loop.after_step = self._after_step
        self.engine.start()
        self._trimming = asyncio.create_task(self._give_memory_back())

    async def stop(self) -> None:
        """End the engine's thread."""
        if self._trimming is not None:
            self._trimming.cancel()
        self.engine.stop()

    @property
    def is_well(self) -> bool:
        """False when the engine's thread has ended or hangs."""
        return self.engine.is_well(bool(self._generations))

    @property
    def failure_status(self) -> int:
        """The HTTP status of a request whose step failed: over ranks, all end with it, and others have to serve."""
        return 503 if self.model.over_ranks else 500

    @property
    def num_answering(self) -> int:
        """Number of requests that are being answered."""
        return self._entered

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that takes long, beside the event loop."""
        return await anyio.to_thread.run_sync(lambda: function(*args, **kwargs), limiter=self._workers)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for another model's name."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; this server has {self.names[0]!r}",
                param="model",
                code="model_not_found",
            )

    def check_length(self, tokens: int) -> None:
        """Raise ApiError for a prompt of so many tokens that none can follow."""
        context = self.model.context
        if tokens >= context:
            raise bad_request(
                f"the prompt has {tokens} tokens; the model's context of {context} leaves no room for an answer",
                code="context_length_exceeded",
            )

    def check_count(self, prompts: int, n: int) -> None:
        """Raise ApiError for too many prompts, n times each: before work is done for each of them."""
        most = self.limits.max_prompts
        if prompts * n > most:
            raise bad_request(f"{prompts} prompts, {n} times each, are above this server's limit of {most}")

    def without_paths(self, message: str) -> str:
        """A message for clients, who have no business with where the server keeps its files."""
        for template in self.model.tokenizer.templates.values():
            message = message.replace(f"{template.where}: ", "")
        return message.replace(str(self.model.directory), self.names[0])

    def salt(self, key: bytes | None, cache_salt: str | None) -> bytes:
        """The salt of a request's cache blocks: none are shared between keys, nor with a salt of the client's own."""
        words = (key or b"", b"" if cache_salt is None else b"\1" + cache_salt.encode())
        return (
            b""
            if words == (b"", b"")
            else hashlib.sha256(b"".join(hashlib.sha256(each).digest() for each in words)).digest()
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Hold one of the places for requests, from before its body is read. Raises ApiError while all are taken."""
        if self.draining:
            self.metrics.rejected.labels("draining").inc()
            raise ApiError(503, "the server is about to end; ask again later", headers={"Retry-After": "10"})
        if self._entered >= self.limits.max_queue:
            raise self._busy("queue", f"{self.limits.max_queue} requests wait or run, the limit of this server")
        self._entered += 1
        try:
            yield
        finally:
            self._entered -= 1

    def leave_open(self) -> None:
        """Keep the place of the request that is being answered until `close`: its response is written later."""
        self._entered += 1

    def close(self) -> None:
        self._entered -= 1

    def admit(self, request: Request, *, as_one: bool = False) -> Generation:
        """Queue a request; as_one: its reader waits for the end.

        Raises ApiError for one that does not fit, and while too many tokens wait. Whoever admits it calls `release`
        once it is done.
        """
        self._check_size(request)
        waiting = sum(generation.waiting_tokens for generation in self._generations)
        more = sum(map(len, request.prompts))
        if waiting and waiting + more > self.limits.max_queued_tokens:
            raise self._busy("tokens", f"{waiting} prompt tokens wait; with {more} more they are above the limit")
        if not self._generations:
            self.engine.work_began()
        try:
            generation = Generation(self.engine, request, as_one=as_one)
            generation.start()
        except GenerationError as error:
            raise bad_request(str(error)) from None
        self._generations.add(generation)
        return generation

    def release(self, generation: Generation) -> None:
        """Forget a request, and end it where it still runs."""
        self._generations.discard(generation)
        generation.cancel()

    def end_requests(self, message: str) -> None:
        """End every request with an error."""
        for generation in self._generations:
            generation.fail(EndedError(503, message))

    async def _give_memory_back(self) -> None:
        """Give free memory back now and then, while there are requests."""
        trim, seen = trimmer(), 0
        while True:
            await asyncio.sleep(TRIM_SECONDS)
            if seen != (seen := self.engine.num_steps):
                await self.in_thread(trim)

    def _check_size(self, request: Request) -> None:
        self.check_count(len(request.prompts), request.params.n)
        for prompt in request.prompts:
            self.check_length(len(prompt))

    def _busy(self, why: str, message: str) -> ApiError:
        self.metrics.rejected.labels(why).inc()
        waiting = sum(generation.waiting_tokens for generation in self._generations)
        seconds = math.ceil(waiting * (self.model.engine.budget.prefill_token_seconds or 0.0))
        seconds = max(1, min(seconds, MOST_RETRY_SECONDS))
        return ApiError(429, f"{message}; ask again in {seconds} s", code="busy", headers={"Retry-After": str(seconds)})

    def _after_step(self, seconds: float) -> None:
        self.engine.step_ended(seconds)
        self.metrics.step.observe(seconds)
