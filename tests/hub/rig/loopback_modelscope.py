"""ModelScope on the loopback interface: the routes that `modelscope_hub` uses for push and pull, faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import uuid
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any

from faults import Faults
from loopback_http import DroppedError, Exchange, Seen
from loopback_state import RefusedError

WRITER, READER = "ms-writer", "ms-reader"


class LoopbackModelScope:
    """The server. `repos` is repository → path → content, `blobs` the uploaded objects, `commits` what was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.tags: dict[str, str] = {}
        self.say: Callable[[str, Any], Any] = lambda request, answer: answer
        self.faults = Faults()
        self.log: list[Seen] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            routes = _ROUTES

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sent_bytes(self) -> int:
        """Bytes of content received through the store so far."""
        return sum(seen.received for seen in self.log if seen.request.startswith("PUT /store/"))


class _Handler(Exchange):
    def _known(self, write: bool = False) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            self._discard_body()
            raise RefusedError(401, "token is invalid")
        if write and token != WRITER:
            self._discard_body()
            raise RefusedError(403, "no permission")

    def _files(self, repo: str) -> dict[str, bytes]:
        if repo not in self.hub.repos:
            self._discard_body()
            raise RefusedError(404, "repository not found")
        return dict(self.hub.repos[repo])

    def _data(self, data: Any) -> None:
        self._json({"Code": 200, "Success": True, "success": True, "Data": data, "data": data})

    def me(self) -> None:
        self._known()
        self._data({"username": "alice"})

    def info(self, repo: str) -> None:
        self._files(repo)
        owner, name = repo.split("/")
        self._data({"id": repo, "owner": owner, "name": name})

    def create(self) -> None:
        self._known(write=True)
        asked = json.loads(self._read_body())
        repo = f"{asked['Path']}/{asked['Name']}"
        if repo in self.hub.repos:
            raise RefusedError(400, "already exists")
        self.hub.repos[repo] = {}
        self._data({"Path": asked["Path"], "Name": asked["Name"]})

    def tree(self, repo: str) -> None:
        files = self._files(repo)
        entries = [
            {"Path": path, "Size": len(body), "Sha256": hashlib.sha256(body).hexdigest(), "Type": "blob"}
            for path, body in files.items()
        ]
        self._data({"Files": entries})

    def batch(self, repo: str) -> None:
        self._known(write=True)
        asked = json.loads(self._read_body())
        objects = []
        for wanted in asked["objects"]:
            action = {"upload": {"href": f"{self.hub.endpoint}/store/{wanted['oid']}"}}
            objects.append({**wanted, "actions": {} if wanted["oid"] in self.hub.blobs else action})
        self._data({"objects": objects})

    def store(self, oid: str) -> None:
        body = self._read_body()
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "content does not match")
        self.hub.blobs[oid] = body
        self._data({})

    def commit(self, repo: str, revision: str) -> None:
        self._known(write=True)
        asked = json.loads(self._read_body())
        with self.hub.lock:
            files = self._files(repo)
            for action in asked["actions"]:
                path = action["path"]
                if action["action"] == "delete":
                    if files.pop(path, None) is None:
                        raise RefusedError(400, f"no such file {path}")
                elif action["type"] == "lfs":
                    if action["sha256"] not in self.hub.blobs:
                        raise RefusedError(400, f"no such object for {path}")
                    files[path] = self.hub.blobs[action["sha256"]]
                else:
                    files[path] = base64.b64decode(action["content"])
            self.hub.repos[repo] = files
            self.hub.commits.append([f"{action['action']} {action['path']}" for action in asked["actions"]])
        self._data({"oid": uuid.uuid4().hex})

    def tag(self, repo: str) -> None:
        self._known(write=True)
        asked = json.loads(self._read_body())
        self.hub.tags[asked["TagName"]] = asked["Ref"]
        self._data({})

    def download(self, repo: str) -> None:
        files, path = self._files(repo), self.query["FilePath"][0]
        if path not in files:
            raise RefusedError(404, "file not found")
        body = bytearray(files[path])
        if self.fault.corrupt is not None and len(body) > self.fault.corrupt:
            body[self.fault.corrupt] ^= 1
        start, end, status, headers = 0, len(body), 200, {}
        if self.seen.range is not None:
            first, _, last = self.seen.range.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last or len(body)) + 1, len(body)), 206
            headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        piece = bytes(body[start:end])
        if self.fault.reset_after is not None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(piece))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(piece[: self.fault.reset_after])
            self.seen.sent += min(len(piece), self.fault.reset_after)
            raise DroppedError
        self._write(status, {"Content-Type": "application/octet-stream", **headers}, piece)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (("GET",), r"/openapi/v1/users/me", _Handler.me),
    (("GET",), rf"/openapi/v1/models/{_NAME}", _Handler.info),
    (("GET",), rf"/api/v1/models/{_NAME}", _Handler.info),
    (("POST",), r"/api/v1/models", _Handler.create),
    (("GET",), rf"/api/v1/models/{_NAME}/repo/files", _Handler.tree),
    (("POST",), rf"/api/v1/repos/models/{_NAME}/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/store/(\w+)", _Handler.store),
    (("POST",), rf"/api/v1/repos/models/{_NAME}/commit/(\w+)", _Handler.commit),
    (("POST",), rf"/api/v1/models/{_NAME}/repo/tag", _Handler.tag),
    (("GET", "HEAD"), rf"/api/v1/models/{_NAME}/repo", _Handler.download),
]
