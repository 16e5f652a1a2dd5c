"""The application: paths, and what all of them have in common.

An endpoint is `async (service, http, body) -> Response`, in ENDPOINTS by its method and path; it may raise ApiError. A
POST holds one of the server's places until its answer is known; a stream, until it is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeAlias

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..errors import NpuqError
from ..inputs.printable import error_line
from .chat.endpoint import chat_completions
from .completions.endpoint import completions
from .http.access import Gate, has_two_lengths
from .http.bodies import read_body
from .http.documents import json_response
from .http.errors import ApiError, bad_request
from .page.document import page
from .responding import ClientGoneError
from .service import Service
from .status import health, metrics, model, models, ready, version
from .tokens import detokenize, tokenize

Endpoint: TypeAlias = Callable[[Service, HttpRequest, bytes], Awaitable[Response]]

ENDPOINTS: Final[dict[tuple[str, str], Endpoint]] = {
    ("GET", "/"): page,
    ("GET", "/health"): health,
    ("GET", "/ready"): ready,
    ("GET", "/metrics"): metrics,
    ("GET", "/version"): version,
    ("GET", "/v1/models"): models,
    ("GET", "/v1/models/{name:path}"): model,
    ("POST", "/v1/completions"): completions,
    ("POST", "/v1/chat/completions"): chat_completions,
    ("POST", "/tokenize"): tokenize,
    ("POST", "/detokenize"): detokenize,
}


def make_app(service: Service) -> Starlette:
    """The application of a service: starts its engine's thread with the server, and ends it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    routes = [
        Route(spelled, _guarded(service, endpoint), methods=[method])
        for (method, path), endpoint in ENDPOINTS.items()
        for spelled in {path, f"{path.rstrip('/')}/"}
    ]
    middleware = [Middleware(Gate, service.access, service.log)]
    if service.access.origins:
        cors = Middleware(
            _CrossOrigin,
            allow_origins=service.access.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
        middleware.insert(0, cors)  # outside of the gate: a browser's question before a request brings no key
    app = Starlette(
        routes=routes, lifespan=lifespan, middleware=middleware, exception_handlers={HTTPException: _no_such_path}
    )
    app.router.redirect_slashes = False
    return app


class _CrossOrigin(CORSMiddleware):
    """Starlette's answers to other origins; a body with two lengths is the gate's to refuse, a preflight's too."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = scope["type"] == "http" and has_two_lengths(Headers(scope=scope))
        if refused:
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _guarded(service: Service, endpoint: Endpoint) -> Callable[[HttpRequest], Awaitable[Response]]:
    """An endpoint whose errors are answers, and whose POST holds a place."""

    async def answer(http: HttpRequest) -> Response:
        if http.method != "POST":
            return await endpoint(service, http, b"")
        with service.entered():
            return await endpoint(service, http, await read_body(http, service.limits.max_body))

    async def handle(http: HttpRequest) -> Response:
        try:
            return await answer(http)
        except ApiError as error:
            found = error
        except (ClientGoneError, ClientDisconnect):
            return Response(status_code=499)  # nobody gets it
        except NpuqError as error:
            found = bad_request(service.without_paths(str(error)))
        except Exception as error:
            service.log(f"internal error: {type(error).__name__}: {error_line(error)}")
            found = ApiError(500, f"internal error: {type(error).__name__}")
        return json_response(found.body(), found.status, found.headers)

    return handle


async def _no_such_path(http: HttpRequest, error: Exception) -> Response:
    """The answer to a path or a method that no endpoint has."""
    assert isinstance(error, HTTPException)
    message = "there is no such path" if error.status_code == 404 else "the path does not know this method"
    return json_response(ApiError(error.status_code, message).body(), error.status_code, error.headers)
