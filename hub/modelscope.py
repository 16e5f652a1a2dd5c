"""Push and pull for ModelScope, through the public methods of its client (`modelscope_hub.HubApi`).

The client commits every file by itself and sends it in one piece. From that follows the order here: the old manifest
goes first, the weights come one by one, the small files after them, and the manifest last.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from ..errors import HubError, NpuqError
from ..quant.artifact import CARD_NAME, MANIFEST_NAME, read_manifest
from .card import merge_card
from .client import Backoff, is_repo_id
from .fetch import Wanted
from .parallel import in_order
from .progress import Silent, TransferProgress
from .pulling import manifest_files
from .pushing import PushSummary, default_title, local_files
from .remote_state import UNFINISHED_NAME, RemoteFile, refuse_strays
from .upload import LocalFile

T = TypeVar("T")

_TYPE = "model"
_MAIN = "master"
_WORKERS = 4
_TOKEN_PAGE = "https://modelscope.cn/my/myaccesstoken"
_INSTALL = "pip install 'npuq[modelscope]'"


class ModelScope:
    """One repository on ModelScope. `token` None: the client's own (MODELSCOPE_API_TOKEN, `modelscope login`)."""

    def __init__(self, repo: str, token: str | None = None, backoff: Backoff | None = None):
        try:
            import modelscope_hub
        except ImportError:
            raise HubError(f"ModelScope's client is not installed: run {_INSTALL}") from None
        if not is_repo_id(repo):
            raise HubError(f"{repo!r} is not a repository: write it as user/name")
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
        self.repo = repo
        self.backoff = backoff or Backoff()
        self.client = modelscope_hub
        self.config = modelscope_hub.HubConfig(token=token)
        self.api = modelscope_hub.HubApi(self.config)

    def call(self, doing: str, action: Callable[[], T], attempts: int = 1) -> T:
        """Do `action`; its errors become a HubError of one line.

        The client itself tries again what it asks and commits, but not what it uploads: that is what `attempts` is for.
        """
        attempt = 1
        while True:
            try:
                return action()
            except NpuqError:
                raise
            except (self.client.HubError, OSError) as error:
                if attempt >= attempts or not self._is_transient(error):
                    text = " ".join(f"{doing}: {self._reason(error)}".split())
                    raise HubError(text.replace(self.config.token, "***") if self.config.token else text) from None
            self.backoff.wait(attempt)
            attempt += 1

    def _is_transient(self, error: Exception) -> bool:
        errors = self.client.errors
        return isinstance(error, (errors.NetworkError, errors.ServerError, errors.RateLimitError, ConnectionError))

    def _reason(self, error: Exception) -> str:
        errors = self.client.errors
        if isinstance(error, errors.AuthenticationError):
            return (
                f"no token, or one that ModelScope does not accept: make one at {_TOKEN_PAGE}, set MODELSCOPE_API_TOKEN"
            )
        if isinstance(error, errors.PermissionDeniedError):
            return f"the token may not do this in {self.repo}; give one that may, from {_TOKEN_PAGE}"
        if isinstance(error, errors.NotExistError):
            return f"{self.repo} has no such file or revision, or is not there, or this token may not see it"
        if self._is_transient(error):
            return f"{str(error)[:160]}; run the same command again: it continues"
        return str(error)[:200]

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """Every file of a revision with its size and sha256."""
        listed = self.call(
            f"listing {self.repo}", lambda: self.api.list_repo_files(self.repo, _TYPE, revision=revision)
        )
        return {file.path: RemoteFile(file.size, "", file.sha256) for file in listed if file.type != "tree"}

    def read(self, name: str, revision: str) -> bytes:
        """The content of a small file; nothing is cached."""
        with tempfile.TemporaryDirectory() as folder:
            return self.call(
                f"{self.repo}: {name}",
                lambda: Path(
                    self.api.download_file(self.repo, _TYPE, name, revision=revision, local_dir=folder, force=True)
                ).read_bytes(),
            )

    def put(self, name: str, content: Path | bytes, revision: str, title: str) -> None:
        """Send a file, unless ModelScope has its content, and commit it."""
        # The client prints what it commits on stdout, which is for our result.
        with contextlib.redirect_stdout(io.StringIO()):
            self.call(
                f"sending {name}",
                lambda: self.api.upload_file(
                    self.repo, _TYPE, content, name, revision=revision, commit_message=title, disable_tqdm=True
                ),
                self.backoff.attempts,
            )

    def remove(self, names: list[str], revision: str, title: str) -> None:
        """Delete files, in one commit."""
        self.call(
            f"deleting {', '.join(names)}",
            lambda: self.api.delete_files(self.repo, _TYPE, names, revision=revision, commit_message=title),
        )


def push_modelscope(
    artifact: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    verify: Callable[[Path], None] | None = None,
    progress: TransferProgress | None = None,
    backoff: Backoff | None = None,
) -> PushSummary:
    """Push an artifact to a ModelScope repository, continuing what an earlier push did; arguments as of `push`.

    `revision` must be a branch that is there: the client makes none. A file that fails stops no other weight. Raises
    ArtifactError and HubError as `push` does.
    """
    artifact, progress = Path(artifact), progress or Silent()
    scope, title, branch = ModelScope(repo, token, backoff), message or default_title(artifact), revision or _MAIN
    manifest = read_manifest(artifact)
    files = local_files(artifact, manifest)
    _open(scope, private)
    if verify is not None:
        verify(artifact)
    remote = scope.files(branch)
    previous = _previous(scope, remote, branch)
    refuse_strays(repo, remote, {*files, *previous})
    texts = _card(scope, artifact, remote, branch)
    sealed = (artifact / MANIFEST_NAME).read_bytes()
    changed = [file for file in files.values() if not _holds(remote.get(file.name), file.size, file.sha256)]
    texts = {name: text for name, text in texts.items() if not _holds_text(remote.get(name), text)}
    stale = sorted((previous - files.keys() - {MANIFEST_NAME, CARD_NAME}) | ({UNFINISHED_NAME} & remote.keys()))
    seal = bool(changed or stale) or not _holds_text(remote.get(MANIFEST_NAME), sealed)
    sent_bytes = sum(file.size for file in changed) + sum(map(len, texts.values())) + seal * len(sealed)
    progress.start(sent_bytes)
    if changed or stale:
        _begin(scope, remote, [*files, *previous], branch, title)
        _send(scope, changed, branch, title, progress)
    for name, text in texts.items():
        scope.put(name, text, branch, title)
        progress.advance(len(text))
    if seal:
        _refuse_unlike(scope, files, branch)
        scope.put(MANIFEST_NAME, sealed, branch, title)
        progress.advance(len(sealed))
    if changed or stale:
        scope.remove(sorted({*stale, UNFINISHED_NAME}), branch, title)
    if tag is not None:
        scope.call(f"tagging {repo} as {tag!r}", lambda: scope.api.create_repo_tag(repo, _TYPE, tag, revision=branch))
    return PushSummary(
        repo=repo,
        revision=branch,
        commit="",
        url=f"{scope.config.endpoint}/models/{repo}",
        files=len({*files, MANIFEST_NAME, *([CARD_NAME] if (artifact / CARD_NAME).is_file() else [])}),
        sent_files=len(changed) + len(texts) + seal,
        sent_bytes=sent_bytes,
        pull_request=None,
    )


def pull_modelscope(
    repo: str,
    directory: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    progress: TransferProgress | None = None,
) -> Path:
    """Fetch an artifact from ModelScope into `directory`, or into a folder of its client's cache; returns where it is.

    Every file is checked against the manifest's sha256, and one that was cut off goes on where it ended. The manifest
    comes last. Raises HubError.
    """
    scope, branch, progress = ModelScope(repo, token), revision or _MAIN, progress or Silent()
    target = Path(directory or scope.config.cache_dir / "npuq" / repo.replace("/", "--") / branch.replace("/", "--"))
    remote = scope.files(branch)
    if MANIFEST_NAME not in remote or UNFINISHED_NAME in remote:
        raise HubError(
            f"{repo}: has no finished artifact in {branch!r} ({MANIFEST_NAME} comes with the last commit of a push); "
            "push again to finish it, or give another --revision"
        )
    sealed = scope.read(MANIFEST_NAME, branch)
    wanted = [*manifest_files(repo, sealed)]
    missing = [file for file in wanted if not _is_here(target / file.name, file)]
    local = target / MANIFEST_NAME
    with _disk_errors(target):
        if missing and local.exists():
            local.unlink()
        target.mkdir(parents=True, exist_ok=True)
    progress.start(sum(file.size for file in missing))

    def fetch(file: Wanted) -> None:
        scope.call(
            f"{repo}: {file.name}",
            lambda: scope.api.download_file(
                repo,
                _TYPE,
                file.name,
                revision=branch,
                local_dir=target,
                expected_sha256=file.sha256,
                file_size=file.size,
            ),
        )
        progress.advance(file.size)

    failed = [error for _, error in in_order(missing, fetch, _WORKERS) if isinstance(error, Exception)]
    for error in failed:
        raise error
    if CARD_NAME in remote and (missing or not local.exists()):
        content = scope.read(CARD_NAME, branch)
        with _disk_errors(target):
            (target / CARD_NAME).write_bytes(content)
    with _disk_errors(target):
        local.parent.mkdir(exist_ok=True)
        partial = local.with_suffix(f".{os.getpid()}")
        partial.write_bytes(sealed)
        partial.replace(local)
    return target


def _open(scope: ModelScope, private: bool | None) -> None:
    """The token is good, and the repository is there."""
    pushing = f"pushing to {scope.repo}"
    scope.call(pushing, scope.api.whoami)
    if not scope.call(pushing, lambda: scope.api.repo_exists(scope.repo, _TYPE)):
        visibility = None if private is None else ("private" if private else "public")
        scope.call(pushing, lambda: scope.api.create_repo(scope.repo, _TYPE, visibility=visibility))


def _begin(scope: ModelScope, remote: Mapping[str, RemoteFile], names: list[str], branch: str, title: str) -> None:
    """No reader may take the mixture that follows for an artifact."""
    if UNFINISHED_NAME not in remote:
        note = json.dumps({"replaces": sorted({*names, MANIFEST_NAME})}).encode()
        scope.put(UNFINISHED_NAME, note, branch, title)
    if MANIFEST_NAME in remote:
        scope.remove([MANIFEST_NAME], branch, title)


def _send(scope: ModelScope, files: list[LocalFile], branch: str, title: str, progress: TransferProgress) -> None:
    """The weights first, then what gives them a meaning. One at a time: each is a commit to the same branch."""
    failed: dict[str, NpuqError] = {}
    for file in sorted(files, key=lambda file: not file.name.endswith(".safetensors")):
        try:
            scope.put(file.name, file.path, branch, title)
        except HubError as error:
            progress.note(f"{file.name} was not sent: {error}; going on with the others")
            failed[file.name] = error
        progress.advance(file.size)
    if failed:
        first = next(iter(failed.values()))
        names = ", ".join(failed)
        raise HubError(f"{len(failed)} of {len(files)} files were not sent ({names}); push again to continue. {first}")


def _refuse_unlike(scope: ModelScope, files: Mapping[str, LocalFile], branch: str) -> None:
    """Before the manifest vouches for them: what was sent is what it says, also where a file changed meanwhile."""
    remote = scope.files(branch)
    for file in files.values():
        if not _holds(remote.get(file.name), file.size, file.sha256):
            raise HubError(f"{file.path}: ModelScope lists other content than the manifest has; run `npuq verify`")


def _previous(scope: ModelScope, remote: Mapping[str, RemoteFile], branch: str) -> frozenset[str]:
    names: set[str] = set()
    for source, key in ((MANIFEST_NAME, "files"), (UNFINISHED_NAME, "replaces")):
        if source in remote:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                names |= {source, *map(str, json.loads(scope.read(source, branch))[key])}
    return frozenset(names & remote.keys())


def _card(scope: ModelScope, artifact: Path, remote: Mapping[str, RemoteFile], branch: str) -> dict[str, bytes]:
    path = artifact / CARD_NAME
    if not path.is_file():
        return {}
    try:
        theirs = scope.read(CARD_NAME, branch).decode("utf-8") if CARD_NAME in remote else None
        return {CARD_NAME: merge_card(theirs, path.read_text(encoding="utf-8"), scope.repo).encode()}
    except UnicodeDecodeError:
        raise HubError(f"{CARD_NAME} in {scope.repo} or in {artifact} is not UTF-8 text; repair it") from None


def _holds(remote: RemoteFile | None, size: int, sha256: str) -> bool:
    return remote is not None and remote.size == size and remote.sha256 == sha256


def _holds_text(remote: RemoteFile | None, text: bytes) -> bool:
    return _holds(remote, len(text), hashlib.sha256(text).hexdigest())


def _is_here(path: Path, wanted: Wanted) -> bool:
    if not path.is_file() or path.stat().st_size != wanted.size:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == wanted.sha256


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HubError(f"{error.filename or directory}: {error.strerror}; pull again to continue") from None
