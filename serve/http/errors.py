"""Refusals and failures in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ...errors import GenerationError, NpuqError

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
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
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": str(self)[:_MOST_CHARACTERS],
            "type": _TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that can never be served."""
    return ApiError(400, message, param=param, code=code)


class EndedError(GenerationError):
    """The end of a request by its server. status: of the answer, where none has begun."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def failure(error: GenerationError, status: int = 500) -> ApiError:
    """The answer to a request that was admitted and has failed. status: unless the error has its own."""
    if not isinstance(error, EndedError):
        return ApiError(status, str(error))
    # The official client asks again after any status from 500: not for what would take too long again.
    headers = {"x-should-retry": "false"} if error.status == 504 else {"Retry-After": "10"}
    return ApiError(error.status, str(error), headers=headers)
