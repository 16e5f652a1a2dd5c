"""Refusals in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..errors import NpuqError

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_MOST_CHARACTERS: Final = 1000


class ApiError(NpuqError):
    """A request that is refused, or that failed. param: the field at fault. code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The document that a client gets."""
        error = {
            "message": str(self)[:_MOST_CHARACTERS],
            "type": _TYPES.get(self.status, "server_error"),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that can never be served."""
    return ApiError(400, message, param=param, code=code)
