"""What pull refuses, and what a repository's name does in place of a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback import LoopbackHub
from support import (
    CARD,
    MANIFEST,
    REPO,
    as_modelslim,
    files_of,
    npuq_run,
    use_cache,
)

import npuq
from npuq.errors import HubError
from npuq.hub import resolve


class TestRefused:
    def test_missing(self, hub: LoopbackHub) -> None:
        with pytest.raises(HubError, match="there is no repository alice/none, or this token may not see it"):
            npuq.pull("alice/none")

    def test_revision(self, hub: LoopbackHub, pushed: Path) -> None:
        with pytest.raises(HubError, match="has no such revision"):
            npuq.pull(REPO, revision="v9")

    def test_private(self, hub: LoopbackHub, pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.state.repos[REPO].private = True
        with pytest.raises(HubError, match="or this token may not see it"):
            npuq.pull(REPO, token="hf_other")
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match="or this token may not see it"):
            npuq.pull(REPO)
        npuq.pull(REPO, token="hf_writer")

    def test_no_artifact(self, hub: LoopbackHub) -> None:
        hub.state.put(REPO, {"config.json": b"{}"})
        with pytest.raises(HubError, match="it is not an artifact of npuq's"):
            npuq.pull(REPO)

    @pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x", "a/../../x"])
    def test_a_name_outside(self, hub: LoopbackHub, pushed: Path, name: str) -> None:
        manifest = json.loads((pushed / MANIFEST).read_text())
        manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
        hub.state.put(REPO, {MANIFEST: json.dumps(manifest).encode()})
        with pytest.raises(HubError, match=r"npuq/manifest\.json: .* is not a file name that may be used"):
            npuq.pull(REPO)

    @pytest.mark.parametrize("content", [b"", b"[]", b'{"format_version": 1}', b'{"format_version": 99, "files": {}}'])
    def test_no_manifest(self, hub: LoopbackHub, pushed: Path, content: bytes) -> None:
        hub.state.put(REPO, {MANIFEST: content})
        with pytest.raises(HubError, match=f"{REPO}: "):
            npuq.pull(REPO)

    def test_a_missing_file(self, hub: LoopbackHub, pushed: Path) -> None:
        manifest = json.loads((pushed / MANIFEST).read_text())
        manifest["files"]["model-x.safetensors"] = {"size": 1, "sha256": "0" * 64}
        hub.state.put(REPO, {MANIFEST: json.dumps(manifest).encode()})
        with pytest.raises(HubError, match=r"model-x\.safetensors is missing there"):
            npuq.pull(REPO)


class TestByName:
    """`user/repo` where a directory is expected."""

    def test_load_generates_the_same_text(self, hub: LoopbackHub, pushed: Path) -> None:
        (here,) = npuq.load(pushed).generate(["Once upon a time"], max_new_tokens=8, temperature=0)
        (there,) = npuq.load(REPO).generate(["Once upon a time"], max_new_tokens=8, temperature=0)
        assert here.token_ids == there.token_ids

    def test_command(self, hub: LoopbackHub, pushed: Path) -> None:
        done = npuq_run("generate", REPO, "--prompt", "Once", "--max-new-tokens", "3", "--json")
        assert done.returncode == 0, done.stderr
        assert [each["completion_tokens"] for each in json.loads(done.stdout)] == [3]

    def test_a_report(self, hub: LoopbackHub, pushed: Path, tmp_path: Path) -> None:
        done = npuq_run("report", REPO, "-o", tmp_path / "report.html")
        assert done.returncode == 0, done.stderr
        assert f"<title>{REPO}: quantization report</title>" in (tmp_path / "report.html").read_text(encoding="utf-8")

    def test_an_unquantized_checkpoint(
        self, hub: LoopbackHub, example_fp8: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        names = [path.name for path in example_fp8.iterdir()]
        hub.state.put("alice/float", {name: (example_fp8 / name).read_bytes() for name in names} | {"big.bin": b"x"})
        fetched = resolve("alice/float")
        assert sorted(path.name for path in fetched.iterdir()) == sorted(names)
        assert all((fetched / name).read_bytes() == (example_fp8 / name).read_bytes() for name in names)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve("alice/float") == fetched
        use_cache(monkeypatch, tmp_path / "empty")
        with pytest.raises(HubError, match="no such directory here; on the hub"):
            resolve("alice/float")

    def test_what_modelslim_quantized(self, hub: LoopbackHub, artifact: Path, tmp_path: Path) -> None:
        theirs = as_modelslim(artifact, tmp_path / "theirs")
        hub.state.put("alice/theirs", files_of(theirs))
        fetched = resolve("alice/theirs")
        assert sorted(path.name for path in fetched.iterdir()) == sorted(path.name for path in theirs.iterdir())
        assert npuq.verify(fetched).problems == ()
        done = npuq_run("pull", "alice/theirs")
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "not an artifact of npuq's; run `npuq convert` on what another tool has quantized" in done.stderr

    def test_a_revision(self, hub: LoopbackHub, pushed: Path) -> None:
        commit = hub.state.repos[REPO].branches["main"]
        hub.state.put(REPO, {CARD: b"changed"})
        assert resolve(f"{REPO}@{commit}").name == commit
        done = npuq_run("pull", f"{REPO}@{commit}", "--quiet")
        assert (done.returncode, Path(done.stdout.strip()).name) == (0, commit), done.stderr
        for wrong in ((f"{REPO}@{commit}", "--revision", "main"), (f"{REPO}@",)):
            done = npuq_run("pull", *wrong)
            assert (done.returncode, "give the revision once" in done.stderr) == (2, True)

    def test_what_exists_here_is_a_path(
        self, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "alice" / "tiny-w4a8").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert resolve(REPO) == Path(REPO)
        assert not hub.log
