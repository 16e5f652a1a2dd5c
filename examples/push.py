"""Push an artifact to a hub, and pull it again.

    HF_TOKEN=… python examples/push.py build/careful user/careful build/pulled

To try it without a hub, start the one that the tests use, and say where it is:

    python tests/hub/rig/loopback.py build/hub 8765 &
    export HF_ENDPOINT=http://127.0.0.1:8765 HF_TOKEN=hf_writer
    python examples/push.py build/careful alice/careful build/pulled
"""

from __future__ import annotations

import argparse

import npuq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("repo", help="USER/NAME; made if it is not there")
    parser.add_argument("directory", help="where it is pulled to")
    options = parser.parse_args()

    # Killed at any moment, the same call continues; content that the hub has is not sent again. Until the last commit
    # the repository says that it is unfinished.
    summary = npuq.push(options.artifact, options.repo, private=True)
    print(f"{summary.url}: sent {summary.sent_files} of {summary.files} files, {summary.sent_bytes:,} bytes")

    # Every file is compared with the manifest's hash.
    path = npuq.pull(options.repo, options.directory)
    print(f"{path}: {'ok' if npuq.verify(path).ok else 'damaged'}")


if __name__ == "__main__":
    main()
