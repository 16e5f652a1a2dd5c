"""The endpoint of completions."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ...runtime import Request
from ..fields import sampling_params
from ..http.access import record_of
from ..http.bodies import decode, unknown_fields
from ..http.errors import bad_request
from ..reply import Asked
from ..responding import respond
from ..service import Service
from .documents import CompletionReply
from .request import CompletionRequest, prompt_of, prompts_of


async def completions(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `POST /v1/completions`."""
    asked = await service.in_thread(_asked, service, body, record_of(http.scope).key)
    return await respond(service, http, asked)


def _asked(service: Service, body: bytes, key: bytes | None) -> Asked:
    given = decode(body, CompletionRequest)
    service.metrics.unknown_fields.inc(unknown_fields(body, CompletionRequest))
    service.check_model(given.model)
    if given.suffix:
        raise bad_request("suffix is not supported: the model continues texts only", "suffix")
    if given.best_of not in (None, given.n or 1):
        raise bad_request("best_of is not supported beside n", "best_of")
    params = sampling_params(
        given,
        service.params,
        service.limits,
        given.max_tokens or (None if given.max_tokens is None else 1),  # a step is taken for the prompt alone, too
        logprobs=given.logprobs,
        prompt_logprobs=given.logprobs if given.echo else None,
    )
    texts = prompts_of(given.prompt)
    service.check_count(len(texts), params.n)
    prompts = [prompt_of(service, text, bool(given.echo)) for text in texts]
    # Each choice of a prompt repeats its tokens.
    tokens, most = sum(len(prompt.tokens) for prompt in prompts) * params.n, service.limits.max_queued_tokens
    if params.prompt_logprobs is not None and tokens > most:
        raise bad_request(f"echo with logprobs of {tokens} prompt tokens is above {most}, the limit of this server")
    reply = CompletionReply(service, given, prompts, params.n)
    return Asked(
        Request([prompt.tokens for prompt in prompts], params, salt=service.salt(key, given.cache_salt)),
        reply,
        stream=bool(given.stream),
        include_usage=given.stream_options is not None and bool(given.stream_options.include_usage),
        prompt_chunk=None if params.prompt_logprobs is None else reply.prompt_chunk,
    )
