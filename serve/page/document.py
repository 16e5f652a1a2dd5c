"""The page's document, and the headers that it is sent with."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Final

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..http.errors import ApiError
from ..service import Service

_FOLDER: Final = Path(__file__).parent


async def page(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `GET /`."""
    if not service.has_page:
        raise ApiError(404, "there is no such path")
    content, policy = document()
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(content, headers=headers, media_type="text/html; charset=utf-8")


@cache
def document() -> tuple[bytes, str]:
    """(the page, the policy that allows its own style and scripts, and requests to its own server)."""
    style = _read("page.css")
    script = f"{_read('markdown.js')}\n{_read('page.js')}"
    content = _read("page.html").replace("{{style}}", style).replace("{{script}}", script)
    policy = "; ".join(
        [
            "default-src 'none'",
            "connect-src 'self'",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    return content.encode("utf-8"), policy


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"
