"""A hub on the loopback interface that the real huggingface_hub client talks to, with faults on demand.

Speaks what push, pull and streaming need: create repository, branches, tags, pull requests, validate-yaml, preupload,
LFS batch with basic and multipart transfers, verify, Xet tokens, commits as ndjson, model info, trees with paging,
resolve with HEAD, GET and Range, whoami. Error answers carry X-Error-Code as the hub's do.

Run as a program it serves until it is killed: `python loopback.py FOLDER [PORT]`.
"""

from __future__ import annotations

import base64
import json
import re
import sys
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from faults import Faults
from loopback_files import FileRoutes
from loopback_http import Seen
from loopback_state import Blob, RefusedError, State, lfs, regular
from loopback_xet import XetStore

_TREE_PAGE = 5


class LoopbackHub:
    """The server. `state` is what it remembers, `faults` what goes wrong, `log` what was asked of it."""

    def __init__(self, folder: Path, port: int = 0, multipart_from: int = 1 << 62, part_size: int = 1 << 20):
        self.state = State(folder)
        self.faults = Faults()
        # What it says where it lies: of a request and the right answer.
        self.say: Callable[[str, Any], Any] = honest
        # False for a hub that sends whole files always.
        self.ranges = True
        # None for a hub without Xet.
        self.xet: XetStore | None = None
        self.multipart_from = multipart_from
        self.part_size = part_size
        self.log: list[Seen] = []
        hub = self

        class Handler(_Handler):
            routes = _ROUTES

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


def honest(request: str, answer: Any) -> Any:
    """What a hub says that does not lie."""
    return answer


class _Handler(FileRoutes):
    """The routes that are about repositories."""

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
            if not stored.exists() and self.hub.xet is not None:
                self.hub.xet.bring(self.hub.state, value["oid"], value["size"])
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
                if self.hub.xet is not None:
                    entry["xetHash"] = self.hub.xet.xet_hash(blob.sha256, self.hub.state.object_path(blob.sha256))
            entries.append(entry)
        headers = {}
        if start + _TREE_PAGE < len(files):
            url = f"{self.hub.endpoint}{self.raw_route}?recursive=true&cursor={start + _TREE_PAGE}"
            headers["Link"] = f'<{url}>; rel="next"'
        self._json(entries, headers=headers)

    def xet_token(self, name: str, kind: str, revision: str) -> None:
        self._repo(name, write=kind == "write")
        if self.hub.xet is None:
            raise RefusedError(404, f"no route {self.command} {self.route}")
        if kind == "read":
            self.hub.xet.migrate(self.hub.state)
        body, headers = self.hub.xet.token()
        self._json(body, headers=headers)

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
    (("GET",), rf"/api/models/{_NAME}/xet-(read|write)-token/(.+)", _Handler.xet_token),
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
