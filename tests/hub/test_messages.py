"""What is said of a failure: 'run the same command again' where that may help, and only there."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import Fault
from huggingface_hub import constants
from loopback import LoopbackHub
from support import REPO, alter, reseal, shards

import npuq
from npuq.errors import HubError
from npuq.hub import RemoteCheckpoint
from npuq.hub.transfer import wording
from npuq.hub.huggingface.client import Client
from npuq.hub.transfer.retry import Backoff
from npuq.hub.transfer.download import fetch_range
from npuq.hub.huggingface.repository import HubRepository
from npuq.hub.names import CommitId
from npuq.inputs.names import FileName

ALWAYS = 10**6
AGAIN = "run the same command again: it continues"
QUICK = Backoff(attempts=2, first_seconds=0.001, most_seconds=0.001)
LASTING = [400, 401, 403, 404, 410, 413, 418, 451, 501, 507]
PASSING = [408, 409, 429, 500, 503]
# Routes of a push, those of a pull, and those of streaming.
PUSH = [
    "whoami",
    "repos/create",
    "auth-check",
    "/revision/",
    "/tree/",
    "preupload",
    "objects/batch",
    "^PUT /lfs/",
    "/commit/",
]
PULL = ["/revision/", "/tree/", "/resolve/"]


@pytest.fixture
def runs(hub: LoopbackHub, artifact: Path, example_fp8: Path, tmp_path: Path) -> dict[str, Callable[[], object]]:
    hub.state.put("alice/source", {path.name: path.read_bytes() for path in example_fp8.iterdir()})
    files = {str(path.relative_to(artifact)): path.read_bytes() for path in artifact.rglob("*") if path.is_file()}
    hub.state.put("alice/pushed", files)
    # What is pushed is not there yet.
    alter(shards(artifact)[0])
    reseal(artifact)
    return {
        "push": lambda: npuq.push(artifact, REPO, backoff=QUICK),
        "pull": lambda: npuq.pull("alice/pushed", backoff=QUICK),
        "stream": lambda: RemoteCheckpoint.open_remote("alice/source", tmp_path / "window", backoff=QUICK),
    }


@pytest.mark.parametrize(
    ("run", "route"),
    [*(("push", route) for route in PUSH), *((run, route) for run in ("pull", "stream") for route in PULL)],
)
def test_a_status_that_stays(
    hub: LoopbackHub, runs: dict[str, Callable[[], object]], monkeypatch: pytest.MonkeyPatch, run: str, route: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for status in (*LASTING, *PASSING):
        if (status, route) == (409, "repos/create"):
            continue  # it is there: what a second push hears
        hub.faults.clear()
        hub.faults.add(Fault(route, status=status, times=ALWAYS))
        with pytest.raises(HubError) as caught:
            runs[run]()
        message = str(caught.value)
        assert "\n" not in message
        # A signed address that has expired is told from a refusal by trying another.
        assert (AGAIN in message) == (status in PASSING), (status, message)
        assert isinstance(caught.value, wording.PassingError) == (status in PASSING)


def test_nobody_there(runs: dict[str, Callable[[], object]], hub: LoopbackHub) -> None:
    hub.faults.add(Fault("", reset_before=True, times=ALWAYS))
    for run in runs.values():
        with pytest.raises(HubError, match=rf"the connection to {hub.endpoint} failed \(.*\); {AGAIN}"):
            run()


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("ftp://example.org", "ftp://example.org cannot be asked"),
        ("not an address", "not an address cannot be asked|is not understood"),
        ("https://127.0.0.1:{port}", "no secure connection to https://127.0.0.1:{port}"),
    ],
)
def test_an_endpoint_that_is_none(
    hub: LoopbackHub, artifact: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, said: str
) -> None:
    port = hub.endpoint.rpartition(":")[2]
    monkeypatch.setattr(constants, "ENDPOINT", endpoint.format(port=port))
    for run in (lambda: npuq.pull(REPO), lambda: npuq.push(artifact, REPO)):
        with pytest.raises(HubError, match=said.format(port=port)) as caught:
            run()
        assert AGAIN not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_certificate_that_is_not_accepted() -> None:
    error = ConnectionError("failed")
    error.__cause__ = ssl.SSLCertVerificationError("self-signed certificate")
    error.__cause__.reason = "CERTIFICATE_VERIFY_FAILED"
    assert not faults.is_transient(error)
    said = str(wording.connection_failed("https://hub", error, passing=faults.is_transient(error)))
    assert said == "no secure connection to https://hub (failed); check that address, the clock and the proxy"


def test_a_mistake_of_ours_is_not_the_hubs(hub: LoopbackHub) -> None:
    """Only what a client may raise is turned into a line."""

    def wrong() -> None:
        raise AssertionError("ours")

    with pytest.raises(AssertionError):
        Client(REPO).call("asking", wrong)


def test_whoever_takes_the_bytes_may_end_it(hub: LoopbackHub) -> None:
    """As a window that is closed while it fetches."""
    from io import BytesIO

    class EndedError(Exception):
        pass

    def end(piece: bytes) -> None:
        raise EndedError

    commit = hub.state.put(REPO, {"a.txt": b"content"}).sha
    repository = HubRepository(Client(REPO), CommitId(commit))
    with pytest.raises(EndedError):
        fetch_range(repository, FileName("a.txt"), 7, 0, 7, BytesIO(), end)
