"""The huggingface_hub client of one repository: token, retries with back-off, errors in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    fix_hf_endpoint_in_url,
    get_session,
    hf_raise_for_status,
)

from ... import __version__
from ...errors import HubError, NpuqError
from ...inputs.json_text import parse_json, parse_object
from ...inputs.names import FileName
from ..hub import Answer
from ..names import CommitId, HubRepoId, Revision, parse_repo
from ..transfer import limits
from ..transfer.retry import Backoff, retried
from ..transfer.wording import (
    OfflineError,
    brief,
    connection_failed,
    disk_failed,
    not_understood,
    one_line,
    passwords_in,
    quoted,
    status_failed,
    without_secrets,
    without_userinfo,
)
from . import faults

T = TypeVar("T")

_TOKEN_PAGE = "https://huggingface.co/settings/tokens"
_NEXT = re.compile(r"""<([^<>]*)>\s*;\s*rel\s*=\s*"?next\b""")
_ANSWER_SECONDS = 60.0


class Client:
    """huggingface_hub and one repository. `token` None: the ecosystem's own (HF_TOKEN, `hf auth login`)."""

    raised = faults.RAISED

    def __init__(self, repo: str, token: str | None = None, backoff: Backoff | None = None):
        self.repo = parse_repo(repo, HubRepoId)
        self.backoff = backoff or Backoff()
        self._token = token
        self.api = HfApi(token=token, library_name="npuq", library_version=__version__)
        self.endpoint = str(self.api.endpoint)

    @property
    def page(self) -> str:
        """The address of the repository, for messages."""
        return f"{without_userinfo(self.endpoint)}/{self.repo}"

    def ask(self, doing: str, question: Callable[[HfApi], T], attempts: int | None = None) -> T:
        """Call one of the client's own methods, with retries as of `call`."""

        def asked() -> T:
            with faults.of_the_client():
                return question(self.api)

        return self.call(doing, asked, attempts)

    def call(self, doing: str, action: Callable[[], T], attempts: int | None = None) -> T:
        """Do `action`, again after transient faults; other errors become a HubError that begins with `doing`."""
        return retried(self, doing, action, attempts)

    def is_transient(self, error: BaseException) -> bool:
        return faults.is_transient(error)

    def retry_after(self, error: BaseException) -> float:
        return faults.retry_after(error)

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turn errors of the hub, the connection and the disk inside the context into a HubError of one line."""
        try:
            yield
        except self.raised as error:
            raise self.failure(doing, error) from None

    def failure(self, doing: str, error: Exception) -> NpuqError:
        """The error for the user, which begins with `doing`. Raise it `from None`: the original has request headers."""
        secrets = (self._token, get_token(), *passwords_in(self.endpoint))
        if isinstance(error, NpuqError):
            error.args = (without_secrets(str(error), secrets),)
            return error
        reason = self._reason(faults.innermost(error))
        return type(reason)(without_secrets(one_line(f"{doing}: {reason}"), secrets))

    def commit_of(self, revision: Revision) -> CommitId:
        """The present commit of a branch or a tag."""
        url = f"{self.endpoint}/api/models/{self.repo}/revision/{quote(revision, safe='')}"
        where = f"{self.repo}: what the hub says of it"
        answer = parse_object(self.get(url, limits.MOST_JSON_BYTES)[0], where, HubError)
        return CommitId.parse(answer.get("sha"), where, HubError)

    def tree(self, commit: CommitId) -> Iterator[Any]:
        """Yield the raw entries of the hub's listing of a commit, page by page."""
        url: str | None = f"{self.endpoint}/api/models/{self.repo}/tree/{commit}?recursive=true"
        pages = 0
        while url is not None:
            if pages == limits.MOST_PAGES:
                raise HubError(
                    f"{self.repo}: the hub's listing has more than {pages} pages; npuq reads no such listing"
                )
            pages += 1
            content, url = self.get(url, limits.MOST_JSON_BYTES)
            page = parse_json(content, f"{self.repo}: the hub's listing", HubError)
            if not isinstance(page, list):
                raise HubError(f"{self.repo}: the hub's listing is no list")
            yield from page

    def get(self, url: str, most: int) -> tuple[bytes, str | None]:
        """Get a body of at most `most` bytes, and the address of the next page; None without one."""
        with self.stream(url, seconds=max(_ANSWER_SECONDS, constants.HF_HUB_DOWNLOAD_TIMEOUT)) as answer:
            if answer.is_compressed:
                raise HubError(f"{self.repo}: the hub's answer is compressed, which it was asked not to be")
            content = bytearray()
            for piece in answer.pieces:
                content += piece
                if len(content) > most:
                    raise HubError(
                        f"{self.repo}: the hub sends more than the {most} bytes that npuq reads of an answer"
                    )
            return bytes(content), self._next_page(answer)

    @contextmanager
    def stream(self, url: str, headers: Mapping[str, str] | None = None, *, seconds: float) -> Iterator[Answer]:
        """Stream an answer's undecoded body; no wait for a piece takes longer than `seconds`.

        Raises the client's errors for a refusal.
        """
        # Identity: ranges and sizes of a compressed body would not be the listing's.
        with faults.of_the_client():
            asked = {**build_hf_headers(token=self.api.token, library_name="npuq"), "Accept-Encoding": "identity"}
        asked |= headers or {}
        with self._answer(url, asked, seconds) as response:
            with faults.of_the_client():
                if response.is_error:
                    # Closed unread: the client would read a body of any length for the reason, which a header has too.
                    response.close()
                hf_raise_for_status(response)
            yield Answer(response.status_code, response.headers, _pieces(response))

    @contextmanager
    def _answer(self, url: str, headers: Mapping[str, str], seconds: float) -> Iterator[Any]:
        """The client's response after redirects, with all bodies unread."""
        # A network that drops all packets must fail faster than a slow answer.
        timeout = (min(seconds, constants.HF_HUB_ETAG_TIMEOUT), seconds, seconds, seconds)
        with faults.of_the_client():
            session = get_session()
            request = session.build_request("GET", url, headers=dict(headers), timeout=timeout)
        for _ in range(limits.MOST_REDIRECTS + 1):
            # By hand: the client would read each redirect's body, of any length. The client builds the next request,
            # without the token for another origin.
            with faults.of_the_client():
                response = session.send(request, stream=True, follow_redirects=False)
            try:
                if response.next_request is None:
                    yield response
                    return
                request = response.next_request
            finally:
                response.close()
        raise HubError(
            f"{self.repo}: the hub redirects more than {limits.MOST_REDIRECTS} times; npuq follows it no further"
        )

    def file_url(self, name: FileName, commit: CommitId) -> str:
        """The address of a file's content, or of a redirect to it."""
        return hf_hub_url(self.repo, name, revision=commit, endpoint=self.endpoint)

    def _next_page(self, answer: Answer) -> str | None:
        found = _NEXT.search(answer.headers.get("Link", ""))
        if found is None:
            return None
        try:
            # A mirror passes on huggingface.co's own addresses.
            address = fix_hf_endpoint_in_url(urljoin(f"{self.endpoint}/", found[1]), self.endpoint)
            ours, theirs = urlsplit(self.endpoint), urlsplit(address)
        except ValueError:
            raise HubError(f"{self.repo}: the hub's listing goes on at what is no address") from None
        # The request carries the token, and the user's name and password of the endpoint's address.
        if (ours.scheme, _host(ours.netloc)) != (theirs.scheme, _host(theirs.netloc)):
            raise HubError(f"{self.repo}: the hub's listing goes on at another address; refusing to follow it")
        return theirs._replace(netloc=ours.netloc).geturl()

    def _reason(self, error: BaseException) -> HubError:
        if isinstance(error, HfHubHTTPError):
            return self._refusal(error)
        if isinstance(error, LocalTokenNotFoundError):
            reason = f"no token: make one with write access at {_TOKEN_PAGE} and set HF_TOKEN, or run `hf auth login`"
            return HubError(reason)
        if isinstance(error, OfflineModeIsEnabled):
            return OfflineError(f"not in the local cache, and the hub cannot be asked ({brief(error)})")
        if isinstance(error, HFValidationError):
            return HubError(f"{self.repo!r} is not a name the hub accepts: {brief(error)}")
        if isinstance(error, (faults.HTTP_ERROR, ConnectionError, TimeoutError)):
            return connection_failed(self.endpoint, error, passing=faults.is_transient(error))
        if isinstance(error, OSError) and error.errno is not None:
            return disk_failed(error)
        return not_understood(error)

    def _refusal(self, error: HfHubHTTPError) -> HubError:
        if isinstance(error, GatedRepoError):
            return HubError(f"{self.repo} is gated: ask for access at {self.page}, then give that user's token")
        if isinstance(error, RepositoryNotFoundError):
            return HubError(f"there is no repository {self.repo}, or this token may not see it")
        if isinstance(error, RevisionNotFoundError):
            return HubError(f"{self.repo} has no such revision")
        if isinstance(error, EntryNotFoundError):
            return HubError(f"{self.repo} has no such file")
        status, reason = error.response.status_code, error.server_message or ""
        if status in (401, 403) and faults.is_store(error):
            return HubError(f"the hub's store refuses the upload (status {status}) {quoted(reason)}")
        if status == 401:
            return HubError(f"the hub does not accept the token; make a new one at {_TOKEN_PAGE} and set HF_TOKEN")
        if status == 403:
            request = error.response.request
            if request.method in ("GET", "HEAD") and not request.url.path.endswith("/auth-check/write"):
                return HubError(f"this token may not read {self.repo} {quoted(reason)}")
            return HubError(
                f"the token may not write to {self.repo}; give one with write access, from {_TOKEN_PAGE} "
                f"{quoted(reason)}"
            )
        return status_failed(status, reason)


def _pieces(response: Any) -> Iterator[bytes]:
    """Yield the undecoded body in pieces."""
    with faults.of_the_client():
        yield from response.iter_raw()


def _host(netloc: str) -> str:
    return netloc.rpartition("@")[2]
