"""The modelscope_hub client of one repository, by its public methods: listing, uploads, errors in one line."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar

from ...errors import HubError, NpuqError
from ...inputs.names import FileName, Sha256
from ..hub import Answer
from ..listing import Listing, parse_listing
from ..names import Digest, RepoId, Revision, byte_count, parse_repo
from ..transfer import limits
from ..transfer.retry import Backoff, ClientError, client_code, retried
from ..transfer.wording import (
    connection_failed,
    disk_failed,
    is_insecure,
    not_understood,
    one_line,
    passwords_in,
    quoted,
    status_failed,
    without_secrets,
    without_userinfo,
)

T = TypeVar("T")

_TYPE: Final = "model"
_TOKEN_PAGE: Final = "https://modelscope.cn/my/myaccesstoken"
_INSTALL: Final = "pip install 'npuq[modelscope]'"
_PIECE: Final = 1 << 16


class Client:
    """The client and one repository. `token` None: the client's own (MODELSCOPE_API_TOKEN, `modelscope login`)."""

    def __init__(self, repo: str, token: str | None = None, backoff: Backoff | None = None):
        try:
            import modelscope_hub
        except ImportError:
            raise HubError(f"ModelScope's client is not installed: run {_INSTALL}") from None
        self.repo = parse_repo(repo, RepoId)
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
        self.backoff = backoff or Backoff()
        self._config = modelscope_hub.HubConfig(token=token)
        self._api = modelscope_hub.HubApi(self._config)
        self._endpoint = str(self._config.endpoint)
        # Here, before any thread starts: the client makes its sessions lazily.
        self._legacy = self._api.legacy
        limit_answers = import_module(f"{__package__}.answers").limit_answers
        for asking in (self._legacy, self._api.openapi):
            limit_answers(asking, limits.MOST_JSON_BYTES)
        self._errors: Any = modelscope_hub.errors
        # The client's own HTTP library.
        self._requests: Any = import_module("requests.exceptions")
        self._urllib3: Any = import_module("urllib3.exceptions")
        hubs, requests, urllib3 = self._errors.HubError, self._requests.RequestException, self._urllib3.HTTPError
        self.raised: tuple[type[Exception], ...] = (hubs, requests, urllib3, NpuqError, OSError, ClientError)

    @property
    def page(self) -> str:
        """The address of the repository, for messages."""
        return f"{without_userinfo(self._endpoint)}/models/{self.repo}"

    @property
    def cache(self) -> Path:
        """The folder of the client's downloads."""
        return Path(self._config.cache_dir)

    def ask(self, doing: str, question: Callable[[Any], T], attempts: int = 1) -> T:
        """Call one of the client's own methods; errors become a HubError of one line.

        The client itself retries queries and commits, but not uploads: `attempts` is for those.
        """

        def asked() -> T:
            with client_code(self.raised):
                return question(self._api)

        return retried(self, doing, asked, attempts)

    @contextlib.contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turn errors of the hub, the connection and the disk inside the context into a HubError of one line."""
        try:
            yield
        except self.raised as error:
            raise self.failure(doing, error) from None

    def is_transient(self, error: BaseException) -> bool:
        """True where the same request may soon succeed."""
        errors, requests, urllib3 = self._errors, self._requests, self._urllib3
        lost = (
            *(errors.NetworkError, errors.ServerError, errors.RateLimitError),
            *(requests.ConnectionError, requests.Timeout, requests.ChunkedEncodingError),
            *(urllib3.ProtocolError, urllib3.TimeoutError),
            *(ConnectionError, TimeoutError),
        )
        return isinstance(error, lost) and not is_insecure(error)

    def retry_after(self, error: BaseException) -> float:
        """The seconds to wait that an answer demands (Retry-After); 0 without a demand."""
        asked = getattr(error, "retry_after", None)
        return float(asked) if isinstance(asked, (int, float)) and 0 < asked < 10**6 else 0.0

    def failure(self, doing: str, error: Exception) -> NpuqError:
        """The error for the user, in one line that begins with `doing`."""
        secrets = (self._config.token, *passwords_in(self._endpoint))
        if isinstance(error, NpuqError):
            error.args = (without_secrets(str(error), secrets),)
            return error
        reason = self._reason(error)
        return type(reason)(without_secrets(one_line(f"{doing}: {reason}"), secrets))

    def _reason(self, error: Exception) -> HubError:
        errors = self._errors
        if isinstance(error, ClientError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        if isinstance(error, errors.AuthenticationError):
            return HubError(
                f"no token, or one that ModelScope does not accept: make one at {_TOKEN_PAGE}, set MODELSCOPE_API_TOKEN"
            )
        if isinstance(error, errors.PermissionDeniedError):
            return HubError(f"the token may not do this in {self.repo}; give one that may, from {_TOKEN_PAGE}")
        if isinstance(error, errors.NotExistError):
            return HubError(f"{self.repo} has no such file or revision, or is not there, or this token may not see it")
        if isinstance(error, errors.RateLimitError):
            return status_failed(429, "")
        if isinstance(error, errors.ServerError):
            return status_failed(getattr(error, "status_code", None) or 500, "")
        if isinstance(error, self._requests.JSONDecodeError):
            return not_understood(error)
        if isinstance(error, (errors.NetworkError, self._requests.RequestException, self._urllib3.HTTPError)):
            return connection_failed(self._endpoint, error, passing=self.is_transient(error))
        if isinstance(error, OSError) and error.errno is not None:
            return disk_failed(error)
        if isinstance(error, ConnectionError):
            return connection_failed(self._endpoint, error, passing=True)
        if isinstance(error, errors.HubError):
            reason = getattr(error, "message", None) or str(error)
            return HubError(f"ModelScope refused {quoted(str(reason))}")
        return not_understood(error)

    def put(self, name: FileName, content: Path | bytes, branch: Revision, title: str) -> None:
        """Send a file, unless ModelScope has its content, and commit it."""
        # The client prints its commits on stdout, which is reserved for results.
        with contextlib.redirect_stdout(io.StringIO()):
            self.ask(
                f"sending {name}",
                lambda api: api.upload_file(
                    self.repo, _TYPE, content, name, revision=branch, commit_message=title, disable_tqdm=True
                ),
                self.backoff.attempts,
            )

    def remove(self, names: list[FileName], branch: Revision, title: str) -> None:
        """Delete files, in one commit."""
        self.ask(
            f"deleting {', '.join(names)}",
            lambda api: api.delete_files(self.repo, _TYPE, names, revision=branch, commit_message=title),
        )

    def open_or_make(self, private: bool | None) -> None:
        """Check the token, and make the repository where missing."""
        pushing = f"pushing to {self.repo}"
        self.ask(pushing, lambda api: api.whoami())
        if not self.ask(pushing, lambda api: api.repo_exists(self.repo, _TYPE)):
            visibility = None if private is None else ("private" if private else "public")
            self.ask(pushing, lambda api: api.create_repo(self.repo, _TYPE, visibility=visibility))

    def tag(self, tag: str, branch: Revision) -> None:
        """Tag a branch's present state."""
        self.ask(
            f"tagging {self.repo} as {tag!r}",
            lambda api: api.create_repo_tag(self.repo, _TYPE, tag, revision=branch),
        )

    def list_files(self, branch: Revision) -> Listing:
        """List every file of a branch with its size and sha256."""
        entries = self.ask(f"listing {self.repo}", lambda api: api.list_repo_files(self.repo, _TYPE, revision=branch))
        return parse_listing(entries, self.repo, _entry)

    @contextlib.contextmanager
    def open(self, name: FileName, branch: Revision, start: int, end: int) -> Iterator[Answer]:
        """Request bytes [start, end) of a file. The client's own download would draw progress bars."""
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with client_code(self.raised):
            response = self._legacy.download_stream(self.repo, _TYPE, name, branch, headers=headers)
        with contextlib.closing(response):
            yield Answer(response.status_code, response.headers, self._pieces(response))

    def _pieces(self, response: Any) -> Iterator[bytes]:
        with client_code(self.raised):
            yield from response.raw.stream(_PIECE, decode_content=False)


def _entry(file: Any, where: str) -> tuple[Any, int, Digest | None] | None:
    if file.type == "tree":
        return None
    digest = Sha256.parse(str(file.sha256).lower(), where, HubError) if file.sha256 else None
    return file.path, byte_count(file.size, where), digest
