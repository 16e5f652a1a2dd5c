"""A conversation with a model behind an OpenAI-compatible server. It is not trusted: replies are read with limits.

Fields as in OpenAI's chat completions; the reasoning of an answer comes as `reasoning_content` (SGLang, DeepSeek) or
`reasoning` (vLLM).
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPException, HTTPResponse
from ipaddress import ip_address
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from ... import __version__
from ...errors import GenerationError, RemoteError
from ...inputs.event_stream import read_events
from ...inputs.json_text import parse_object
from ...inputs.printable import printable, shown
from .chat_model import Delta, Ending, Message, StopReply

SILENCE_SECONDS: Final = 600.0
"""So long a server may send nothing; OpenAI's client waits as long."""
_MOST_DOCUMENT_BYTES: Final = 4 << 20
_MOST_KEY: Final = 4096
# What SamplingParams calls otherwise than the protocol.
_FIELD_NAMES: Final = {"max_new_tokens": "max_tokens"}
_SETTINGS: Final = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("max_new_tokens", "min_tokens", "seed", "stop", "stop_token_ids", "logit_bias", "ignore_eos", "reasoning_effort"),
)


def is_url(text: str) -> bool:
    """True for an argument that names a server and no directory."""
    return text.lower().startswith(("http://", "https://"))


class ServerChat:
    """A model behind the URL of a server: `http://host:port`, or a base URL such as `https://host/v1`.

    model: its name there; the first of those that the server lists without one. Raises RemoteError.
    """

    context: int | None = None

    def __init__(
        self, url: str, model: str | None = None, api_key: str | None = None, variables: Mapping[str, Any] | None = None
    ):
        self.base, host, encrypted = _base_url(url)
        local = _is_loopback(host)
        # A proxy of the environment cannot reach this machine's own addresses.
        self._opener = build_opener(_NoRedirects, *([ProxyHandler({})] if local else []))
        self._headers = {"User-Agent": f"npuq/{__version__}", "Accept": "application/json, text/event-stream"}
        self.notes = []
        if api_key is not None:
            if not re.fullmatch(rf"[\x21-\x7e]{{1,{_MOST_KEY}}}", api_key):
                raise RemoteError("the API key must be printable ASCII without spaces")
            self._headers["Authorization"] = f"Bearer {api_key}"
            if not encrypted and not local:
                self.notes.append(f"the API key goes to {host} unencrypted; use https where others share the network")
        self._variables = dict(variables or {})
        self.name = model if model is not None else self._first_model()

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise GenerationError for a name that is no setting; the server itself judges the values."""
        for name in settings:
            if name not in _SETTINGS:
                raise GenerationError(f"{name} is no setting; there are {', '.join(_SETTINGS)}")

    def reply(self, messages: Sequence[Message], settings: Mapping[str, Any]) -> ServerReply:
        """Begin an answer."""
        body: dict[str, Any] = {_FIELD_NAMES.get(name, name): value for name, value in settings.items()}
        # Reasoning stays here: templates leave that of earlier answers out, and some servers refuse it.
        body["messages"] = [{"role": message["role"], "content": message["content"]} for message in messages]
        body |= {"model": self.name, "stream": True, "stream_options": {"include_usage": True}}
        if self._variables:
            body["chat_template_kwargs"] = self._variables
        return ServerReply(self, body)

    def close(self) -> None:
        """Nothing is kept open between answers."""

    def open(self, path: str, body: Mapping[str, Any] | None = None) -> HTTPResponse:
        """Send a request (POST with a body) and return the response of status 200. Raises RemoteError."""
        headers = dict(self._headers)
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        with self.faults():
            try:
                response = self._opener.open(Request(self.base + path, data, headers), timeout=SILENCE_SECONDS)
            except HTTPError as refusal:
                with refusal:
                    raise RemoteError(f"{self.base}{path}: {self._refusal(refusal)}") from refusal
        if not isinstance(response, HTTPResponse) or response.status != 200:
            raise RemoteError(f"{self.base}{path}: answers with status {shown(getattr(response, 'status', None))}")
        return response

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Turn errors of the connection, and of what comes through it, into a RemoteError."""
        try:
            yield
        except TimeoutError as cause:
            raise RemoteError(f"{self.base}: sent nothing for {SILENCE_SECONDS:g} s") from cause
        except URLError as cause:
            reason = getattr(cause.reason, "strerror", None) or cause.reason
            raise RemoteError(
                f"{self.base}: cannot be reached: {_short(reason)}; is a server running there?"
            ) from cause
        except (OSError, HTTPException, ValueError) as cause:  # ValueError: of http.client, on malformed lengths
            what = getattr(cause, "strerror", None) or cause
            raise RemoteError(f"{self.base}: the connection broke: {_short(what) or type(cause).__name__}") from cause

    def _refusal(self, refusal: HTTPError) -> str:
        """A line from a response of another status than 200."""
        if 300 <= refusal.code < 400:
            target = _short(refusal.headers.get("Location", "nowhere"))
            return f"redirects to {target}; give that address if you trust it"
        try:
            value = parse_object(refusal.read(_MOST_DOCUMENT_BYTES), "error", RemoteError)
        except RemoteError:
            return f"answers with status {refusal.code} {_short(refusal.reason)}"
        said = f"{_error_message(value) or _short(refusal.reason)} (status {refusal.code})"
        after = refusal.headers.get("Retry-After", "")
        if refusal.code == 401:
            said += "; give the key in $NPUQ_API_KEY or with --api-key-file"
        return said + (f"; ask again in {int(after)} s" if re.fullmatch("[0-9]{1,6}", after) else "")

    def _first_model(self) -> str:
        where = f"{self.base}/models"
        with self.open("/models") as response, self.faults():
            content = response.read(_MOST_DOCUMENT_BYTES + 1)
        if len(content) > _MOST_DOCUMENT_BYTES:
            raise RemoteError(f"{where}: is larger than {_MOST_DOCUMENT_BYTES} bytes")
        listed = parse_object(content, where, RemoteError).get("data")
        models = listed if isinstance(listed, list) else []
        first = models[0] if models else None
        if not isinstance(first, dict) or not isinstance(first.get("id"), str) or not first["id"]:
            raise RemoteError(f"{where}: lists no model; name one with --model")
        context = first.get("max_model_len")
        if type(context) is int and context > 0:
            self.context = context
        if len(models) > 1:
            self.notes.append(f"the server has {len(models)} models; --model chooses another than the first")
        name: str = first["id"]
        return name


class ServerReply:
    """An answer as a server streams it."""

    def __init__(self, chat: ServerChat, body: Mapping[str, Any]):
        self.ending = Ending()
        self._chat = chat
        self._body = body
        self._response: HTTPResponse | None = None
        self._is_reading = True
        self._deltas = self._read()

    def __iter__(self) -> ServerReply:
        return self

    def __next__(self) -> Delta:
        try:
            return next(self._deltas)
        except BaseException:
            self._is_reading = False
            raise

    def stop(self) -> None:
        """Leave the wait for the server: the closed connection tells it to stop."""
        if self._is_reading:
            raise StopReply

    def close(self) -> None:
        """Close the connection."""
        self._deltas.close()
        if self._response is not None:
            self._response.close()

    def _read(self) -> Generator[Delta, None, None]:
        path = "/chat/completions"
        where = self._chat.base + path
        self._response = response = self._chat.open(path, self._body)
        kind = response.headers.get_content_type()
        if kind != "text/event-stream":
            raise RemoteError(f"{where}: answers with {_short(kind)} where a stream of events was asked for")
        with self._chat.faults():
            for data in read_events(response, where, RemoteError):
                if data.strip() == "[DONE]":
                    return
                yield from self._deltas_of(parse_object(data, where, RemoteError), where)
        if self.ending.finish_reason is None:
            raise RemoteError(f"{where}: the stream ended before the answer did")

    def _deltas_of(self, chunk: Mapping[str, Any], where: str) -> Iterator[Delta]:
        if chunk.get("error"):
            raise RemoteError(f"{where}: {_error_message(chunk) or 'an error without a message'}")
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._note_usage(usage)
        choices = _of_type(chunk.get("choices"), list, "choices", where)
        for choice in choices or ():
            fields = _of_type(choice, dict, "a choice", where) or {}
            delta = _of_type(fields.get("delta"), dict, "delta", where) or {}
            content = _of_type(delta.get("content"), str, "content", where) or ""
            reasoning = delta.get("reasoning_content")
            if reasoning is None:
                reasoning = delta.get("reasoning")
            reasoning = _of_type(reasoning, str, "reasoning_content", where) or ""
            reason = _of_type(fields.get("finish_reason"), str, "finish_reason", where)
            if reason is not None:
                self.ending = replace(self.ending, finish_reason=printable(reason)[:40])
            if reasoning:
                yield Delta(reasoning=reasoning)
            if content:
                yield Delta(content=content)

    def _note_usage(self, usage: Mapping[str, Any]) -> None:
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        counts = [_count(value) for value in (usage.get("prompt_tokens"), cached, usage.get("completion_tokens"))]
        self.ending = Ending(self.ending.finish_reason, *counts)


class _NoRedirects(HTTPRedirectHandler):
    """Refuses redirects: they would take the key and the conversation elsewhere."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        """Make no new request; the redirect then is an HTTPError."""


def _base_url(url: str) -> tuple[str, str, bool]:
    """(URL before `/chat/completions`, host, whether it is encrypted) of what the user gave. Raises RemoteError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as cause:
        raise RemoteError(f"{_short(url)}: is no URL: {_short(cause)}") from cause
    if not host or not re.fullmatch(r"[\x21-\x7e]+", url) or parts.query or parts.fragment or port == 0:
        raise RemoteError(f"{_short(url)}: is no URL of a server; write it like http://localhost:8000")
    if parts.username is not None or parts.password is not None:
        raise RemoteError("a URL must not hold a password; give the key in $NPUQ_API_KEY or with --api-key-file")
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme.lower()}://{parts.netloc}{path}", host, parts.scheme.lower() == "https"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _error_message(value: Mapping[str, Any]) -> str:
    """The message of an error in OpenAI's form, or of one of its kin."""
    error = value.get("error")
    candidates = [error.get("message") if isinstance(error, dict) else error, value.get("message"), value.get("detail")]
    return _short(next((each for each in candidates if isinstance(each, str)), ""))


def _of_type(value: Any, kind: type, name: str, where: str) -> Any:
    if value is None or isinstance(value, kind):
        return value
    raise RemoteError(f"{where}: sends {name} of type {type(value).__name__}; is it OpenAI-compatible?")


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 40 else None


def _short(value: object) -> str:
    return printable(" ".join(str(value).split()))[:300]
