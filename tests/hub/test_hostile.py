"""A hub that lies, a repository made to harm: whatever a name, a hash, a size or a commit says, whoever asks for it.

Every outcome is success or one line without control characters. Nothing is written outside the cache and the directory
that was named, and nothing whose name came from there is opened outside either: an audit hook sees every path.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from audit import watched
from loopback import LoopbackHub
from loopback_modelscope import LoopbackModelScope
from loopback_state import regular
from support import MANIFEST, REPO, entry_of, files_of, use_cache

import npuq
from npuq.cli.main import main
from npuq.errors import NpuqError
from npuq.hub import RemoteCheckpoint, ShardPusher, resolve
from npuq.hub.transfer.retry import Backoff

MARK = "npuq-hostile"  # in every path that a hostile value means
QUICK = Backoff(attempts=2, first_seconds=0.001, most_seconds=0.001)
Entry = Callable[[Path], object]
pull, push = partial(npuq.pull, hub="modelscope"), partial(npuq.push, hub="modelscope")
_TARGETS = itertools.count()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What passes for an artifact where nobody loads it: manifest, config, index, two shards."""
    folder = tmp_path_factory.mktemp("small")
    header = json.dumps({"t": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    for number in (1, 2):
        named = header.replace(b'"t"', b'"t%d"' % number)
        (folder / f"model-{number}.safetensors").write_bytes(struct.pack("<Q", len(named)) + named + bytes(8))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    index = {"weight_map": {f"t{number}": f"model-{number}.safetensors" for number in (1, 2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("# Small\n")
    (folder / "npuq").mkdir()
    names = [path.name for path in folder.iterdir() if path.is_file() and path.name != "README.md"]
    (folder / MANIFEST).write_text(
        json.dumps({"format_version": 1, "files": {name: entry_of((folder / name).read_bytes()) for name in names}})
    )
    return folder


def paths(victim: Path) -> list[Any]:
    """What could be a path and must not be one."""
    climbing = "../" * 30 + str(victim / MARK).lstrip("/")
    return [
        climbing,
        f"a/{climbing}",
        str(victim / MARK),
        f"../{MARK}",
        f"..\\{MARK}",
        f"C:\\{MARK}",
        f"a/../../{MARK}",
        f"./{MARK}",
        f"{MARK}/",
        f"{MARK}//x",
        f"{MARK}\0",
        f"\x1b[31m{MARK}",
        f"{MARK}\n",
        f"{MARK}\u202etxt",
        "\ud800",
        MARK * 40,
        "/".join([MARK] * 100),
        "",
        ".",
        "..",
        None,
        7,
        ["a"],
        {"a": 1},
    ]


SIZES = [-1, 2**63, 10**50, 1e400, float("nan"), 1.5, "1", True, None, [1]]


def hashes(victim: Path) -> list[Any]:
    return [*paths(victim), "0" * 63, "0" * 65, "A" * 64, "0" * 40 + "\n", "١" * 64]


def run_all(entries: dict[str, Entry], allowed: Path, victim: Path) -> None:
    """Run every entry point; see what is raised, and which paths are touched."""
    mine = victim / f"{MARK}.npuq-part"
    mine.write_bytes(b"the user's own")
    for name, run in entries.items():
        target = allowed / f"target-{next(_TARGETS)}"
        with watched() as watch:
            try:
                run(target)
            except NpuqError as error:
                check_line(str(error))
        assert not watch.outside(allowed), name
        assert not watch.read_outside(MARK, allowed), name
    assert mine.read_bytes() == b"the user's own"
    assert [path.name for path in victim.iterdir()] == [mine.name]


def check_line(text: str) -> None:
    assert text.isprintable(), repr(text)
    assert len(text) < 1000, text


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`npuq …` in this process, where the audit hook sees it."""
    monkeypatch.setattr("sys.argv", ["npuq", *map(str, arguments)])
    with suppress(SystemExit):
        main()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    for line in (*printed.err.splitlines(), *printed.out.splitlines()):
        check_line(line)


@pytest.fixture
def victim(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the user's that no command has anything to do with."""
    return tmp_path_factory.mktemp("victim")


@pytest.fixture
def entries(
    hub: LoopbackHub, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Entry]:
    """All that reads a repository, each with a cache of its own."""

    def fresh(run: Entry) -> Entry:
        def with_cache(target: Path) -> None:
            use_cache(monkeypatch, target.with_suffix(".home"))
            run(target)

        return with_cache

    def stream(target: Path) -> None:
        with RemoteCheckpoint.open_remote(REPO, target, backoff=QUICK) as checkpoint:
            checkpoint.expect([(name,) for name in checkpoint.tensors], ())
            for name in checkpoint.tensors:
                checkpoint.read(name)
                checkpoint.release((name,))

    def push_shards(target: Path) -> None:
        pusher = ShardPusher(small, REPO, backoff=QUICK)
        pusher.add("model-1.safetensors", entry_of((small / "model-1.safetensors").read_bytes())["sha256"])
        pusher.finish()

    def called(*arguments: object) -> Entry:
        return lambda target: command(
            capsys, monkeypatch, *(target if argument is HERE else argument for argument in arguments)
        )

    found: dict[str, Entry] = {
        "pull": lambda target: npuq.pull(REPO, backoff=QUICK),
        "pull to a folder": lambda target: npuq.pull(REPO, target, backoff=QUICK),
        "resolve": lambda target: resolve(REPO),
        "resolve a revision": lambda target: resolve(f"{REPO}@v1/x"),
        "stream": stream,
        "push": lambda target: npuq.push(small, REPO, tag="v1", backoff=QUICK),
        "push to a branch": lambda target: npuq.push(small, REPO, revision="w4a8", backoff=QUICK),
        "push as a pull request": lambda target: npuq.push(small, REPO, create_pr=True, backoff=QUICK),
        "push while converting": push_shards,
        "npuq pull": called("pull", REPO),
        "npuq verify": called("verify", REPO),
        "npuq inspect": called("inspect", REPO),
        "npuq generate": called("generate", REPO, "--prompt", "a"),
        "npuq convert": called("convert", REPO, HERE, "--dry-run"),
        "npuq push": called("push", small, REPO, "--no-verify"),
    }
    return {name: fresh(run) for name, run in found.items()}


HERE = object()


@pytest.fixture
def there(hub: LoopbackHub, small: Path) -> dict[str, bytes]:
    """The small artifact, on the hub; returns its files."""
    files = files_of(small)
    hub.state.put(REPO, files)
    return files


def test_an_honest_hub(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path
) -> None:
    """That the entry points get anywhere at all."""
    for name in ("pull", "pull to a folder", "resolve", "push", "push to a branch", "push while converting"):
        entries[name](tmp_path / name)
    assert (tmp_path / "pull to a folder" / MANIFEST).is_file()
    run_all(entries, tmp_path, victim)


class TestListing:
    """What the hub says of a repository's files: names come from whoever committed them."""

    @pytest.fixture(autouse=True)
    def as_checkpoint(self, request: pytest.FixtureRequest, hub: LoopbackHub, there: dict[str, bytes]) -> None:
        """With a manifest and without one, the small artifact being a checkpoint then."""
        if request.node.callspec.params.get("kind") == "checkpoint":
            files = dict(hub.state.repos[REPO].commit("main").files)
            del files[MANIFEST]
            hub.state.repos[REPO].add_commit("main", "no manifest", files)

    @pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
    @pytest.mark.parametrize("number", range(len(paths(Path()))))
    def test_names(
        self, hub: LoopbackHub, entries: dict[str, Entry], tmp_path: Path, victim: Path, kind: str, number: int
    ) -> None:
        value = paths(victim)[number]
        ends = ("", ".safetensors", ".json")
        hub.say = changed("/tree/", lambda page: [*page, *({**page[0], "path": with_end(value, end)} for end in ends)])
        run_all(entries, tmp_path, victim)

    @pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
    @pytest.mark.parametrize("place", ["oid", "lfs", "lfs.oid", "lfs.size", "size", "type"])
    def test_hashes_and_sizes(
        self, hub: LoopbackHub, entries: dict[str, Entry], tmp_path: Path, victim: Path, kind: str, place: str
    ) -> None:
        values = SIZES if "size" in place else hashes(victim)
        # The first names, sizes and hashes that are wrong in their own way; the rest are of the same kinds.
        for value in values if kind == "checkpoint" else values[:3]:
            hub.say = changed("/tree/", lambda page, value=value: [put(item, place, value) for item in page])
            run_all({name: entries[name] for name in ("pull", "resolve", "stream", "push")}, tmp_path, victim)

    @pytest.mark.parametrize("kind", ["artifact"])
    @pytest.mark.parametrize("page", [None, 7, "x", {}, [1], [[]], [None], [{"type": "file"}], [{}]])
    def test_no_listing(
        self, hub: LoopbackHub, entries: dict[str, Entry], tmp_path: Path, victim: Path, kind: str, page: object
    ) -> None:
        hub.say = changed("/tree/", lambda right: page)
        run_all(entries, tmp_path, victim)

    @pytest.mark.parametrize("kind", ["artifact"])
    def test_a_name_twice(self, hub: LoopbackHub, kind: str) -> None:
        hub.say = changed("/tree/", lambda page: [*page, page[0]])
        with pytest.raises(NpuqError, match="twice"):
            npuq.pull(REPO)


@pytest.mark.parametrize("number", range(len(hashes(Path()))))
def test_commits(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path, number: int
) -> None:
    """Which commit a branch is at, or a commit made: it becomes a folder's name, and what refs/ holds."""
    value = hashes(victim)[number]
    hub.say = changed(r"/revision/|/models/[^/]+/[^/]+$", lambda answer: {**answer, "sha": value})
    run_all(entries, tmp_path, victim)
    hub.say = changed("/commit/", lambda answer: {**answer, "commitOid": value})
    hub.state.put(REPO, {"config.json": b'{"a": 1}'})
    run_all({"push": entries["push"]}, tmp_path, victim)


@pytest.mark.parametrize("answer", [None, [], "x", 7, {"sha": None}, {"num": "../x", "name": ["x"]}])
def test_answers_that_make_no_sense(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path, answer: object
) -> None:
    """To every question but for content, one route at a time."""
    for route in (
        "whoami",
        "repos/create",
        "/revision/",
        "/refs",
        "/branch/",
        "/tag/",
        "discussions",
        "preupload",
        "batch",
        "/commit/",
    ):
        hub.state.put(REPO, {"config.json": b'{"a": 1}'})
        hub.say = changed(route, lambda right: answer)
        pushes = {name: run for name, run in entries.items() if "push" in name}
        run_all(pushes, tmp_path, victim)


@pytest.mark.parametrize("number", range(len(paths(Path()))))
def test_names_in_a_manifest(
    hub: LoopbackHub, there: dict[str, bytes], entries: dict[str, Entry], tmp_path: Path, victim: Path, number: int
) -> None:
    value, manifest = paths(victim)[number], json.loads(there[MANIFEST])
    manifest["files"][value if isinstance(value, str) else MARK] = {"size": 1, "sha256": "0" * 64}
    place(hub, MANIFEST, json.dumps(manifest), {value: b"x"} if isinstance(value, str) else {})
    run_all(entries, tmp_path, victim)


def test_the_name_of_what_is_not_whole(hub: LoopbackHub, there: dict[str, bytes], tmp_path: Path) -> None:
    """It would be taken for the beginning of another file."""
    manifest = json.loads(there[MANIFEST])
    manifest["files"]["config.json.npuq-part"] = entry_of(b"x")
    place(hub, MANIFEST, json.dumps(manifest), {"config.json.npuq-part": b"x"})
    with pytest.raises(NpuqError, match="is a name of npuq's own"):
        npuq.pull(REPO, tmp_path / "there")


@pytest.mark.parametrize("key", ["sha256", "size"])
def test_hashes_and_sizes_in_a_manifest(
    hub: LoopbackHub, there: dict[str, bytes], entries: dict[str, Entry], tmp_path: Path, victim: Path, key: str
) -> None:
    readers = {name: entries[name] for name in ("pull", "pull to a folder", "resolve", "push")}
    for value in hashes(victim) if key == "sha256" else SIZES:
        manifest = json.loads(there[MANIFEST])
        # What any owner of a repository can put there: an ordinary file, of any size.
        manifest["files"]["big.bin"] = {**entry_of(BIG), key: value}
        place(hub, MANIFEST, json.dumps(manifest), {"big.bin": BIG})
        run_all(readers, tmp_path, victim)


BIG = b"EVIL" * (5 << 18)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"7", b'{"format_version": 1}', b"[" * 100_000, b'{"a": ' * 100_000, b"\xff\xfe", b"{}",
     b'{"format_version": 1, "files": []}', b'{"format_version": 1, "files": {"a": 1}}',
     b'{"format_version": NaN, "files": {}}', b'{"format_version": "\\u001b[31m", "files": {}}',
     b'{"format_version": 1, "files": {"a": {"size": 1' + b"0" * 5000 + b"}}}"],
)  # fmt: skip
def test_no_manifest(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path, content: bytes
) -> None:
    for name in (MANIFEST, "npuq/unfinished.json"):
        hub.state.put(REPO, {name: content})
        run_all(entries, tmp_path, victim)


@pytest.mark.parametrize("number", range(len(paths(Path()))))
def test_names_in_an_index(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path, number: int
) -> None:
    value = paths(victim)[number]
    files = dict(hub.state.repos[REPO].commit("main").files)
    del files[MANIFEST]
    hub.state.repos[REPO].add_commit("main", "no manifest", files)
    index = json.dumps({"weight_map": {"t1": value, "t2": "model-2.safetensors"}})
    place(hub, "model.safetensors.index.json", index, {value: b"x"} if isinstance(value, str) else {})
    readers = ("resolve", "stream", "npuq verify", "npuq convert", "npuq generate")
    run_all({name: entries[name] for name in readers}, tmp_path, victim)


@pytest.mark.parametrize("number", range(len(paths(Path()))))
def test_names_in_the_note_on_an_unfinished_push(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path, number: int
) -> None:
    value = paths(victim)[number]
    place(hub, "npuq/unfinished.json", json.dumps({"replaces": [value]}), {})
    run_all({name: run for name, run in entries.items() if "push" in name or name == "pull"}, tmp_path, victim)


@pytest.mark.parametrize(
    "revision", ["../x", "/x", "a/../../x", "", ".", "x.lock", "a b", "\x1b", "x\0", "a//b", "-x", "@{1}"]
)
def test_revisions(hub: LoopbackHub, there: object, tmp_path: Path, victim: Path, revision: str) -> None:
    """From the user, or from who wrote a script for him."""
    runs: dict[str, Entry] = {
        "pull": lambda target: npuq.pull(REPO, revision=revision),
        "resolve": lambda target: resolve(REPO, revision=revision),
        "stream": lambda target: RemoteCheckpoint.open_remote(REPO, target, revision=revision),
        "push": lambda target: npuq.push(tmp_path, REPO, revision=revision),
    }
    run_all(runs, tmp_path, victim)
    with pytest.raises(NpuqError, match="is not a branch, tag or commit"):
        npuq.pull(REPO, revision=revision)
    assert not hub.log


class TestFolder:
    """A folder that was filled by somebody else, with a manifest: git clones bring links."""

    @pytest.mark.parametrize("link", ["npuq", "model-1.safetensors.npuq-part", "sub", "npuq/manifest.npuq-part"])
    def test_links_out_of_it(
        self, hub: LoopbackHub, there: dict[str, bytes], small: Path, tmp_path: Path, victim: Path, link: str
    ) -> None:
        manifest = json.loads(there[MANIFEST])
        manifest["files"]["sub/x"] = entry_of(b"x")
        place(hub, MANIFEST, json.dumps(manifest), {"sub/x": b"x"})
        target = tmp_path / "there"
        (target / "npuq").mkdir(parents=True)
        inside = victim / MARK
        if link in ("npuq", "sub"):
            inside.mkdir()
        else:
            inside.write_bytes(b"mine")
        if link == "npuq":
            (target / "npuq").rmdir()
        (target / link).symlink_to(inside)
        with watched() as watch, suppress(NpuqError):
            npuq.pull(REPO, target)
        assert not watch.outside(tmp_path)
        assert [path.name for path in victim.rglob("*")] == [MARK]
        assert inside.is_dir() or inside.read_bytes() == b"mine"


class TestModelScope:
    @pytest.fixture
    def runs(
        self,
        scope: LoopbackModelScope,
        small: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> dict[str, Entry]:
        scope.repos[REPO] = files_of(small)
        return {
            "pull": lambda target: pull(REPO, backoff=QUICK),
            "pull to a folder": lambda target: pull(REPO, target, backoff=QUICK),
            "push": lambda target: push(small, REPO, backoff=QUICK),
            "npuq pull": lambda target: command(capsys, monkeypatch, "pull", REPO, target, "--hub", "modelscope"),
        }

    def test_an_honest_hub(self, runs: dict[str, Entry], tmp_path: Path, victim: Path) -> None:
        runs["pull to a folder"](tmp_path / "there")
        assert (tmp_path / "there" / MANIFEST).is_file()
        run_all(runs, tmp_path, victim)

    @pytest.mark.parametrize("key", ["Path", "Size", "Sha256", "Type"])
    def test_listing(
        self, scope: LoopbackModelScope, runs: dict[str, Entry], tmp_path: Path, victim: Path, key: str
    ) -> None:
        for value in SIZES if key == "Size" else hashes(victim):

            def lie(request: str, answer: Any, value: Any = value) -> Any:
                if not request.endswith("/repo/files"):
                    return answer
                files = answer["Data"]["Files"]
                added = [{**files[0], key: value}]
                data = {"Files": [*files, *added] if key == "Path" else [{**file, key: value} for file in files]}
                return {**answer, "Data": data, "data": data}

            scope.say = lie
            run_all(runs, tmp_path, victim)

    @pytest.mark.parametrize("key", ["name", "sha256", "size"])
    def test_manifest(
        self, scope: LoopbackModelScope, runs: dict[str, Entry], tmp_path: Path, victim: Path, key: str
    ) -> None:
        sealed = scope.repos[REPO][MANIFEST]
        for value in {"name": paths, "sha256": hashes, "size": lambda victim: SIZES}[key](victim):
            manifest = json.loads(sealed)
            if key == "name":
                manifest["files"][value if isinstance(value, str) else MARK] = entry_of(b"x")
            else:
                manifest["files"]["config.json"][key] = value
            scope.repos[REPO][MANIFEST] = json.dumps(manifest).encode()
            run_all(runs, tmp_path, victim)


def changed(route: str, change: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    """A hub that answers as `change` has it, where the request contains the regular expression."""
    import re

    return lambda request, answer: change(answer) if re.search(route, request) else answer


def with_end(value: Any, end: str) -> Any:
    return value + end if isinstance(value, str) else value


def put(item: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    outer, _, inner = place.partition(".")
    if not inner:
        return {**item, outer: value}
    return {**item, outer: {**item[outer], inner: value}} if outer in item else item


def place(hub: LoopbackHub, name: str, content: str, others: dict[str, bytes]) -> None:
    """Commit a file and ordinary files beside it, whatever their names are."""
    repo = hub.state.repos[REPO]
    files = dict(repo.commit("main").files)
    repo.add_commit(
        "main",
        "placed",
        {**files, name: regular(content.encode()), **{key: regular(value) for key, value in others.items()}},
    )
