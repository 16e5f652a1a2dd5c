"""The Xet side of a loopback hub: tokens that lead the real hf_xet to a directory, and contents that move between there
and the hub's LFS objects, as the hub's migration and its bridge move them."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path
from typing import Any

from loopback_state import RefusedError, State


class XetStore:
    """Contents in a directory, by hf_xet's own `local://` storage. Hashes are hf_xet's."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.endpoint = f"local://{folder}"
        self._hashes: dict[str, str] = {}
        self._held: set[str] = set()
        self._lock = threading.Lock()

    def know(self, path: Path) -> None:
        """Tell the store of content that a client will bring by Xet: real hubs read its sha256 in what it brings."""
        self.xet_hash(hashlib.sha256(path.read_bytes()).hexdigest(), path)

    def xet_hash(self, sha256: str, path: Path) -> str:
        """The Xet hash of an LFS object, which a hub lists beside its sha256."""
        import hf_xet

        with self._lock:
            if sha256 not in self._hashes:
                self._hashes[sha256] = hf_xet.hash_files([str(path)])[0].hash
            return self._hashes[sha256]

    def migrate(self, state: State) -> None:
        """Put LFS objects there that are not there yet, as the hub does some time after an upload by LFS."""
        import hf_xet

        with self._lock:
            new = [path for path in state.folder.iterdir() if len(path.name) == 64 and path.name not in self._held]
            if new:
                with hf_xet.XetSession().new_upload_commit(**self._connection()) as commit:
                    for path in new:
                        commit.start_upload_file(str(path), sha256=hf_xet.COMPUTE_SHA256)
            self._held |= {path.name for path in new}

    def bring(self, state: State, sha256: str, size: int) -> None:
        """Make content that came by Xet an LFS object, as the hub's bridge gives it to those who ask by HTTP."""
        import hf_xet

        if sha256 not in self._hashes:
            raise RefusedError(400, f"no such content: {sha256}")
        target = state.object_path(sha256)
        partial = target.with_suffix(".xet")
        with hf_xet.XetSession().new_file_download_group(**self._connection()) as group:
            group.start_download_file(hf_xet.XetFileInfo(self._hashes[sha256], size), str(partial))
        if hashlib.sha256(partial.read_bytes()).hexdigest() != sha256:
            raise RefusedError(400, f"the content's sha256 is not {sha256}")
        partial.rename(target)

    def token(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What the token routes answer, in their body for hf_xet and in headers for the client."""
        connection = self._connection()
        token, expires = connection["token"], connection["token_expiry_unix_secs"]
        headers = {"Cas-Url": self.endpoint, "Access-Token": token, "Token-Expiration": str(expires)}
        body = {"casUrl": self.endpoint, "accessToken": token, "exp": expires}
        return body, {f"X-Xet-{name}": value for name, value in headers.items()}

    def _connection(self) -> dict[str, Any]:
        return {"endpoint": self.endpoint, "token": "xet", "token_expiry_unix_secs": int(time.time()) + 3600}
