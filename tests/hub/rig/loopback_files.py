"""The routes of a loopback hub that move content: uploads through LFS, downloads with ranges."""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import threading
import time
from typing import Any

from loopback_http import CHUNK, DroppedError, Exchange
from loopback_state import Blob, RefusedError, State, is_lfs


class FileRoutes(Exchange):
    """Preupload, LFS batch, basic and multipart transfers, verify, and resolve."""

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

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._repo(name).commit(revision)
        blob = commit.files.get(path)
        if blob is None:
            self.fault.headers["X-Repo-Commit"] = commit.sha
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.sha256 is not None:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"'}
            headers |= self._xet_headers(name, commit.sha, blob.sha256)
        start, end, status = 0, blob.size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is not None and self.hub.ranges:
            start, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else blob.size, blob.size)
            if start >= blob.size:
                self.fault.headers["Content-Range"] = f"bytes */{blob.size}"
                raise RefusedError(416, "Range not satisfiable")
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{blob.size}"
        if self.fault.lose_response:
            raise DroppedError
        self._begin(status, {**headers, "Content-Length": str(end - start)})
        if self.command != "HEAD":
            self._send_content(blob, start, end)
            self._exceed()

    def _xet_headers(self, name: str, revision: str, sha256: str) -> dict[str, str]:
        if self.hub.xet is None:
            return {}
        token = f"{self.hub.endpoint}/api/models/{name}/xet-read-token/{revision}"
        xet_hash = self.hub.xet.xet_hash(sha256, self.hub.state.object_path(sha256))
        return {"X-Xet-Hash": xet_hash, "Link": f'<{token}>; rel="xet-auth"'}

    def _send_content(self, blob: Blob, start: int, end: int) -> None:
        with _opened(self.hub.state, blob) as file:
            file.seek(start)
            position = start
            end -= self.fault.truncate or 0
            while position < end:
                wanted = min(CHUNK, end - position)
                if self.fault.bytes_per_second is not None:
                    wanted = min(wanted, max(1, self.fault.bytes_per_second // 50))
                    time.sleep(wanted / self.fault.bytes_per_second)
                if self.fault.reset_after is not None:
                    wanted = min(wanted, start + self.fault.reset_after - position)
                    if wanted <= 0:
                        raise DroppedError
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
    return io.BytesIO(blob.content) if blob.content is not None else state.object_path(blob.etag).open("rb")
