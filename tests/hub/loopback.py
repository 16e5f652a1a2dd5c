"""A hub on the loopback interface that the real huggingface_hub client talks to, with faults on demand.

Speaks what push, pull and streaming need: create repository, branches, tags, pull requests, validate-yaml, preupload,
LFS batch with basic and multipart transfers, verify, commits as ndjson, model info, trees with paging, resolve with
HEAD, GET and Range, whoami. Error answers carry X-Error-Code as the hub's do.

Run as a program it serves until it is killed: `python loopback.py FOLDER [PORT]`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

sys.path.insert(0, str(Path(__file__).parent))
from faults import Fault, Faults
from loopback_state import Blob, RefusedError, Repo, State, User, is_lfs, lfs, regular

_CHUNK = 1 << 20
_TREE_PAGE = 5


@dataclass
class Seen:
    """One request, for assertions, noted when it begins. Bytes of its body and of its answer's, so far."""

    request: str
    authorization: str | None
    range: str | None
    received: int = 0
    sent: int = 0


class LoopbackHub:
    """The server. `state` is what it remembers, `faults` what goes wrong, `log` what was asked of it."""

    def __init__(self, folder: Path, port: int = 0, multipart_from: int = 1 << 62, part_size: int = 1 << 20):
        self.state = State(folder)
        self.faults = Faults()
        self.multipart_from = multipart_from
        self.part_size = part_size
        self.log: list[Seen] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def start(self) -> LoopbackHub:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def requests(self, pattern: str) -> list[Seen]:
        """The requests so far whose "METHOD /path" contains the regular expression."""
        return [seen for seen in self.log if re.search(pattern, seen.request)]

    def uploaded_bytes(self) -> int:
        """Bytes of LFS content received so far."""
        return sum(seen.received for seen in self.requests(r"^PUT /lfs/"))


class _DroppedError(Exception):
    """The connection was reset on purpose."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        self.raw_route = parts.path
        request = f"{self.command} {self.route}"
        self.seen = Seen(request, self.headers.get("Authorization"), self.headers.get("Range"))
        self.hub.log.append(self.seen)
        self.fault = self.hub.faults.meet(request) or Fault("")
        try:
            self._answer()
            self.wfile.flush()
        except RefusedError as refusal:
            self._refuse(refusal)
        except _DroppedError:
            self._drop()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self) -> None:
        if self.fault.reset_before:
            raise _DroppedError
        if self.fault.status is not None:
            self._discard_body()
            raise RefusedError(self.fault.status, "a fault on demand", self.fault.code)
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match is not None and self.command in method:
                action(self, *match.groups())
                return
        self._discard_body()
        raise RefusedError(404, f"no route {self.command} {self.route}")

    def _refuse(self, refusal: RefusedError) -> None:
        body = json.dumps({"error": refusal.message, **refusal.details}).encode()
        headers = {"X-Error-Message": refusal.message, **self.fault.headers}
        if refusal.code is not None:
            headers["X-Error-Code"] = refusal.code
        try:
            self._write(refusal.status, headers, body)
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _drop(self) -> None:
        self.wfile.flush()
        # Linger of zero: the peer gets a reset, not an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _write(self, status: int, headers: dict[str, str], body: bytes) -> None:
        if self.fault.lose_response:
            raise _DroppedError
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.seen.sent += len(body)

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._write(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode())

    def _read_body(self) -> bytes:
        pieces: list[bytes] = []
        self._receive(pieces.append)
        return b"".join(pieces)

    def _discard_body(self) -> None:
        self._receive(lambda piece: None)

    def _receive(self, take: Callable[[bytes], object]) -> None:
        left = int(self.headers.get("Content-Length", 0))
        while left:
            wanted = min(left, _CHUNK)
            if self.fault.reset_after is not None and self.command in ("PUT", "POST"):
                wanted = min(wanted, self.fault.reset_after - self.seen.received)
                if wanted <= 0:
                    raise _DroppedError
            piece = self.rfile.read(wanted)
            if not piece:
                raise ConnectionResetError
            take(piece)
            self.seen.received += len(piece)
            left -= len(piece)

    def _user(self) -> User | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.hub.state.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            self._discard_body()
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return user

    def _repo(self, name: str, write: bool = False) -> Repo:
        user = self._user()
        repo = self.hub.state.repos.get(name)
        owner = name.partition("/")[0]
        if repo is None or (repo.private and (user is None or user.name != owner)):
            self._discard_body()
            raise RefusedError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and (user is None or user.role != "write" or user.name != owner):
            self._discard_body()
            raise RefusedError(403, "You don't have the rights to write to this repository")
        return repo

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": user.role}
        self._json({"type": "user", "name": user.name, "orgs": [], "auth": {"accessToken": token}})

    def create_repo(self) -> None:
        asked = json.loads(self._read_body())
        user = self._user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        name = f"{asked.get('organization') or user.name}/{asked['name']}"
        if name.partition("/")[0] != user.name or user.role != "write":
            raise RefusedError(
                403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]!r}"
            )
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.state.repos:
            raise RefusedError(409, "You already created this model repo", url=url)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.state.create_repo(name, bool(private))
        self._json({"url": url, "name": name})

    def validate_yaml(self) -> None:
        content = json.loads(self._read_body())["content"]
        problems = []
        if content.startswith("---\n"):
            import yaml

            front = yaml.safe_load(content.split("---\n", 2)[1])
            if not isinstance(front, dict):
                problems.append({"message": "front matter is no mapping"})
        self._json({"errors": problems, "warnings": []}, 400 if problems else 200)

    def preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self._read_body())
        files = self._repo(name, write="create_pr" not in self.query).commit(revision).files
        answer = []
        for file in asked["files"]:
            known = files.get(file["path"])
            mode = "lfs" if is_lfs(file["path"]) or file["size"] > 10 << 20 else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            answer.append({**entry, **({"oid": known.etag} if known else {})})
        self._json({"files": answer, "commitOid": self._repo(name).commit(revision).sha})

    def lfs_batch(self, name: str) -> None:
        asked = json.loads(self._read_body())
        self._repo(name, write=True)
        self._json({"transfer": "basic", "objects": [self._lfs_object(name, wanted) for wanted in asked["objects"]]})

    def _lfs_object(self, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        if self.hub.state.object_path(oid).exists():
            return {"oid": oid, "size": size}
        url = f"{self.hub.endpoint}/lfs/{oid}?size={size}"
        upload: dict[str, Any] = {"href": url, "header": {}}
        if size >= self.hub.multipart_from:
            parts = -(-size // self.hub.part_size)
            header = {str(number): f"{self.hub.endpoint}/lfs/{oid}/{number}" for number in range(1, parts + 1)}
            upload = {"href": f"{self.hub.endpoint}/lfs-complete/{oid}", "header": header}
            upload["header"]["chunk_size"] = str(self.hub.part_size)
        verify = {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/objects/verify", "header": {}}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def lfs_put(self, oid: str) -> None:
        partial = self.hub.state.folder / f"{oid}.{threading.get_ident()}"
        digest = hashlib.sha256()
        try:
            with partial.open("wb") as file:
                self._receive(lambda piece: (file.write(piece), digest.update(piece)))
            if digest.hexdigest() != oid:
                raise RefusedError(400, "the content's sha256 is not the object's name")
            partial.rename(self.hub.state.object_path(oid))
        finally:
            partial.unlink(missing_ok=True)
        self._write(200, {}, b"")

    def lfs_put_part(self, oid: str, number: str) -> None:
        content = self._read_body()
        (self.hub.state.folder / f"{oid}.part{number}").write_bytes(content)
        self._write(200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}, b"")

    def lfs_complete(self, oid: str) -> None:
        asked = json.loads(self._read_body())
        digest, target = hashlib.sha256(), self.hub.state.object_path(oid)
        joined = target.with_suffix(".joined")
        with joined.open("wb") as file:
            for part in asked["parts"]:
                path = self.hub.state.folder / f"{oid}.part{part['partNumber']}"
                content = path.read_bytes()
                if part["etag"].strip('"') != hashlib.md5(content).hexdigest():
                    raise RefusedError(400, "a part's etag is wrong")
                digest.update(content)
                file.write(content)
                path.unlink()
        if digest.hexdigest() != oid:
            raise RefusedError(400, "the content's sha256 is not the object's name")
        joined.rename(target)
        self._json({})

    def lfs_verify(self, name: str) -> None:
        asked = json.loads(self._read_body())
        path = self.hub.state.object_path(asked["oid"])
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise RefusedError(404, "no such object")
        self._json({})

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._read_body().splitlines()]
        with self.hub.state.lock:
            repo = self._repo(name, write=True)
            head = repo.commit(revision)
            if revision not in repo.branches:
                raise RefusedError(400, "not a branch")
            files, title = dict(head.files), ""
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, head.sha):
                        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
                else:
                    self._apply(files, key, value)
            commit = repo.add_commit(revision, title, files)
        url = f"{self.hub.endpoint}/{name}/commit/{commit.sha}"
        self._json({"success": True, "commitOid": commit.sha, "commitUrl": url, "pullRequestUrl": None})

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            stored = self.hub.state.object_path(value["oid"])
            if not stored.exists():
                raise RefusedError(400, f"LFS object of {path} was never uploaded")
            files[path] = lfs(value["oid"], stored.stat().st_size)
        elif key == "deletedFile":
            if path not in files:
                raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            del files[path]
        else:
            raise RefusedError(400, f"unknown commit line {key}")

    def model_info(self, name: str, revision: str | None = None) -> None:
        repo = self._repo(name)
        commit = repo.commit(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        info = {"_id": "1", "id": name, "modelId": name, "sha": commit.sha, "private": repo.private}
        self._json({**info, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, name: str, revision: str) -> None:
        files = sorted(self._repo(name).commit(revision).files.items())
        start = int(self.query.get("cursor", ["0"])[0])
        page = files[start : start + _TREE_PAGE]
        entries = []
        for path, blob in page:
            entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
            if blob.sha256 is not None:
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
            entries.append(entry)
        headers = {}
        if start + _TREE_PAGE < len(files):
            url = f"{self.hub.endpoint}{self.raw_route}?recursive=true&cursor={start + _TREE_PAGE}"
            headers["Link"] = f'<{url}>; rel="next"'
        self._json(entries, headers=headers)

    def auth_check(self, name: str, write: str | None = None) -> None:
        self._repo(name, write=write is not None)
        self._json({})

    def refs(self, name: str) -> None:
        repo = self._repo(name)

        def listed(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": sha} for ref, sha in refs.items()]

        plain = {ref: sha for ref, sha in repo.branches.items() if not ref.startswith("refs/")}
        self._json({"branches": listed(plain, "heads"), "tags": listed(repo.tags, "tags"), "converts": []})

    def create_branch(self, name: str, branch: str) -> None:
        asked = json.loads(self._read_body() or b"{}")
        repo = self._repo(name, write=True)
        if branch in repo.branches:
            raise RefusedError(409, f"Reference {branch} already exists")
        repo.branches[branch] = repo.commit(asked.get("startingPoint") or "main").sha
        self._json({})

    def create_tag(self, name: str, revision: str) -> None:
        asked = json.loads(self._read_body())
        repo = self._repo(name, write=True)
        if asked["tag"] in repo.tags:
            raise RefusedError(409, f"Tag {asked['tag']} already exists")
        repo.tags[asked["tag"]] = repo.commit(revision).sha
        self._json({})

    def create_discussion(self, name: str) -> None:
        asked, repo, user = json.loads(self._read_body()), self._repo(name), self._user()
        number = len(repo.discussions) + 1
        pull = {
            "num": number,
            "title": asked["title"],
            "status": "draft",
            "author": {"name": user.name if user else "?"},
            "isPullRequest": True,
            "createdAt": "2026-01-01T00:00:00.000Z",
            "repo": {"name": name, "type": "model"},
            "diff": "",
            "events": [],
            "changes": {"base": "refs/heads/main", "mergeCommitId": None},
            "filesWithConflicts": [],
        }
        repo.discussions.append(pull)
        repo.branches[f"refs/pr/{number}"] = repo.commit("main").sha
        self._json({"num": number, "url": f"{self.hub.endpoint}/{name}/discussions/{number}", "pullRequest": True})

    def discussions(self, name: str) -> None:
        found = self._repo(name).discussions
        wanted = self.query.get("status", ["all"])[0]
        if wanted == "open":
            found = [pull for pull in found if pull["status"] in ("open", "draft")]
        self._json({"discussions": found, "count": len(found), "start": 0, "numClosedDiscussions": 0})

    def discussion(self, name: str, number: str) -> None:
        self._json(self._repo(name).discussions[int(number) - 1])

    def discussion_status(self, name: str, number: str) -> None:
        asked = json.loads(self._read_body())
        pull = self._repo(name).discussions[int(number) - 1]
        pull["status"] = asked["status"]
        event = {"id": "1", "type": "status-change", "createdAt": pull["createdAt"], "author": pull["author"]}
        self._json({"newStatus": {**event, "data": {"status": asked["status"]}}})

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._repo(name).commit(revision)
        blob = commit.files.get(path)
        if blob is None:
            self.fault.headers["X-Repo-Commit"] = commit.sha
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.sha256 is not None:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"'}
        start, end, status = 0, blob.size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is not None:
            start, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else blob.size, blob.size)
            if start >= blob.size:
                self.fault.headers["Content-Range"] = f"bytes */{blob.size}"
                raise RefusedError(416, "Range not satisfiable")
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{blob.size}"
        if self.fault.lose_response:
            raise _DroppedError
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(end - start)}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_content(blob, start, end)

    def _send_content(self, blob: Blob, start: int, end: int) -> None:
        with _opened(self.hub.state, blob) as file:
            file.seek(start)
            position = start
            end -= self.fault.truncate or 0
            while position < end:
                wanted = min(_CHUNK, end - position)
                if self.fault.bytes_per_second is not None:
                    wanted = min(wanted, max(1, self.fault.bytes_per_second // 50))
                    time.sleep(wanted / self.fault.bytes_per_second)
                if self.fault.reset_after is not None:
                    wanted = min(wanted, start + self.fault.reset_after - position)
                    if wanted <= 0:
                        raise _DroppedError
                piece = file.read(wanted)
                if self.fault.corrupt is not None and position <= self.fault.corrupt < position + len(piece):
                    flipped = bytearray(piece)
                    flipped[self.fault.corrupt - position] ^= 1
                    piece = bytes(flipped)
                self.wfile.write(piece)
                if self.fault.bytes_per_second is not None:
                    self.wfile.flush()
                self.seen.sent += len(piece)
                position += len(piece)
        if self.fault.truncate:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


def _opened(state: State, blob: Blob) -> Any:
    import io

    return io.BytesIO(blob.content) if blob.content is not None else state.object_path(blob.etag).open("rb")


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create_repo),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/verify", _Handler.lfs_verify),
    (("PUT",), r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    (("PUT",), r"/lfs/([0-9a-f]{64})/(\d+)", _Handler.lfs_put_part),
    (("POST",), r"/lfs-complete/([0-9a-f]{64})", _Handler.lfs_complete),
    (("POST",), rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (("GET",), rf"/api/models/{_NAME}/tree/(.+)", _Handler.tree),
    (("GET",), rf"/api/models/{_NAME}/auth-check(/write)?", _Handler.auth_check),
    (("GET",), rf"/api/models/{_NAME}/refs", _Handler.refs),
    (("POST",), rf"/api/models/{_NAME}/branch/(.+)", _Handler.create_branch),
    (("POST",), rf"/api/models/{_NAME}/tag/(.+)", _Handler.create_tag),
    (("POST",), rf"/api/models/{_NAME}/discussions", _Handler.create_discussion),
    (("GET",), rf"/api/models/{_NAME}/discussions", _Handler.discussions),
    (("GET",), rf"/api/models/{_NAME}/discussions/(\d+)", _Handler.discussion),
    (("POST",), rf"/api/models/{_NAME}/discussions/(\d+)/status", _Handler.discussion_status),
    (("GET",), rf"/api/models/{_NAME}/revision/(.+)", _Handler.model_info),
    (("GET",), rf"/api/models/{_NAME}", _Handler.model_info),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", _Handler.resolve),
]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    hub = LoopbackHub(folder, int(sys.argv[2]) if len(sys.argv) > 2 else 0).start()
    print(hub.endpoint, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
