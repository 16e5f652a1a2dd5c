"""Push to and pull from ModelScope, with its real client against a loopback server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from faults import Fault
from json_schemas import check
from loopback_modelscope import READER, LoopbackModelScope
from support import CARD, MANIFEST, REPO, alter, contents, files_of, kill_when, npuq_process, npuq_run, reseal, shards

import npuq
from npuq.errors import HubError
from npuq.hub.modelscope.hub import ModelScope
from npuq.hub.names import Revision
from npuq.hub.remote_state import UNFINISHED
from npuq.hub.transfer import limits
from npuq.hub.transfer.retry import Backoff

pull, push = partial(npuq.pull, hub="modelscope"), partial(npuq.push, hub="modelscope")


def assert_there(scope: LoopbackModelScope, artifact: Path) -> None:
    there = scope.repos[REPO]
    assert set(there) == {*contents(artifact), CARD}
    for name, content in contents(artifact).items():
        assert there[name] == content, name


def test_push_and_pull(scope: LoopbackModelScope, artifact: Path, tmp_path: Path) -> None:
    done = npuq_run("push", artifact, REPO, "--hub", "modelscope", "--tag", "v1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sent_files"] == len(contents(artifact)) + 1
    assert_there(scope, artifact)
    assert scope.tags == {"v1": "master"}
    assert scope.commits[0] == [f"create {UNFINISHED}"]
    assert scope.commits[-2] == [f"create {MANIFEST}"]
    pulled = npuq_run("pull", REPO, tmp_path / "here", "--hub", "modelscope")
    assert pulled.returncode == 0, pulled.stderr
    assert contents(tmp_path / "here") == contents(artifact)
    assert contents(pull(REPO)) == contents(artifact)


def test_a_second_push_sends_what_changed(scope: LoopbackModelScope, artifact: Path) -> None:
    push(artifact, REPO)
    commits = len(scope.commits)
    assert push(artifact, REPO).sent_files == 0
    assert len(scope.commits) == commits
    alter(shards(artifact)[1])
    reseal(artifact)
    before = scope.sent_bytes()
    push(artifact, REPO)
    manifest = (artifact / MANIFEST).stat().st_size
    # The client sends files of more than 64 KiB through the store, the manifest among them.
    assert scope.sent_bytes() - before in (size := shards(artifact)[1].stat().st_size, size + manifest)
    assert_there(scope, artifact)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET .*/repo/files", status=500),
        Fault("POST .*/objects/batch", status=503),
        Fault("PUT /store", status=500),
        Fault("POST .*/commit/", after=2, status=500),
        Fault("POST .*/commit/", after=2, lose_response=True),
        Fault("PUT /store", reset_after=1000),
    ],
    ids=lambda fault: f"{fault.pattern} {fault.status or fault.reset_after or 'lost'}",
)
def test_push_faults(scope: LoopbackModelScope, artifact: Path, backoff: Backoff, fault: Fault) -> None:
    scope.faults.add(fault)
    summary = push(artifact, REPO, backoff=backoff)
    assert scope.faults.hits == 1
    assert_there(scope, artifact)
    assert summary.sent_files == len(contents(artifact)) + 1
    # Every file was committed once (after a lost answer the client repeats that one), the mark first, the manifest
    # last but for taking the mark away; and no content went twice but what the fault hit.
    made = [action for actions in scope.commits for action in actions]
    again = 1 if fault.lose_response else 0
    assert len(made) == len({*made}) + again
    assert {*made} == {
        *(f"create {name}" for name in (*contents(artifact), CARD, UNFINISHED)),
        f"delete {UNFINISHED}",
    }
    assert (made[0], made[-2:]) == (f"create {UNFINISHED}", [f"create {MANIFEST}", f"delete {UNFINISHED}"])
    puts = [seen.request for seen in scope.log if seen.request.startswith("PUT /store/")]
    assert len(puts) == len({*puts}) + ("PUT" in fault.pattern)


def test_a_fault_that_stays(scope: LoopbackModelScope, artifact: Path, backoff: Backoff) -> None:
    scope.faults.add(Fault("PUT /store", times=10**6, status=500))
    with pytest.raises(
        HubError, match=r"were not sent .*and 13 more.*the hub keeps failing .*: it continues"
    ) as caught:
        push(artifact, REPO, backoff=backoff)
    assert "\n" not in str(caught.value)
    assert MANIFEST not in scope.repos[REPO]
    scope.faults.clear()
    push(artifact, REPO, backoff=backoff)
    assert_there(scope, artifact)


def test_one_bad_file_stops_no_other(scope: LoopbackModelScope, artifact: Path) -> None:
    scope.faults.add(Fault("PUT /store", after=1, times=1, status=400))
    with pytest.raises(HubError, match=r"1 of \d+ files were not sent \(model-00002.*ModelScope refused"):
        push(artifact, REPO)
    there = scope.repos[REPO]
    assert shards(artifact)[1].name not in there
    assert all(shard.name in there for shard in shards(artifact) if shard != shards(artifact)[1])
    assert MANIFEST not in there
    with pytest.raises(HubError, match="a push to it is not finished"):
        pull(REPO)
    push(artifact, REPO)
    assert_there(scope, artifact)


def test_what_somebody_else_damaged_is_pushed_again(scope: LoopbackModelScope, artifact: Path) -> None:
    push(artifact, REPO)
    scope.repos[REPO][shards(artifact)[0].name] = b"theirs"
    push(artifact, REPO)
    assert_there(scope, artifact)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_killed(scope: LoopbackModelScope, artifact: Path, count: int) -> None:
    process = npuq_process("push", artifact, REPO, "--hub", "modelscope", "--no-verify", "--quiet")
    assert kill_when(process, lambda: len(scope.commits) >= count)
    before = len(scope.blobs)
    push(artifact, REPO)
    assert_there(scope, artifact)
    puts = [seen.request for seen in scope.log if seen.request.startswith("PUT /store/")]
    assert len(puts) <= len(scope.blobs) + 1, (before, "content was sent twice")


@pytest.mark.parametrize(
    "fault",
    [
        Fault(r"GET .*/repo$", after=4, status=500),
        Fault(r"GET .*/repo$", after=4, reset_after=100),
        Fault(r"GET .*/repo$", after=4, corrupt=10),
    ],
    ids=["500", "reset", "corrupt"],
)
def test_pull_faults(scope: LoopbackModelScope, artifact: Path, tmp_path: Path, fault: Fault) -> None:
    push(artifact, REPO)
    scope.faults.add(fault)
    assert contents(pull(REPO, tmp_path / "here")) == contents(artifact)
    assert scope.faults.hits == 1


def test_wrong_content_is_refused(scope: LoopbackModelScope, artifact: Path, tmp_path: Path) -> None:
    push(artifact, REPO)
    name = shards(artifact)[0].name
    scope.repos[REPO][name] = bytes(len(scope.repos[REPO][name]))
    with pytest.raises(HubError, match=name):
        pull(REPO, tmp_path / "here")
    assert not (tmp_path / "here" / MANIFEST).exists()


@pytest.mark.parametrize(("token", "reason"), [("ms-secret-wrong", "myaccesstoken"), (READER, "may not do this")])
def test_tokens(scope: LoopbackModelScope, artifact: Path, token: str, reason: str) -> None:
    done = npuq_run("push", artifact, REPO, "--hub", "modelscope", "--no-verify", "--token", token)
    assert done.returncode == 1
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert token not in done.stderr + done.stdout


def test_without_the_extra(artifact: Path) -> None:
    code = (
        "import sys; sys.modules['modelscope_hub'] = None; from npuq.cli.main import main; "
        f"sys.argv = ['npuq', 'push', {str(artifact)!r}, {REPO!r}, '--hub', 'modelscope']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'npuq[modelscope]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_pull_requests(artifact: Path) -> None:
    done = npuq_run("push", artifact, REPO, "--hub", "modelscope", "--create-pr")
    assert done.returncode == 1
    assert "opens no pull requests" in done.stderr
    with pytest.raises(HubError, match="opens no pull requests"):
        push(artifact, REPO, create_pr=True)


def test_quiet_is_quiet(scope: LoopbackModelScope, artifact: Path, tmp_path: Path) -> None:
    """Without a terminal too: the client would draw a bar a file."""
    done = npuq_run("push", artifact, REPO, "--hub", "modelscope", "--quiet", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    check("push", json.loads(done.stdout))
    done = npuq_run("pull", REPO, tmp_path / "here", "--hub", "modelscope", "--quiet", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    check("pull", json.loads(done.stdout))
    assert json.loads(done.stdout)["path"] == str(tmp_path / "here")


def test_a_kill_goes_on_inside_the_file(scope: LoopbackModelScope, artifact: Path, tmp_path: Path) -> None:
    push(artifact, REPO)
    shard, there = shards(artifact)[1], tmp_path / "here"
    # What a killed pull leaves.
    (there / "npuq").mkdir(parents=True)
    (there / f"{shard.name}.npuq-part").write_bytes(shard.read_bytes()[:1_000_000])
    scope.log.clear()
    assert contents(pull(REPO, there)) == contents(artifact)
    ranges = [seen.range for seen in scope.log if seen.range is not None]
    assert f"bytes=1000000-{shard.stat().st_size - 1}" in ranges


def test_the_cache_follows_its_branch(scope: LoopbackModelScope, artifact: Path, example_fp8: Path) -> None:
    push(artifact, REPO)
    there = pull(REPO)
    assert (there / shards(artifact)[5].name).exists()
    other = artifact.parent / "other"
    npuq.convert_checkpoint(example_fp8, other, method="minmax")
    push(other, REPO)
    assert pull(REPO) == there
    assert contents(there) == contents(other)
    assert len(shards(there)) == len(shards(other)) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a--b/c", "m"), ("a/b--c", "m")), (("a/b", "x/y"), ("a/b", "x--y")), (("a/b", "x%2Fy"), ("a/b", "x/y"))],
)
def test_every_branch_has_its_own_cache_folder(
    scope: LoopbackModelScope, artifact: Path, tmp_path: Path, one: tuple[str, str], other: tuple[str, str]
) -> None:
    """ModelScope allows names that Hugging Face does not."""
    folders = {ModelScope(repo).locate(Revision(branch)).place.directory for repo, branch in (one, other)}
    assert len(folders) == 2
    assert all(folder.is_relative_to(tmp_path / "ms-cache" / "npuq") for folder in folders)


def test_an_interrupted_pull_follows_its_branch(
    scope: LoopbackModelScope, artifact: Path, example_fp8: Path, backoff: Backoff
) -> None:
    push(artifact, REPO)
    scope.faults.add(Fault(r"GET .*/repo$", after=6, status=410, times=10**6))
    with pytest.raises(HubError):
        pull(REPO, backoff=backoff)
    scope.faults.clear()
    other = artifact.parent / "other"
    npuq.convert_checkpoint(example_fp8, other, method="minmax")
    push(other, REPO)
    there = pull(REPO)
    assert contents(there) == contents(other)
    assert set(files_of(there)) == {*contents(other), CARD}


def test_a_folder_of_the_users_is_not_made_another_artifact(
    scope: LoopbackModelScope, artifact: Path, tmp_path: Path
) -> None:
    push(artifact, REPO)
    pull(REPO, tmp_path / "here")
    alter(shards(artifact)[0])
    reseal(artifact)
    push(artifact, REPO)
    with pytest.raises(HubError, match="holds another artifact, or another revision"):
        pull(REPO, tmp_path / "here")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(r"GET .*/repo$", longer=1, times=10**6), "sends more than the .* bytes that it lists"),
        (Fault(r"GET .*/repo$", endless=True, times=10**6), "sends more than the .* bytes that it lists"),
        (
            Fault(r"GET .*/repo$", times=10**6, sent_headers={"Content-Range": "bytes 5-6/7"}),
            "asked for bytes from 0, the hub answered 206",
        ),
        (Fault(r"GET .*/repo$", times=10**6, sent_headers={"Content-Encoding": "gzip"}), "sends it compressed"),
        (
            Fault(r"GET .*/repo$", corrupt=5, times=10**6),
            r"manifest\.json is not what .* \(its hash differs\)",
        ),
    ],
    ids=["longer", "without end", "of another place", "compressed", "corrupt"],
)
def test_wrong_bodies(scope: LoopbackModelScope, artifact: Path, tmp_path: Path, fault: Fault, said: str) -> None:
    push(artifact, REPO)
    scope.log.clear()
    scope.faults.add(fault)
    with pytest.raises(HubError, match=said):
        pull(REPO, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    assert sum(seen.sent for seen in scope.log) < 64 << 20


PULL_ROUTES = ["repo/files", r"GET .*/repo$"]
PUSH_ROUTES = ["users/me", "repo/files", "objects/batch", "PUT /store", "/commit/"]
ENTRIES = [*(("pull", route) for route in PULL_ROUTES), *(("push", route) for route in PUSH_ROUTES)]


@pytest.fixture
def runs(scope: LoopbackModelScope, artifact: Path, backoff: Backoff) -> dict[str, Callable[[], object]]:
    push(artifact, REPO)
    alter(shards(artifact)[0])
    return {
        "pull": lambda: pull(REPO, backoff=backoff),
        "push": lambda: (reseal(artifact), push(artifact, REPO, backoff=backoff)),
    }


@pytest.mark.parametrize(("run", "route"), ENTRIES)
def test_bodies_that_nobody_needs_are_not_read(
    scope: LoopbackModelScope, runs: dict[str, Callable[[], object]], run: str, route: str
) -> None:
    """Of redirects and of errors, also where the client then asks again."""
    for status in (302, 418, 500):
        scope.faults.clear()
        scope.log.clear()
        headers = {"Location": f"{scope.endpoint}/elsewhere"} if status == 302 else {}
        scope.faults.add(Fault(route, status=status, endless=True, times=10**6, headers=headers))
        with pytest.raises(HubError) as caught:
            runs[run]()
        assert "\n" not in str(caught.value)
        assert scope.faults.hits
        assert all(seen.sent < 32 << 20 for seen in scope.log), status


@pytest.mark.parametrize(("run", "route"), [entry for entry in ENTRIES if "/repo$" not in entry[1]])
def test_answers_without_end(
    scope: LoopbackModelScope,
    runs: dict[str, Callable[[], object]],
    monkeypatch: pytest.MonkeyPatch,
    run: str,
    route: str,
) -> None:
    monkeypatch.setattr(limits, "MOST_JSON_BYTES", 1 << 20)
    scope.faults.add(Fault(route, endless=True, times=10**6))
    with pytest.raises(HubError, match="more than the 1048576 bytes that npuq reads of an answer"):
        runs[run]()
    assert all(seen.sent < 32 << 20 for seen in scope.log)


def test_a_listing_that_is_no_json(scope: LoopbackModelScope, runs: dict[str, Callable[[], object]]) -> None:
    scope.faults.add(Fault("repo/files", body=b"<html>", times=10**6))
    with pytest.raises(HubError, match="the hub's answer is not understood"):
        runs["pull"]()


def test_redirects_without_end(scope: LoopbackModelScope, runs: dict[str, Callable[[], object]]) -> None:
    scope.log.clear()
    again = {"Location": f"{scope.endpoint}/again"}
    scope.faults.add(Fault("GET .*/repo$|/again", status=302, times=10**6, headers=again))
    with pytest.raises(HubError):
        runs["pull"]()
    assert 0 < len([seen for seen in scope.log if seen.request == "GET /again"]) <= 10


@pytest.mark.parametrize(
    "route", ["users/me", "repo/files", r"GET .*/repo$", "objects/batch", "PUT /store", "/commit/"]
)
def test_what_is_said_of_a_status(
    scope: LoopbackModelScope, artifact: Path, tmp_path: Path, backoff: Backoff, route: str
) -> None:
    if "GET" in route:
        push(artifact, REPO)
    for status in (400, 401, 403, 404, 413, 429, 500, 503):
        scope.faults.clear()
        scope.faults.add(Fault(route, status=status, times=10**6))
        with pytest.raises(HubError) as caught:
            if "GET" in route:
                pull(REPO, tmp_path / "here", backoff=backoff)
            else:
                push(artifact, REPO, backoff=backoff)
        message = str(caught.value)
        assert "\n" not in message
        assert ("run the same command again" in message) == (status in (429, 500, 503)), (status, message)
