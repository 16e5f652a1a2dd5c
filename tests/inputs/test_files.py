"""inputs/files.py: what a directory may make npuq read."""

import io
import os
from pathlib import Path

import pytest

from npuq.errors import ArtifactError, CheckpointError
from npuq.inputs.files import inside, open_file, read_bytes, read_given_text, read_stream_text, read_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    result = tmp_path / "folder"
    result.mkdir()
    (result / "a.json").write_bytes(b"{}")
    (tmp_path / "secret").write_bytes(b"{}")
    return result


def test_a_file_and_a_link_within_the_folder(folder: Path) -> None:
    (folder / "b.json").symlink_to("a.json")
    assert inside(folder, "a.json") == folder / "a.json"
    assert inside(folder, "b.json") == folder / "b.json"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", "missing", "a\0b", "\ud800", "loop", "out"]
)
def test_names_and_links_that_lead_elsewhere_are_refused(folder: Path, name: str) -> None:
    (folder / "loop").symlink_to("loop")
    (folder / "out").symlink_to("../secret")
    with pytest.raises(ArtifactError) as caught:
        inside(folder, name, ArtifactError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", ["", "fp8", "fp8/deep"])
def test_a_snapshot_of_the_hub_cache_links_to_its_blobs(tmp_path: Path, depth: str) -> None:
    repository = tmp_path / "models--me--m"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs/0").write_bytes(b"{}")
    (tmp_path / "0").write_bytes(b"{}")
    snapshot = repository / "snapshots/abc" / depth
    snapshot.mkdir(parents=True)
    (snapshot / "a").symlink_to(os.path.relpath(repository / "blobs/0", snapshot))
    (snapshot / "b").symlink_to(tmp_path / "0")
    assert inside(snapshot, "a") == snapshot / "a"
    with pytest.raises(Exception, match="outside the directory"):
        inside(snapshot, "b")


def test_a_snapshot_whose_contents_are_in_the_store_of_the_whole_cache(tmp_path: Path) -> None:
    """So huggingface_hub keeps what came through Xet: snapshots/…/FILE → blobs/ETAG → ../../blobs/XX/HASH."""
    stored, repository = tmp_path / "blobs" / "ab" / ("ab" + "0" * 62), tmp_path / "models--me--m"
    snapshot = repository / "snapshots/abc"
    for folder in (stored.parent, repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    stored.write_bytes(b"{}")
    stored.with_suffix(".refs").write_bytes(b"{}")
    (repository / "blobs/1").symlink_to("../../blobs/ab/" + stored.name)
    (snapshot / "a").symlink_to("../../blobs/1")
    (snapshot / "b").symlink_to(stored.with_suffix(".refs"))
    assert inside(snapshot, "a") == snapshot / "a"
    with pytest.raises(Exception, match="outside the directory"):
        inside(snapshot, "b")


def test_special_files_are_refused_at_once(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    for name in ("fifo", "zero"):
        with pytest.raises(ArtifactError, match="not a regular file"):
            open_file(folder / name, ArtifactError)
    with pytest.raises(ArtifactError, match="not a regular file"):
        open_file(folder, ArtifactError)
    with pytest.raises(ArtifactError, match="not a regular file"):
        inside(folder, "fifo", ArtifactError)


def test_a_size_is_the_limit(folder: Path) -> None:
    assert read_bytes(folder / "a.json", ArtifactError, 2) == b"{}"
    with pytest.raises(ArtifactError, match="larger than the 1 bytes"):
        read_bytes(folder / "a.json", ArtifactError, 1)


def test_text_is_utf8_with_plain_line_ends(folder: Path) -> None:
    (folder / "a").write_bytes("ä\r\nb\rc".encode())
    assert read_text(folder / "a", ArtifactError) == "ä\nb\nc"
    (folder / "a").write_bytes(b"ok\xff")
    with pytest.raises(ArtifactError, match=r"not UTF-8 text \(byte 2\)"):
        read_text(folder / "a", ArtifactError)


def test_a_stream_is_read_up_to_a_size() -> None:
    where = Path("-")
    assert read_stream_text(io.BytesIO(b"a\r\nb"), where, CheckpointError, most=4) == "a\nb"
    with pytest.raises(CheckpointError, match="-: is larger than the 3 bytes"):
        read_stream_text(io.BytesIO(b"a\r\nb"), where, CheckpointError, most=3)
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(CheckpointError, match="-: cannot be read"):
        read_stream_text(closed, where, CheckpointError)


def test_what_the_user_names_may_be_a_pipe(folder: Path) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, "ä\r\n".encode())
    os.close(theirs)
    assert read_given_text(Path(f"/dev/fd/{ours}"), ArtifactError) == "ä\n"
    os.close(ours)
    with pytest.raises(ArtifactError, match="larger than the 1000 bytes"):
        read_given_text(Path("/dev/zero"), ArtifactError, 1000)
    for name in ("missing", "a\0b"):
        with pytest.raises(ArtifactError):
            read_given_text(folder / name, ArtifactError)
    with pytest.raises(ArtifactError, match="Is a directory"):
        read_given_text(folder, ArtifactError)
