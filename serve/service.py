"""The state that all requests share: the model, its thread, limits and names."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread

from ..errors import GenerationError
from ..runtime import LanguageModel, Request, SamplingParams
from .engine_thread import EngineThread, Generation
from .errors import ApiError, bad_request
from .limits import Limits

P = ParamSpec("P")
T = TypeVar("T")

_WORKERS = 4
"""Threads that tokenize, render templates and compile grammars: never the event loop's."""


class Service:
    """A model that is served. names: under which clients ask for it, the first is shown. params: of requests that say
    nothing else.
    """

    def __init__(
        self, model: LanguageModel, names: Sequence[str], params: SamplingParams, limits: Limits | None = None
    ):
        self.model = model
        self.names = tuple(names)
        self.params = params
        self.limits = limits or Limits()
        self.created = int(time.time())
        self.engine = EngineThread(model)
        self._workers = anyio.CapacityLimiter(_WORKERS)
        self._admitted = 0

    async def start(self) -> None:
        self.engine.start()

    async def stop(self) -> None:
        self.engine.stop()

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

    def admit(self, request: Request) -> Generation:
        """Queue a request. Raises ApiError for one that does not fit, and while too many wait.

        Whoever admits it calls `release` once it is done.
        """
        for prompt in request.prompts:
            if len(prompt) >= self.model.context:
                raise bad_request(
                    f"the prompt has {len(prompt)} tokens, the context of this model {self.model.context}",
                    code="context_length_exceeded",
                )
        if self._admitted >= self.limits.max_queue:
            raise ApiError(429, "too many requests wait; ask again later", headers={"Retry-After": "1"})
        try:
            generation = Generation(self.engine, request)
            generation.start()
        except GenerationError as error:
            raise bad_request(str(error)) from None
        self._admitted += 1
        return generation

    def release(self, generation: Generation) -> None:
        """Forget a request, and end it where it still runs."""
        self._admitted -= 1
        generation.cancel()
