"""Push against the loopback hub, with the real client: what is sent, what survives, what is refused."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from fault_tables import PUSH
from faults import Fault
from json_schemas import check
from loopback import LoopbackHub
from loopback_state import User
from support import (
    CARD,
    DEEPSEEK_V4,
    EXAMPLE,
    MANIFEST,
    REPO,
    alter,
    assert_pushed,
    contents,
    kill_when,
    npuq_process,
    npuq_run,
    reseal,
    shards,
)

import npuq
from npuq.errors import ArtifactError, HubError
from npuq.hub.huggingface import commits
from npuq.hub.transfer.retry import Backoff

UNFINISHED = "npuq/unfinished.json"


@pytest.mark.parametrize("made_artifact", [EXAMPLE, DEEPSEEK_V4], indirect=True, scope="session")
def test_push_then_pull_gives_the_same_files(hub: LoopbackHub, artifact: Path) -> None:
    summary = npuq.push(artifact, REPO)
    assert_pushed(hub, artifact)
    assert summary.commit == hub.state.repos[REPO].branches["main"]
    assert hub.uploaded_bytes() == sum(path.stat().st_size for path in artifact.rglob("*.safetensors"))
    assert contents(npuq.pull(REPO)) == contents(artifact)


def test_second_push_sends_nothing_and_commits_nothing(hub: LoopbackHub, artifact: Path) -> None:
    first = npuq.push(artifact, REPO)
    hub.log.clear()
    second = npuq.push(artifact, REPO)
    assert second.commit == first.commit
    assert second.sent_files == second.sent_bytes == 0
    assert not hub.requests(r"^PUT|/commit/|/preupload/")


def test_one_changed_shard_costs_that_shards_bytes(hub: LoopbackHub, artifact: Path) -> None:
    npuq.push(artifact, REPO)
    hub.log.clear()
    changed = shards(artifact)[2]
    alter(changed)
    reseal(artifact)
    npuq.push(artifact, REPO)
    assert hub.uploaded_bytes() == changed.stat().st_size
    assert_pushed(hub, artifact)


def test_a_stored_evaluation_costs_manifest_and_card(hub: LoopbackHub, artifact: Path, eval_text: Path) -> None:
    npuq.push(artifact, REPO)
    before = hub.state.files(REPO)
    hub.log.clear()
    text = artifact.parent / "text.txt"
    text.write_text(eval_text.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    done = npuq_run("evaluate", artifact, "--text", text, "--context", "64", "--save", "--quiet", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    npuq.push(artifact, REPO)
    after = hub.state.files(REPO)
    assert hub.uploaded_bytes() == 0
    assert {name for name in after if after[name] != before.get(name)} == {MANIFEST, CARD}
    (commit,) = hub.requests("/commit/")
    assert 0 < commit.received < 3 * (len(after[MANIFEST]) + len(after[CARD]))
    pulled = npuq.pull(REPO)
    assert contents(pulled) == contents(artifact)
    (stored,) = json.loads((pulled / MANIFEST).read_text())["evaluations"]
    assert stored["perplexity"] == json.loads(done.stdout)["perplexity"]
    assert f"| text.txt | `{stored['text_sha256'][:16]}` | 64 |" in (pulled / CARD).read_text()


def test_what_somebody_else_damaged_is_pushed_again(hub: LoopbackHub, artifact: Path) -> None:
    """The manifest goes away meanwhile, and comes back although it is the same."""
    npuq.push(artifact, REPO)
    hub.state.put(REPO, {shards(artifact)[0].name: b"x" * (2 << 20)})
    npuq.push(artifact, REPO)
    assert_pushed(hub, artifact)
    assert contents(npuq.pull(REPO)) == contents(artifact)


def test_multipart_transfer(hub: LoopbackHub, artifact: Path) -> None:
    hub.multipart_from = 1 << 20
    hub.part_size = 300_000
    npuq.push(artifact, REPO)
    assert hub.requests(r"^PUT /lfs/\w+/2$")
    assert_pushed(hub, artifact)


@pytest.mark.parametrize("fault", PUSH.values(), ids=PUSH.keys())
def test_a_fault_is_survived(hub: LoopbackHub, artifact: Path, backoff: Backoff, fault: Fault) -> None:
    hub.faults.add(fault)
    summary = npuq.push(artifact, REPO, backoff=backoff)
    assert hub.faults.hits == fault.times
    assert_pushed(hub, artifact)
    # The mark, the weights, the rest, once each; no file sent twice but the one that the fault hit.
    repo = hub.state.repos[REPO]
    assert len(repo.commits) == 4
    assert summary.commit == repo.branches["main"]
    sizes = [path.stat().st_size for path in artifact.rglob("*.safetensors")]
    again = fault.times * max(sizes) if "PUT" in fault.pattern else 0
    assert sum(sizes) <= hub.uploaded_bytes() <= sum(sizes) + again


def test_a_lost_commit_answer_makes_no_second_commit(hub: LoopbackHub, artifact: Path, backoff: Backoff) -> None:
    hub.faults.add(Fault("/commit/", times=1, after=1, lose_response=True))
    npuq.push(artifact, REPO, backoff=backoff)
    titles = [commit.title for commit in hub.state.repos[REPO].commits]
    assert len(titles) == 4  # the repository's own, the mark, the weights, the rest


def test_killed_at_random_points_and_pushed_again(hub: LoopbackHub, artifact: Path) -> None:
    chance = random.Random(20)
    total = sum(path.stat().st_size for path in artifact.rglob("*.safetensors"))
    killed = 0
    for requests in sorted(chance.sample(range(6, 40), 3)):
        process = npuq_process("push", artifact, REPO, "--no-verify", "--quiet")
        start = len(hub.log)
        killed += kill_when(process, lambda start=start, requests=requests: len(hub.log) - start >= requests)
        # Whatever it had reached, a reader is never given a mixture.
        if MANIFEST in hub.state.files(REPO) if REPO in hub.state.repos else False:
            break
        with pytest.raises(HubError):
            npuq.pull(REPO)
    assert killed
    done = npuq_run("push", artifact, REPO, "--no-verify", "--quiet")
    assert done.returncode == 0, done.stderr
    assert_pushed(hub, artifact)
    pulled = npuq.pull(REPO)
    assert contents(pulled) == contents(artifact)
    texts = [
        npuq.load(path).generate("Once upon a time", max_new_tokens=6, temperature=0).text
        for path in (artifact, pulled)
    ]
    assert texts[0] == texts[1] != ""
    # Four files travel at a time; nothing else is sent twice.
    assert hub.uploaded_bytes() <= total + killed * 4 * max(path.stat().st_size for path in shards(artifact))


def test_unfinished_push_is_told_from_an_artifact(hub: LoopbackHub, artifact: Path, backoff: Backoff) -> None:
    npuq.push(artifact, REPO)
    alter(shards(artifact)[0])
    reseal(artifact)
    hub.faults.add(Fault("^PUT /lfs/", status=500, times=10**6))
    with pytest.raises(HubError, match=r"the hub keeps failing .*run the same command again: it continues"):
        npuq.push(artifact, REPO, backoff=backoff)
    there = hub.state.files(REPO)
    assert MANIFEST not in there
    assert UNFINISHED in there
    with pytest.raises(HubError, match="a push to it is not finished"):
        npuq.pull(REPO)
    hub.faults.clear()
    npuq.push(artifact, REPO)
    assert_pushed(hub, artifact)
    assert contents(npuq.pull(REPO)) == contents(artifact)


def test_one_bad_file_does_not_cancel_the_others(hub: LoopbackHub, artifact: Path, backoff: Backoff) -> None:
    bad = shards(artifact)[1]
    sha256 = json.loads((artifact / MANIFEST).read_text())["files"][bad.name]["sha256"]
    hub.faults.add(Fault(f"^PUT /lfs/{sha256}", status=400, times=10**6))
    with pytest.raises(HubError, match=rf"1 of \d+ files were not sent \({bad.name}\)"):
        npuq.push(artifact, REPO, backoff=backoff)
    there = hub.state.files(REPO)
    large = {path.name for path in shards(artifact) if path.stat().st_size > 1 << 20}
    assert len(large) > 8
    assert large - set(there) == {bad.name}
    hub.faults.clear()
    hub.log.clear()
    npuq.push(artifact, REPO)
    last = [path for path in artifact.rglob("*.safetensors") if path.stat().st_size <= 1 << 20]
    assert hub.uploaded_bytes() == sum(path.stat().st_size for path in [bad, *last])
    assert_pushed(hub, artifact)


def test_a_file_that_changed_since_conversion_is_not_sent(hub: LoopbackHub, artifact: Path) -> None:
    alter(shards(artifact)[0])
    with pytest.raises(HubError, match="its sha256 is not the manifest's"):
        npuq.push(artifact, REPO)
    assert MANIFEST not in hub.state.files(REPO)


def test_commits_come_as_weights_arrive(hub: LoopbackHub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "SECONDS_BETWEEN", 0.0)
    npuq.push(artifact, REPO)
    added = [set(commit.files) for commit in hub.state.repos[REPO].commits]
    order = [
        name for before, after in itertools.pairwise(added) for name in after - before if name.startswith("model-")
    ]
    assert order == [path.name for path in shards(artifact)]
    assert_pushed(hub, artifact)


def test_fewer_shards_leave_no_old_ones_behind(hub: LoopbackHub, artifact: Path, example_fp8: Path) -> None:
    npuq.push(artifact, REPO)
    other = artifact.parent / "other"
    npuq.convert_checkpoint(example_fp8, other, method="minmax")
    hub.faults.add(Fault("^PUT /lfs/", status=400, times=10**6))
    with pytest.raises(HubError):  # the list of what to remove survives an unfinished push
        npuq.push(other, REPO)
    hub.faults.clear()
    npuq.push(other, REPO)
    assert_pushed(hub, other)


def test_foreign_weights_in_the_repository_are_refused(hub: LoopbackHub, artifact: Path) -> None:
    hub.state.put(REPO, {"adapter.safetensors": b"theirs"})
    with pytest.raises(HubError, match=r"adapter\.safetensors, which is not part of this artifact"):
        npuq.push(artifact, REPO)
    assert hub.state.files(REPO)["adapter.safetensors"] == b"theirs"


def test_branch_tag_and_private(hub: LoopbackHub, artifact: Path) -> None:
    summary = npuq.push(artifact, REPO, private=True, revision="w4a8", tag="v1")
    repo = hub.state.repos[REPO]
    assert repo.private
    assert repo.tags == {"v1": summary.commit}
    assert_pushed(hub, artifact, "w4a8")
    assert MANIFEST not in hub.state.files(REPO, "main")
    assert contents(npuq.pull(REPO, revision="v1")) == contents(artifact)
    npuq.push(artifact, REPO, revision="w4a8", tag="v1")
    alter(shards(artifact)[0])
    reseal(artifact)
    with pytest.raises(HubError, match="the tag exists"):
        npuq.push(artifact, REPO, revision="w4a8", tag="v1")


def test_pull_request_is_continued_and_opened_at_the_end(hub: LoopbackHub, artifact: Path, backoff: Backoff) -> None:
    hub.state.put(REPO, {"LICENSE": b"as is"})
    hub.faults.add(Fault("^PUT /lfs/", status=400, times=10**6, after=2))
    with pytest.raises(HubError):
        npuq.push(artifact, REPO, create_pr=True, backoff=backoff)
    hub.faults.clear()
    summary = npuq.push(artifact, REPO, create_pr=True)
    assert summary.pull_request == f"{hub.endpoint}/{REPO}/discussions/1"
    assert [pull["status"] for pull in hub.state.repos[REPO].discussions] == ["open"]
    assert MANIFEST not in hub.state.files(REPO)
    there = hub.state.files(REPO, "refs/pr/1")
    assert {name: there[name] for name in contents(artifact)} == contents(artifact)


class TestTokens:
    def test_none(self, hub: LoopbackHub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match=r"no token: make one with write access at https://huggingface\.co/settings"):
            npuq.push(artifact, REPO)

    @pytest.mark.parametrize(
        ("token", "repo", "message"),
        [
            ("hf_unknown", REPO, "does not accept the token; make a new one at https"),
            ("hf_reader", "bob/mine", "may not write to bob/mine"),
            ("hf_other", REPO, "may not write to alice/tiny-w4a8"),
        ],
    )
    def test_refused(self, hub: LoopbackHub, artifact: Path, token: str, repo: str, message: str) -> None:
        hub.state.create_repo(REPO)
        before = hub.state.files(REPO)
        with pytest.raises(HubError, match=message) as caught:
            npuq.push(artifact, repo, token=token)
        assert token not in str(caught.value)
        assert caught.value.__cause__ is None
        assert hub.state.files(REPO) == before

    def test_it_expires_amid_a_push(self, hub: LoopbackHub, artifact: Path, backoff: Backoff) -> None:
        hub.faults.add(Fault("objects/batch", after=3, times=10**6, status=401))
        with pytest.raises(HubError, match="does not accept the token") as caught:
            npuq.push(artifact, REPO, backoff=backoff)
        assert "hf_writer" not in str(caught.value)
        hub.faults.clear()
        hub.state.users = {"hf_new": User("alice")}
        sent = hub.uploaded_bytes()
        assert sent > 0
        npuq.push(artifact, REPO, token="hf_new")
        assert hub.uploaded_bytes() == sum(path.stat().st_size for path in artifact.rglob("*.safetensors"))
        assert_pushed(hub, artifact)

    def test_nothing_that_is_pushed_or_printed_has_it(self, hub: LoopbackHub, artifact: Path) -> None:
        done = npuq_run("push", artifact, REPO, "--json")
        assert done.returncode == 0, done.stderr
        check("push", json.loads(done.stdout))
        assert json.loads(done.stdout)["repo"] == REPO
        assert "hf_writer" not in done.stdout + done.stderr
        assert all(b"hf_writer" not in content for content in hub.state.files(REPO).values())


class TestCommand:
    def test_an_artifact_that_verify_rejects(self, hub: LoopbackHub, artifact: Path) -> None:
        alter(shards(artifact)[0])
        shown = npuq_run("push", artifact, REPO, "--progress", "lines")
        assert shown.returncode == 1 and "verify: layer 0 done (1 of 5)" in shown.stderr
        done = npuq_run("push", artifact, REPO, "--quiet")
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "verification failed: model-00001-of" in done.stderr
        assert not hub.requests("/commit/")

    def test_no_artifact(self, hub: LoopbackHub, example_fp8: Path) -> None:
        with pytest.raises(ArtifactError, match="no finished npuq artifact"):
            npuq.push(example_fp8, REPO)

    @pytest.mark.parametrize("repo", ["no-owner", "a/b/c", "../x", "alice/"])
    def test_bad_names(self, hub: LoopbackHub, artifact: Path, repo: str) -> None:
        with pytest.raises(HubError, match="write it as user/name"):
            npuq.push(artifact, repo)


class TestCard:
    def test_new(self, hub: LoopbackHub, artifact: Path) -> None:
        npuq.push(artifact, REPO)
        card = hub.state.files(REPO)[CARD].decode()
        assert card.startswith("---\n")
        assert f'npuq.load("{REPO}")' in card
        assert f"vllm serve {REPO}" in card
        assert "PATH_TO" not in card

    def test_the_authors_text_stays(self, hub: LoopbackHub, artifact: Path) -> None:
        theirs = "---\nlicense: mit\ntags: [mine]\n---\n# My model\n\nMind the gap.\n"
        hub.state.put(REPO, {CARD: theirs.encode()})
        npuq.push(artifact, REPO)
        card = hub.state.files(REPO)[CARD].decode()
        assert "# My model\n\nMind the gap.\n\n<!-- npuq" in card
        assert "license: mit" in card
        assert "- mine\n- npuq\n" in card
        hub.state.put(REPO, {CARD: (card + "\nAn afterword.\n").replace("relative", "edited by hand").encode()})
        npuq.push(artifact, REPO)
        again = hub.state.files(REPO)[CARD].decode()
        assert again == card + "\nAn afterword.\n"
        assert contents(npuq.pull(REPO)) == contents(artifact)

    def test_a_front_matter_that_is_no_yaml(self, hub: LoopbackHub, artifact: Path) -> None:
        hub.state.put(REPO, {CARD: b"---\na: [\n---\n"})
        with pytest.raises(
            HubError, match=r"README\.md in alice/tiny-w4a8: its front matter: not valid YAML: .*repair"
        ):
            npuq.push(artifact, REPO)

    def test_the_base_model_of_a_local_source(self, hub: LoopbackHub, artifact: Path) -> None:
        theirs = "---\nbase_model: someone/old\nlicense: mit\n---\n"
        hub.state.put(REPO, {CARD: theirs.encode()})
        npuq.push(artifact, REPO)
        assert "base_model: someone/old\n" in hub.state.files(REPO)[CARD].decode()
        done = npuq_run("push", artifact, REPO, "--no-verify", "--base-model", "someone/a-model")
        assert done.returncode == 0, done.stderr
        card = hub.state.files(REPO)[CARD].decode()
        assert "base_model: someone/a-model\n" in card
        assert "base_model_relation: quantized\n" in card
        assert "license: mit\n" in card
        with pytest.raises(HubError, match="write it as user/name"):
            npuq.push(artifact, REPO, base_model="no-owner")
