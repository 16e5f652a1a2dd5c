"""`POST /tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..runtime.engine import check_token_ids
from .fields import TokenId
from .http.bodies import decode
from .http.documents import json_response
from .service import Service


class TokenizeRequest(msgspec.Struct):
    """The body of `/tokenize`. add_special_tokens: as before a prompt."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct):
    """The body of `/detokenize`."""

    tokens: Annotated[list[TokenId], msgspec.Meta(max_length=1 << 17)]
    model: str | None = None


async def tokenize(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer with the token ids of a text, without a limit but the body's."""
    given = decode(body, TokenizeRequest)
    service.check_model(given.model)
    tokens = await service.in_thread(service.model.tokenizer.encode, given.prompt, given.add_special_tokens)
    return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": service.model.context})


async def detokenize(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer with the text of token ids, special tokens left out."""
    given = decode(body, DetokenizeRequest)
    service.check_model(given.model)
    return json_response({"prompt": await service.in_thread(_text, service, given.tokens)})


def _text(service: Service, tokens: list[int]) -> str:
    if tokens:
        check_token_ids(tokens, service.model.engine.model.config.vocab_size)
    return service.model.tokenizer.decode(tokens)
