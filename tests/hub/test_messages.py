"""What is said of a failure: 'run the same command again' where that may help, and only there."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
import support
from faults import Fault
from huggingface_hub import HfApi, constants
from loopback import LoopbackHub
from loopback_state import WRITER
from support import REPO, alter, files_of, reseal, shards

import npuq
from npuq.errors import HubError
from npuq.hub import open_remote
from npuq.hub.huggingface import repository
from npuq.hub.huggingface.client import Client
from npuq.hub.huggingface.repository import HubRepository
from npuq.hub.names import CommitId
from npuq.hub.transfer import wording
from npuq.hub.transfer.download import fetch_range
from npuq.hub.transfer.retry import Backoff
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
    hub.state.put("alice/source", files_of(example_fp8))
    files = files_of(artifact)
    hub.state.put("alice/pushed", files)
    # What is pushed is not there yet.
    alter(shards(artifact)[0])
    reseal(artifact)
    return {
        "push": lambda: npuq.push(artifact, REPO, backoff=QUICK),
        "pull": lambda: npuq.pull("alice/pushed", backoff=QUICK),
        "stream": lambda: open_remote("alice/source", tmp_path / "window", backoff=QUICK),
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


def test_a_certificate_that_is_not_accepted(hub: LoopbackHub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a server signed itself: asking again would not help."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(support.__file__).parent / "self_signed.pem")
    asked: list[object] = []

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, address = listener.accept()
                asked.append(address)
                with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        endpoint = f"https://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        for run in (lambda: npuq.pull(REPO), lambda: npuq.push(artifact, REPO)):
            asked.clear()
            with pytest.raises(HubError, match=rf"no secure connection to {endpoint} \(.*CERTIFICATE_VERIFY") as caught:
                run()
            assert AGAIN not in str(caught.value)
            assert len(asked) == 1
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError])
@pytest.mark.parametrize("run", ["push", "pull", "stream"])
def test_a_mistake_of_ours_is_not_the_hubs(
    runs: dict[str, Callable[[], object]], monkeypatch: pytest.MonkeyPatch, run: str, error: type[Exception]
) -> None:
    """Only what a client raises is turned into a line."""

    def wrong(*arguments: object) -> None:
        raise error("ours")

    monkeypatch.setattr(repository, "_entry", wrong)
    with pytest.raises(error, match="ours"):
        runs[run]()


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, AttributeError, RuntimeError])
def test_what_the_client_does_not_understand_is_said(
    runs: dict[str, Callable[[], object]], monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def wrong(*arguments: object, **options: object) -> None:
        raise error("theirs")

    monkeypatch.setattr(HfApi, "whoami", wrong)
    with pytest.raises(HubError, match=f"the hub's answer is not understood .{error.__name__}: .?theirs"):
        runs["push"]()


class TestSecrets:
    """A token, or the password in an address: a server says it, or a fault's text has it, whole or cut short."""

    @pytest.mark.parametrize("before", range(90, 160, 7))
    def test_what_a_server_says(
        self, hub: LoopbackHub, runs: dict[str, Callable[[], object]], monkeypatch: pytest.MonkeyPatch, before: int
    ) -> None:
        secret = "hf_" + "Kq7Zx9Lm2Vb4" * 3
        hub.state.users[secret] = hub.state.users[WRITER]
        monkeypatch.setenv("HF_TOKEN", secret)
        for run, route in (("push", "preupload"), ("pull", "/tree/")):
            hub.faults.clear()
            hub.faults.add(Fault(route, status=400, said="x" * before + " " + secret, times=ALWAYS))
            with pytest.raises(HubError, match="it says: x") as caught:
                runs[run]()
            assert secret[3:9] not in str(caught.value)
        hub.faults.clear()
        place = {"Content-Range": f"bytes {secret}"}
        hub.faults.add(Fault("/resolve/", sent_headers=place, times=ALWAYS))
        with pytest.raises(HubError, match="asked for bytes from 0") as caught:
            runs["pull"]()
        assert secret[3:9] not in str(caught.value)

    def test_what_a_hub_lists(self, hub: LoopbackHub, artifact: Path) -> None:
        """A message of our own may quote a name from there."""
        hub.state.put(REPO, {f"{WRITER}.safetensors": b"theirs"})
        with pytest.raises(HubError, match=r"holds \*\*\*\.safetensors, which is not part") as caught:
            npuq.push(artifact, REPO)
        assert WRITER not in str(caught.value)

    @pytest.mark.parametrize("password", ["s3cret", "p%40ss%2Fword"])
    def test_an_endpoint_with_a_password(
        self, hub: LoopbackHub, artifact: Path, monkeypatch: pytest.MonkeyPatch, password: str
    ) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint.replace("://", f"://alice:{password}@"))
        # As the client asks then, a token or not.
        login = base64.b64encode(f"alice:{unquote(password)}".encode()).decode()
        hub.state.users[f"Basic {login}"] = hub.state.users[WRITER]
        summary = npuq.push(artifact, REPO, create_pr=True)
        assert summary.url == f"{hub.endpoint}/{REPO}"
        assert summary.pull_request == f"{hub.endpoint}/{REPO}/discussions/1"
        hub.faults.add(Fault("", reset_before=True, times=ALWAYS))
        for run in (lambda: npuq.pull("alice/other", backoff=QUICK), lambda: npuq.push(artifact, REPO, backoff=QUICK)):
            with pytest.raises(HubError, match=f"the connection to {hub.endpoint} failed") as caught:
                run()
            assert password not in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "hidden"),
        [
            ("said hf_0123456789", "said ***"),
            ("said hf_0123456", "said ***"),
            ("hf_0123456 and hf_012345678X", "*** and ***X"),
            ("hf_01", "hf_01"),
            ("abc", "***"),
        ],
    )
    def test_texts(self, text: str, hidden: str) -> None:
        assert wording.without_secrets(text, ["hf_0123456789", None, "", "abc"]) == hidden


def test_whoever_takes_the_bytes_may_end_it(hub: LoopbackHub) -> None:
    """As a window that is closed while it fetches."""
    from io import BytesIO

    class EndedError(Exception):
        pass

    def end(piece: bytes) -> None:
        raise EndedError

    commit = hub.state.put(REPO, {"a.txt": b"content"}).sha
    at_commit = HubRepository(Client(REPO), CommitId(commit))
    with pytest.raises(EndedError):
        fetch_range(at_commit, FileName("a.txt"), 7, 0, 7, BytesIO(), end)
