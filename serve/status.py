"""Endpoints about the server itself. None of them waits for the engine."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .. import __version__
from .http.documents import json_response
from .metrics import CONTENT_TYPE
from .service import Service


async def health(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `GET /health`: 503 when the engine's thread has ended or hangs, and a restart is due."""
    return json_response({"status": "ok"}) if service.is_well else json_response({"status": "hangs"}, 503)


async def ready(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `GET /ready`: 503 also while the server takes no new requests because it is about to end."""
    if service.draining:
        return json_response({"status": "draining"}, 503)
    return await health(service, http, body)


async def metrics(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `GET /metrics`, for Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


async def version(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `GET /version`."""
    return json_response({"version": __version__})


async def models(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `GET /v1/models`."""
    return json_response({"object": "list", "data": [_model(service, service.names[0])]})


async def model(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `GET /v1/models/{name}`."""
    name = http.path_params["name"].rstrip("/")
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
