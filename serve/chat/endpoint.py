"""The endpoint of chat."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..fields import sampling_params
from ..http.access import record_of
from ..http.bodies import decode, unknown_fields
from ..http.errors import bad_request
from ..reply import Asked
from ..responding import respond
from ..service import Service
from .documents import ChatReply
from .request import ChatRequest


async def chat_completions(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `POST /v1/chat/completions`."""
    asked = await service.in_thread(_asked, service, body, record_of(http.scope).key)
    return await respond(service, http, asked)


def _asked(service: Service, body: bytes, key: bytes | None) -> Asked:
    given = decode(body, ChatRequest)
    service.metrics.unknown_fields.inc(unknown_fields(body, ChatRequest))
    service.check_model(given.model)
    most = given.max_tokens if given.max_completion_tokens is None else given.max_completion_tokens
    params = sampling_params(given, service.params, service.limits, most, _logprobs(given))
    request = service.conversations.request(given, params, service.salt(key, given.cache_salt))
    prompt = request.prompts[0] if given.return_token_ids else None
    return Asked(
        request,
        ChatReply(service.names[0], service.model.tokenizer, params.n, prompt),
        stream=bool(given.stream),
        include_usage=given.stream_options is not None and bool(given.stream_options.include_usage),
    )


def _logprobs(given: ChatRequest) -> int | None:
    """Number of likeliest tokens to report beside each token; None for no log-probabilities."""
    if given.logprobs:
        return given.top_logprobs or 0
    if given.top_logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    return None
