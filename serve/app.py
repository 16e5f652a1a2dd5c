"""The application: paths, and what all of them have in common.

An endpoint is `async (service, http, body) -> Response`, in ENDPOINTS by its method and path; it may raise ApiError.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeAlias

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from .completions import completions
from .errors import ApiError
from .responding import ClientGoneError, json_response
from .service import Service

Endpoint: TypeAlias = Callable[[Service, HttpRequest, bytes], Awaitable[Response]]


async def health(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `GET /health`: whether the engine's thread lives."""
    return json_response({"status": "ok"}) if service.engine.is_alive else json_response({"status": "failed"}, 503)


async def models(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `GET /v1/models`."""
    return json_response({"object": "list", "data": [_model(service, service.names[0])]})


async def model(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `GET /v1/models/{name}`."""
    name = http.path_params["name"]
    service.check_model(name)
    return json_response(_model(service, name))


def _model(service: Service, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "npuq",
        "max_model_len": service.model.context,
    }


ENDPOINTS: Final[dict[tuple[str, str], Endpoint]] = {
    ("GET", "/health"): health,
    ("GET", "/v1/models"): models,
    ("GET", "/v1/models/{name:path}"): model,
    ("POST", "/v1/completions"): completions,
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
        for spelled in (path, f"{path}/")
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.router.redirect_slashes = False
    return app


def _guarded(service: Service, endpoint: Endpoint) -> Callable[[HttpRequest], Awaitable[Response]]:
    """An endpoint that answers its errors."""

    async def handle(http: HttpRequest) -> Response:
        try:
            return await endpoint(service, http, await _body(http, service.limits.max_body))
        except ApiError as error:
            return json_response(error.body(), error.status, error.headers)
        except (ClientGoneError, ClientDisconnect):
            return Response(status_code=499)

    return handle


async def _body(http: HttpRequest, most: int) -> bytes:
    parts, length = [], 0
    async for part in http.stream():
        length += len(part)
        if length > most:
            raise ApiError(413, f"the body has more than {most} bytes", headers={"Connection": "close"})
        parts.append(part)
    return b"".join(parts)
