"""Answers that are longer than they should be, or of something else: cut and refused, whatever asked for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults import Fault
from loopback import LoopbackHub
from loopback_state import WRITER
from support import CARD, MANIFEST, REPO, alter, contents, files_of, reseal, shards, use_cache

import npuq
from npuq.errors import HubError
from npuq.hub import open_remote, resolve
from npuq.hub.names import BlobId
from npuq.hub.transfer import limits
from npuq.hub.transfer.digests import content_digest
from npuq.hub.transfer.retry import Backoff
from npuq.inputs.names import Sha256

SHARD = "model-00002-of"
ALWAYS = 10**6

# What is wrong with an answer that brings content, and what is said of it.
ANSWERS = {
    "longer": (Fault("", longer=1, times=ALWAYS), "sends more than the .* bytes that it lists"),
    "without end": (Fault("", endless=True, times=ALWAYS), "sends more than the .* bytes that it lists"),
    "of a larger file": (
        Fault("", times=ALWAYS, sent_headers={"Content-Range": "bytes 0-0/99999999999"}),
        "sends more than the .* bytes that it lists",
    ),
    "of another place": (
        Fault("", times=ALWAYS, sent_headers={"Content-Range": "bytes 7-9/10"}),
        "asked for bytes from 0, the hub answered 206",
    ),
    "without a place": (
        Fault("", times=ALWAYS, sent_headers={"Content-Range": "all of it"}),
        "asked for bytes from 0, the hub answered 206",
    ),
    "compressed": (Fault("", times=ALWAYS, sent_headers={"Content-Encoding": "gzip"}), "sends it compressed"),
}


def armed(fault: Fault, pattern: str) -> Fault:
    return Fault(**{**vars(fault), "pattern": pattern})


def named(place: Path, source: Path, name: str) -> list[Path]:
    """What is in a place under this name (a regular expression), or under a hash of a content that has it."""
    contents = [content for path, content in files_of(source).items() if re.fullmatch(name, path)]
    assert contents
    hashes = {content_digest(content, kind) for content in contents for kind in (Sha256, BlobId)}
    return [path for path in place.rglob("*") if path.name in hashes or re.search(rf"/{name}(?<!-part)$", str(path))]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", [rf"{SHARD}.*", "config.json", MANIFEST, CARD])
def test_content(
    hub: LoopbackHub,
    pushed: Path,
    tmp_path: Path,
    backoff: Backoff,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    answer: str,
) -> None:
    fault, said = ANSWERS[answer]
    hub.faults.add(armed(fault, f"^GET .*/resolve/.*/{name}$"))
    for directory in (None, tmp_path / "there"):
        home = tmp_path / ("home" if directory is None else "another home")
        use_cache(monkeypatch, home)
        with pytest.raises(HubError, match=said) as caught:
            npuq.pull(REPO, directory, backoff=backoff)
        assert "\n" not in str(caught.value)
        # Nothing of it has its name, in the cache or in the folder, and nothing was read without end.
        assert not named(home if directory is None else directory, pushed, name)
    assert all(seen.sent < 64 << 20 for seen in hub.log)
    hub.faults.clear()
    assert contents(npuq.pull(REPO)) == contents(pushed)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize(
    "name", ["model-00002-of-000003.safetensors", "tokenizer.json", "model.safetensors.index.json"]
)
def test_streaming(
    hub: LoopbackHub, example_fp8: Path, tmp_path: Path, backoff: Backoff, name: str, answer: str
) -> None:
    fault, said = ANSWERS[answer]
    hub.state.put("alice/source", files_of(example_fp8))
    hub.faults.add(armed(fault, f"^GET .*{name}$"))
    with (
        pytest.raises(HubError, match=said),
        open_remote("alice/source", tmp_path / "window", backoff=backoff),
    ):
        pass
    assert not named(tmp_path / "hf-home", example_fp8, name)
    assert not (tmp_path / "window").exists()


def test_a_server_that_knows_no_ranges_is_read_no_further_than_needed(
    hub: LoopbackHub, pushed: Path, monkeypatch: pytest.MonkeyPatch, backoff: Backoff
) -> None:
    """It sends whole files, with status 200; after a cut the beginning passes by."""
    monkeypatch.setattr(hub, "ranges", False)
    hub.faults.add(Fault(f"^GET .*{SHARD}", reset_after=600_000, times=2))
    assert contents(npuq.pull(REPO, backoff=backoff)) == contents(pushed)
    hub.faults.add(Fault("^GET .*/resolve/", longer=1, times=ALWAYS))
    hub.state.put(REPO, {"config.json": contents(pushed)["config.json"] + b" "})
    with pytest.raises(HubError, match="is not what the manifest promises"):
        npuq.pull(REPO, backoff=backoff)


def test_a_hub_that_gives_a_few_bytes_a_request(hub: LoopbackHub, pushed: Path, backoff: Backoff) -> None:
    hub.faults.add(Fault(f"^GET .*{SHARD}", reset_after=100, times=ALWAYS))
    with pytest.raises(HubError, match=r"the connection to .* failed"):
        npuq.pull(REPO, backoff=backoff)
    assert len(hub.requests(f"^GET .*{SHARD}")) == backoff.attempts


@pytest.mark.parametrize("route", ["/revision/main$", "/tree/"])
def test_json(hub: LoopbackHub, pushed: Path, backoff: Backoff, monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    monkeypatch.setattr(limits, "MOST_JSON_BYTES", 1 << 20)
    hub.faults.add(Fault(route, endless=True, times=ALWAYS))
    for run in (
        lambda: npuq.pull(REPO, backoff=backoff),
        lambda: resolve(REPO),
        lambda: npuq.push(pushed, REPO, backoff=backoff),
        lambda: open_remote(REPO, pushed, backoff=backoff),
    ):
        with pytest.raises(HubError, match="more than the 1048576 bytes that npuq reads of an answer"):
            run()


@pytest.mark.parametrize("route", ["/revision/main$", "/tree/", f"resolve/.*{MANIFEST}"])
def test_the_body_of_a_refusal_is_not_read(hub: LoopbackHub, pushed: Path, backoff: Backoff, route: str) -> None:
    hub.faults.add(Fault(route, status=418, endless=True, times=ALWAYS))
    with pytest.raises(HubError, match=r"the hub refused \(status 418\) \(it says: a fault on demand\)"):
        npuq.pull(REPO, backoff=backoff)
    assert all(seen.sent < 64 << 20 for seen in hub.log)


ROUTES = ["/revision/main$", "/tree/", f"resolve/.*{MANIFEST}", f"resolve/.*{SHARD}"]


@pytest.mark.parametrize("route", ROUTES)
def test_the_body_of_a_redirect_is_not_read(hub: LoopbackHub, pushed: Path, backoff: Backoff, route: str) -> None:
    hub.faults.add(Fault(route, status=302, endless=True, headers={"Location": "/elsewhere"}))
    with pytest.raises(HubError, match=r"is not there|no such|no repository|refused"):
        npuq.pull(REPO, backoff=backoff)
    assert hub.faults.hits == 1
    assert hub.requests("^GET /elsewhere$")
    assert all(seen.sent < 64 << 20 for seen in hub.log)


def test_redirects_without_end(hub: LoopbackHub, pushed: Path, backoff: Backoff) -> None:
    hub.faults.add(Fault("/tree/|/again", times=ALWAYS, status=307, headers={"Location": "/again"}))
    with pytest.raises(HubError, match="redirects more than 10 times"):
        npuq.pull(REPO, backoff=backoff)
    assert len(hub.requests("/again")) == 10


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("route", ROUTES)
def test_the_token_goes_to_no_other_origin(hub: LoopbackHub, pushed: Path, route: str, host: str) -> None:
    """`localhost` is another origin than `127.0.0.1`, with the same server behind."""
    elsewhere = hub.endpoint.replace("127.0.0.1", host) + "/elsewhere"
    hub.faults.add(Fault(route, status=302, headers={"Location": elsewhere}))
    with pytest.raises(HubError):
        npuq.pull(REPO)
    redirected, asked = hub.requests("^GET /elsewhere$"), hub.requests("^GET /api")
    assert {seen.authorization for seen in asked} == {f"Bearer {WRITER}"}
    assert [seen.authorization for seen in redirected] == [f"Bearer {WRITER}" if host == "127.0.0.1" else None]


@pytest.mark.parametrize("route", ["/revision/main$", "/tree/"])
def test_compressed_json(hub: LoopbackHub, pushed: Path, backoff: Backoff, route: str) -> None:
    hub.faults.add(Fault(route, times=ALWAYS, sent_headers={"Content-Encoding": "gzip"}))
    with pytest.raises(HubError, match="answer is compressed, which it was asked not to be"):
        npuq.pull(REPO, backoff=backoff)


def test_pages_without_end(hub: LoopbackHub, pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_PAGES", 20)
    again = f'<{hub.endpoint}/api/models/{REPO}/tree/main>; rel="next"'
    hub.faults.add(Fault("/tree/", times=ALWAYS, sent_headers={"Link": again}))
    hub.say = lambda request, answer: [] if "/tree/" in request else answer
    with pytest.raises(HubError, match="more than 20 pages"):
        npuq.pull(REPO)


@pytest.mark.parametrize("address", ["https://huggingface.co/api/models/{}", "/api/models/{}", "{hub}/api/models/{}"])
def test_a_next_page_by_any_address_of_the_hub(hub: LoopbackHub, pushed: Path, address: str) -> None:
    """A mirror may pass on what huggingface.co says."""
    next_page = address.format(f"{REPO}/tree/main?recursive=true&cursor=5", hub=hub.endpoint)
    hub.faults.add(Fault("/tree/", sent_headers={"Link": f'<https://x/first>; rel="first", <{next_page}>; rel="next"'}))
    assert contents(npuq.pull(REPO)) == contents(pushed)


@pytest.mark.parametrize("address", ["http://[::", "http://127.0.0.1:x/", "//[", "http://\\x/"])
def test_a_next_page_that_is_no_address(hub: LoopbackHub, pushed: Path, address: str) -> None:
    hub.faults.add(Fault("/tree/", times=ALWAYS, sent_headers={"Link": f'<{address}>; rel="next"'}))
    with pytest.raises(HubError, match="goes on at "):
        npuq.pull(REPO)


@pytest.mark.parametrize(("status", "said"), [(429, "is not understood"), (503, "the hub keeps failing")])
def test_a_wait_that_is_no_number(hub: LoopbackHub, pushed: Path, backoff: Backoff, status: int, said: str) -> None:
    endless = {"ratelimit": f'"api";r=0;t={"9" * 5000}', "Retry-After": "9" * 5000}
    hub.faults.add(Fault("/tree/", status=status, headers=endless, times=ALWAYS))
    with pytest.raises(HubError, match=said):
        npuq.pull(REPO, backoff=backoff)


def test_a_next_page_elsewhere_is_not_asked_for(hub: LoopbackHub, pushed: Path) -> None:
    """The token would go there."""
    elsewhere = hub.endpoint.replace("127.0.0.1", "localhost")
    hub.faults.add(Fault("/tree/", times=ALWAYS, sent_headers={"Link": f'<{elsewhere}/next>; rel="next"'}))
    with pytest.raises(HubError, match="goes on at another address; refusing to follow it"):
        npuq.pull(REPO)
    assert not hub.requests("/next")


class TestSmallFiles:
    """Those that no manifest vouches for are compared with the hub's own hash."""

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", CARD])
    def test_wrong_content_is_not_kept(
        self, hub: LoopbackHub, example_fp8: Path, tmp_path: Path, backoff: Backoff, name: str
    ) -> None:
        files = files_of(example_fp8)
        hub.state.put("alice/source", {CARD: b"# Source\n", **files})
        hub.faults.add(Fault(f"^GET .*/{name}$", corrupt=3, times=ALWAYS))
        for run in (
            lambda: open_remote("alice/source", tmp_path / "window", backoff=backoff),
            lambda: resolve("alice/source"),
        ):
            with pytest.raises(HubError, match=rf"{name} is not what the manifest promises or the hub lists"):
                run()
        assert not list((tmp_path / "hf-home").rglob(f"snapshots/*/{name}"))
        hub.faults.clear()
        hub.faults.add(Fault(f"^GET .*/{name}$", corrupt=3))  # once: on the way
        assert (resolve("alice/source") / name).read_bytes() == {CARD: b"# Source\n", **files}[name]

    def test_wrong_content_in_the_cache_is_fetched_again(self, hub: LoopbackHub, example_fp8: Path) -> None:
        files = files_of(example_fp8)
        hub.state.put("alice/source", files)
        fetched = resolve("alice/source")
        config = fetched / "config.json"
        config.resolve().write_bytes(files["config.json"].replace(b"1", b"2", 1))
        assert resolve("alice/source") == fetched
        assert config.read_bytes() == files["config.json"]

    def test_a_damaged_manifest_in_the_cache_is_fetched_again(self, hub: LoopbackHub, pushed: Path) -> None:
        pulled = npuq.pull(REPO)
        (pulled / MANIFEST).resolve().write_bytes(b"{")
        assert contents(npuq.pull(REPO)) == contents(pushed)


def test_what_another_commit_brought_is_not_fetched_again(hub: LoopbackHub, pushed: Path) -> None:
    npuq.pull(REPO)
    alter(shards(pushed)[0])
    reseal(pushed)
    npuq.push(pushed, REPO)
    hub.log.clear()
    assert contents(npuq.pull(REPO)) == contents(pushed)
    fetched = [seen.request.rpartition("/")[2] for seen in hub.requests("^GET .*/resolve/")]
    assert sorted(fetched) == sorted([shards(pushed)[0].name, "manifest.json", CARD])


def test_where_links_are_not_to_be_had(hub: LoopbackHub, pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    pulled = npuq.pull(REPO)
    assert contents(pulled) == contents(pushed)
    assert not any(path.is_symlink() for path in pulled.rglob("*"))
    hub.log.clear()
    assert npuq.pull(REPO) == pulled
    assert not hub.requests("/resolve/")
