"""Fields of a request that all endpoints share, and the sampling parameters that follow from them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from ..errors import GenerationError
from ..runtime import SamplingParams
from .http.errors import bad_request
from .limits import MOST_BIASES, MOST_STOP_CHARACTERS, MOST_STOPS, Limits

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
StopText = Annotated[str, msgspec.Meta(min_length=1, max_length=MOST_STOP_CHARACTERS)]


class StreamOptions(msgspec.Struct):
    """Options of a stream beside its chunks."""

    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """The shared fields; null is the same as a field left out. Unknown ones are ignored.

    temperature to seed: as of `SamplingParams`, by OpenAI's and vLLM's names; the model's generation_config.json says
    what is left out, and temperature is 1 where it says nothing. cache_salt: the prompt shares cached blocks only with
    requests of the same salt. priority: 0 is the only one.
    """

    model: str | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=1 << 53)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[TokenId, float], msgspec.Meta(max_length=MOST_BIASES)] | None = None
    min_tokens: Count | None = None
    stop: StopText | Annotated[list[StopText], msgspec.Meta(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=MOST_BIASES)] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    priority: int | None = None
    return_token_ids: bool | None = None


_ANY_LENGTH = 1 << 62
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "seed", "n"),
)


def sampling_params(
    fields: SamplingFields,
    defaults: SamplingParams,
    limits: Limits,
    max_new_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The parameters of a request. max_new_tokens: None is as many as the context leaves.

    Raises ApiError for values out of range.
    """
    if fields.n is not None and fields.n > limits.max_choices:
        raise bad_request(f"n {fields.n} is above {limits.max_choices}, the limit of this server", "n")
    if fields.priority:
        raise bad_request("priority is not supported: requests are served in their order", "priority")
    given: dict[str, Any] = {name: getattr(fields, name) for name in _SAMPLING if getattr(fields, name) is not None}
    if given.get("top_k") == -1:  # another way to turn it off
        given["top_k"] = 0
    given |= {"max_new_tokens": _ANY_LENGTH if max_new_tokens is None else max_new_tokens}
    given |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    try:
        return SamplingParams.of(defaults, given)
    except GenerationError as error:
        message = str(error).replace("max_new_tokens", "max_tokens")
        word = message.split()[0]
        raise bad_request(message, word if word in fields.__struct_fields__ else None) from None
