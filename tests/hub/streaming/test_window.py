"""The window on a remote checkpoint: never more on the disk than it may hold, whatever earlier runs left there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npuq.formats.safetensors import TensorInfo
from npuq.hub.names import BlobId
from npuq.hub.transfer.window import Shard, Window
from npuq.inputs.names import FileName

SIZE = 1000  # of a tensor; they lie too far apart to be fetched together
APART = 1 << 20
TENSORS = {
    f"t{number}": TensorInfo(f"t{number}", "U8", (SIZE,), Path("shard"), number * APART, number * APART + SIZE)
    for number in range(8)
}
SHARDS = {Path("shard"): Shard(0, FileName("shard"), 8 * APART, BlobId("0" * 40))}


def content(start: int) -> bytes:
    return bytes([start // APART]) * SIZE


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed or released meanwhile
        return 0


class Run:
    """One run over a window, whose fetches note what is on the disk while they run."""

    def __init__(self, folder: Path, window: int):
        self.folder = folder
        self.fetched: list[int] = []
        self.most_on_disk = 0
        self.window = Window(folder, window, TENSORS, SHARDS, self.fetch)

    def fetch(self, shard: Shard, start: int, end: int, file: IO[bytes], received: Callable[[bytes], object]) -> None:
        self.fetched.append(start // APART)
        file.write(content(start))
        file.flush()
        self.look()

    def look(self) -> None:
        self.most_on_disk = max(self.most_on_disk, sum(map(size_of, self.folder.iterdir())))

    def read(self, names: list[str]) -> None:
        for name in names:
            path, offset = self.window.wait_for(name)
            assert offset == TENSORS[name].start
            assert path.read_bytes() == content(offset)
            self.look()
            self.window.release([name])


def leave(folder: Path, numbers: set[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        info = TENSORS[f"t{number}"]
        (folder / f"00000-{'0' * 40}.{info.start}-{info.end}").write_bytes(content(info.start))


@given(st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7), max_size=7), st.integers(1, 9))
def test_the_disk_holds_no_more_than_the_window(
    tmp_path_factory: pytest.TempPathFactory, left: set[int], finished: set[int], tensors: int
) -> None:
    """Whatever earlier runs left and finished; a window smaller than a tensor holds that one tensor."""
    run = Run(tmp_path_factory.mktemp("window") / "download", tensors * SIZE)
    leave(run.folder, left)
    names = [name for name in TENSORS if int(name[1:]) not in finished]
    run.window.start([[name] for name in TENSORS], {f"t{number}" for number in finished})
    run.read(names)
    run.window.close()
    assert run.most_on_disk <= tensors * SIZE
    assert run.window.most_resident <= tensors * SIZE
    assert sorted({*run.fetched}) == sorted(run.fetched)  # nothing twice
    assert not finished & {*run.fetched}
    assert not run.folder.exists()


def test_what_an_earlier_run_left_is_not_fetched_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "download", 4 * SIZE)
    leave(run.folder, {0, 1, 3})
    run.window.start([[name] for name in TENSORS], set())
    run.read(list(TENSORS))
    run.window.close()
    assert sorted(run.fetched) == [2, 4, 5, 6, 7]


def test_far_leftovers_make_room_for_what_comes_first(tmp_path: Path) -> None:
    run = Run(tmp_path / "download", 2 * SIZE)
    leave(run.folder, {6, 7})
    run.window.start([[name] for name in TENSORS], set())
    run.read(list(TENSORS))
    run.window.close()
    assert run.most_on_disk <= 2 * SIZE
    assert 7 in run.fetched  # it was given up
