"""ModelScope, through the public methods of its client (`modelscope_hub.HubApi`): one repository, what it lists and
sends, and how its errors are said."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar

from ..errors import HubError, NpuqError
from ..inputs.names import FileName, Sha256
from . import client, faults
from .client import Backoff
from .huggingface import parse_listing
from .names import Digest, RepoId, Revision, byte_count
from .repository import Answer, Listing

T = TypeVar("T")

_TYPE: Final = "model"
_TOKEN_PAGE: Final = "https://modelscope.cn/my/myaccesstoken"
_INSTALL: Final = "pip install 'npuq[modelscope]'"
_PIECE: Final = 1 << 16


class ModelScope:
    """One repository on ModelScope. `token` None: the client's own (MODELSCOPE_API_TOKEN, `modelscope login`)."""

    def __init__(self, repo: str, token: str | None = None, backoff: Backoff | None = None):
        try:
            import modelscope_hub
        except ImportError:
            raise HubError(f"ModelScope's client is not installed: run {_INSTALL}") from None
        self.repo = _repo_id(repo)
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
        self.backoff = backoff or Backoff()
        self.config = modelscope_hub.HubConfig(token=token)
        self.api = modelscope_hub.HubApi(self.config)
        self.endpoint = str(self.config.endpoint)
        # Here, where no threads are yet: the client makes them when they are first asked for.
        self._legacy = self.api.legacy
        limit_answers = import_module(f"{__package__}.modelscope_http").limit_answers
        for asking in (self._legacy, self.api.openapi):
            limit_answers(asking, client.MOST_JSON_BYTES)
        self._errors: Any = modelscope_hub.errors
        # What the client itself stands on.
        self._requests: Any = import_module("requests.exceptions")
        self._urllib3: Any = import_module("urllib3.exceptions")
        self.raised: tuple[type[Exception], ...] = (self._errors.HubError, self._urllib3.HTTPError, *faults.RAISED)

    def call(self, doing: str, action: Callable[[], T], attempts: int = 1) -> T:
        """Do `action`; its errors become a HubError of one line.

        The client itself tries again what it asks and commits, but not what it uploads: that is what `attempts` is for.
        """
        attempt = 1
        while True:
            try:
                return action()
            except self.raised as error:
                if attempt >= attempts or not self.is_transient(error):
                    raise self.failure(doing, error) from None
                asked = self.asked_seconds(error)
            self.backoff.wait(attempt, asked)
            attempt += 1

    def is_transient(self, error: BaseException) -> bool:
        """Whether the same request may succeed a little later."""
        errors, requests, urllib3 = self._errors, self._requests, self._urllib3
        lost = (
            *(errors.NetworkError, errors.ServerError, errors.RateLimitError),
            *(requests.ConnectionError, requests.Timeout, requests.ChunkedEncodingError),
            *(urllib3.ProtocolError, urllib3.TimeoutError),
            *(ConnectionError, TimeoutError),
        )
        return isinstance(error, lost) and not faults.is_insecure(error)

    def asked_seconds(self, error: BaseException) -> float:
        """How long an answer asks to wait; 0 where it does not say."""
        asked = getattr(error, "retry_after", None)
        return float(asked) if isinstance(asked, (int, float)) and 0 < asked < 10**6 else 0.0

    def failure(self, doing: str, error: Exception) -> NpuqError:
        """The error for the user, in one line that begins with `doing`."""
        if isinstance(error, NpuqError):
            return error
        reason = self._reason(error)
        text = faults.one_line(f"{doing}: {reason}")
        return type(reason)(text.replace(self.config.token, "***") if self.config.token else text)

    def _reason(self, error: Exception) -> HubError:
        errors = self._errors
        if isinstance(error, errors.AuthenticationError):
            return HubError(
                f"no token, or one that ModelScope does not accept: make one at {_TOKEN_PAGE}, set MODELSCOPE_API_TOKEN"
            )
        if isinstance(error, errors.PermissionDeniedError):
            return HubError(f"the token may not do this in {self.repo}; give one that may, from {_TOKEN_PAGE}")
        if isinstance(error, errors.NotExistError):
            return HubError(f"{self.repo} has no such file or revision, or is not there, or this token may not see it")
        if isinstance(error, errors.RateLimitError):
            return faults.status_failed(429, "")
        if isinstance(error, errors.ServerError):
            return faults.status_failed(getattr(error, "status_code", None) or 500, "")
        if isinstance(error, self._requests.JSONDecodeError):
            return faults.not_understood(error)
        if isinstance(error, (errors.NetworkError, self._requests.RequestException, self._urllib3.HTTPError)):
            return faults.connection_failed(self.endpoint, error, passing=self.is_transient(error))
        if isinstance(error, OSError) and error.errno is not None:
            return faults.disk_failed(error)
        if isinstance(error, ConnectionError):
            return faults.connection_failed(self.endpoint, error, passing=True)
        if isinstance(error, errors.HubError):
            said = getattr(error, "message", None) or str(error)
            return HubError(f"ModelScope refused {faults.quoted(str(said))}")
        return faults.not_understood(error)

    def put(self, name: FileName, content: Path | bytes, branch: Revision, title: str) -> None:
        """Send a file, unless ModelScope has its content, and commit it."""
        # The client prints what it commits on stdout, which is for our result.
        with contextlib.redirect_stdout(io.StringIO()):
            self.call(
                f"sending {name}",
                lambda: self.api.upload_file(
                    self.repo, _TYPE, content, name, revision=branch, commit_message=title, disable_tqdm=True
                ),
                self.backoff.attempts,
            )

    def remove(self, names: list[FileName], branch: Revision, title: str) -> None:
        """Delete files, in one commit."""
        self.call(
            f"deleting {', '.join(names)}",
            lambda: self.api.delete_files(self.repo, _TYPE, names, revision=branch, commit_message=title),
        )

    def open_or_make(self, private: bool | None) -> None:
        """Check the token, and make the repository where it is not there."""
        pushing = f"pushing to {self.repo}"
        self.call(pushing, self.api.whoami)
        if not self.call(pushing, lambda: self.api.repo_exists(self.repo, _TYPE)):
            visibility = None if private is None else ("private" if private else "public")
            self.call(pushing, lambda: self.api.create_repo(self.repo, _TYPE, visibility=visibility))

    def tag(self, tag: str, branch: Revision) -> None:
        """Tag what a branch holds."""
        self.call(
            f"tagging {self.repo} as {tag!r}",
            lambda: self.api.create_repo_tag(self.repo, _TYPE, tag, revision=branch),
        )

    def list_files(self, branch: Revision) -> Listing:
        """Every file of a branch with its size and sha256."""
        return self.call(
            f"listing {self.repo}",
            lambda: parse_listing(self.api.list_repo_files(self.repo, _TYPE, revision=branch), self.repo, _entry),
        )

    @contextlib.contextmanager
    def open(self, name: FileName, branch: Revision, start: int, end: int) -> Iterator[Answer]:
        """Ask for bytes [start, end) of a file. Not by the client's own download: that draws bars."""
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        response = self._legacy.download_stream(self.repo, _TYPE, name, branch, headers=headers)
        with contextlib.closing(response):
            yield Answer(response.status_code, response.headers, response.raw.stream(_PIECE, decode_content=False))


class ScopeRepository:
    """A repository on ModelScope at a branch, as `repository.Repository` describes it."""

    def __init__(self, scope: ModelScope, branch: Revision):
        self._scope = scope
        self._branch = branch

    @property
    def repo(self) -> RepoId:
        return self._scope.repo

    @property
    def backoff(self) -> Backoff:
        return self._scope.backoff

    @property
    def raised(self) -> tuple[type[Exception], ...]:
        return self._scope.raised

    def listing(self) -> Listing:
        return self._scope.list_files(self._branch)

    def open(self, name: FileName, start: int, end: int) -> contextlib.AbstractContextManager[Answer]:
        return self._scope.open(name, self._branch, start, end)

    def is_transient(self, error: BaseException) -> bool:
        return self._scope.is_transient(error)

    def asked_seconds(self, error: BaseException) -> float:
        return self._scope.asked_seconds(error)

    def failure(self, doing: str, error: Exception) -> NpuqError:
        return self._scope.failure(doing, error)


def _repo_id(text: str) -> RepoId:
    try:
        return RepoId(text)
    except ValueError as error:
        raise HubError(str(error)) from None


def _entry(file: Any, where: str) -> tuple[Any, int, Digest | None] | None:
    if file.type == "tree":
        return None
    digest = Sha256.parse(str(file.sha256).lower(), where, HubError) if file.sha256 else None
    return file.path, byte_count(file.size, where), digest
