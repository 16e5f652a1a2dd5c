"""The HTTP server around the application."""

from __future__ import annotations

import socket

import uvicorn

from .app import make_app
from .service import Service


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=256)


def make_server(service: Service) -> uvicorn.Server:
    """A server for a service; `run(sockets=[…])` serves until it is told to exit."""
    config = uvicorn.Config(
        make_app(service),
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=64 << 10,
    )
    return uvicorn.Server(config)
