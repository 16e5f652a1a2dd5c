"""Push and pull beside huggingface_hub's own upload_folder and snapshot_download, over the loopback interface.

    python benchmarks/hub.py [--shards 4] [--shard-mb 128] [--rounds 3]

The hub is tests/hub/rig/loopback.py in a process of its own, with plain LFS transfers; it and the client share this
machine's cores. Every round starts from an empty hub and an empty cache; the files are in the page cache. `pull`
hashes the files that it receives, snapshot_download does not. The best round counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REPO = "alice/benchmark"
LOOPBACK = Path(__file__).parent.parent / "tests" / "hub" / "rig" / "loopback.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--shard-mb", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="npuq-benchmark-") as name:
        folder = Path(name)
        port = settle_environment(folder)
        artifact = make_artifact(folder / "artifact", arguments.shards, arguments.shard_mb << 20)
        total = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
        print(f"{total / 1e6:.0f} MB in {arguments.shards} shards, {os.cpu_count()} cores")
        times: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            for group in actions(artifact):
                with loopback(folder / "hub", port):
                    for action, run in group.items():
                        times.setdefault(action, []).append(run())
        report(times, total)


@contextmanager
def loopback(folder: Path, port: int) -> Iterator[None]:
    """Context with an empty hub in a process of its own."""
    command = [sys.executable, str(LOOPBACK), str(folder), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()  # it is listening
        try:
            yield
        finally:
            server.terminate()
    shutil.rmtree(folder)


def settle_environment(folder: Path) -> int:
    """Set the variables that huggingface_hub reads on import: port of the loopback hub."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_writer"}
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ.pop("HF_HUB_OFFLINE", None)
    return port


def make_artifact(folder: Path, shards: int, nbytes: int) -> Path:
    """Write random shards and a manifest, which is all that transfers look at."""
    (folder / "npuq").mkdir(parents=True)
    files = {}
    for number in range(1, shards + 1):
        path = folder / f"model-{number:05d}-of-{shards:05d}.safetensors"
        content = os.urandom(nbytes)
        path.write_bytes(content)
        files[path.name] = {"size": nbytes, "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "npuq" / "manifest.json").write_text(json.dumps({"format_version": 1, "files": files}))
    return folder


def actions(artifact: Path) -> list[dict[str, Callable[[], float]]]:
    """Groups of actions on one hub: each group starts from an empty hub, and downloads follow an upload."""
    from huggingface_hub import HfApi, constants

    import npuq

    api = HfApi()

    def upload_folder() -> None:
        api.create_repo(REPO, exist_ok=True)
        api.upload_folder(repo_id=REPO, folder_path=artifact)

    def empty_cache(run: Callable[[], object]) -> Callable[[], float]:
        def measured() -> float:
            shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
            return seconds(run)

        return measured

    return [
        {"upload_folder": lambda: seconds(upload_folder)},
        {
            "push": lambda: seconds(lambda: npuq.push(artifact, REPO)),
            "snapshot_download": empty_cache(lambda: api.snapshot_download(REPO)),
            "pull": empty_cache(lambda: npuq.pull(REPO)),
        },
    ]


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def report(times: dict[str, list[float]], total: int) -> None:
    best = {action: min(each) for action, each in times.items()}
    for action, each in times.items():
        rounds = ", ".join(f"{second:.2f}" for second in each)
        print(f"{action:<18} {total / best[action] / 1e6:7.0f} MB/s   (seconds: {rounds})")
    print(f"push / upload_folder: {best['upload_folder'] / best['push']:.2f} of its speed")
    print(f"pull / snapshot_download: {best['snapshot_download'] / best['pull']:.2f} of its speed")


if __name__ == "__main__":
    main()
