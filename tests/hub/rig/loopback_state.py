"""What a loopback hub remembers: repositories as git sees them (commits, branches, tags, pull requests), LFS objects.

Kept in memory but for LFS objects, which are files of a folder: an artifact may be larger than memory should be.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITER = "hf_writer"


class RefusedError(Exception):
    """An answer with an error status, as the hub gives it: `code` goes into X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, **details: str):
        super().__init__(message)
        self.details = details
        self.status = status
        self.message = message
        self.code = code


@dataclass(frozen=True)
class Blob:
    """One file of one commit. Regular files carry their content, LFS files the sha256 of an object."""

    oid: str  # git's sha1 of the content, or of the LFS pointer
    size: int
    content: bytes | None = None
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """One model repository."""

    name: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        for commit in self.commits:
            if commit.sha == sha:
                return commit
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch, "")
        described = repr((parent, title, len(self.commits), sorted((name, blob.etag) for name, blob in files.items())))
        commit = Commit(hashlib.sha1(described.encode()).hexdigest(), title, files)
        self.commits.append(commit)
        self.branches[branch] = commit.sha
        return commit


@dataclass(frozen=True)
class User:
    name: str
    role: str = "write"  # or "read"


class State:
    """All repositories, users (by token) and LFS objects of one loopback hub."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = threading.RLock()
        self.users = {WRITER: User("alice"), "hf_reader": User("bob", "read"), "hf_other": User("carol")}
        self.repos: dict[str, Repo] = {}

    def create_repo(self, name: str, private: bool = False) -> Repo:
        with self.lock:
            repo = self.repos[name] = Repo(name, private)
            attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            repo.add_commit("main", "initial commit", {".gitattributes": regular(attributes)})
            return repo

    def object_path(self, sha256: str) -> Path:
        return self.folder / sha256

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        """Commit files from the test's side; those that the hub would keep in LFS become LFS objects."""
        with self.lock:
            target = self.repos.get(repo) or self.create_repo(repo)
            merged = dict(target.commit(branch).files)
            for name, content in files.items():
                merged[name] = self.store(content) if is_lfs(name) else regular(content)
            return target.add_commit(branch, "put", merged)

    def store(self, content: bytes) -> Blob:
        sha256 = hashlib.sha256(content).hexdigest()
        self.object_path(sha256).write_bytes(content)
        return lfs(sha256, len(content))

    def content(self, blob: Blob) -> bytes:
        if blob.content is not None:
            return blob.content
        return self.object_path(blob.etag).read_bytes()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision, for assertions."""
        return {name: self.content(blob) for name, blob in self.repos[repo].commit(revision).files.items()}


def is_lfs(name: str) -> bool:
    """By the rules of the .gitattributes that a repository is created with."""
    return name.endswith(".safetensors")


def regular(content: bytes) -> Blob:
    header = f"blob {len(content)}\0".encode()
    return Blob(hashlib.sha1(header + content).hexdigest(), len(content), content=content)


def lfs(sha256: str, size: int) -> Blob:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return Blob(regular(pointer).oid, size, sha256=sha256)
