#!/usr/bin/env bash
# Sets up an environment of its own in the checkout and runs all tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/environment.sh
environment .venv test
# Tests are many and small: one process a core, each with one thread, and one more, for a fifth of their time is waiting:
# for installs, servers, ranks and processes that are killed.
workers=$(($(nproc) + 1)) # before the next line, which nproc heeds
export OMP_NUM_THREADS=1
# -rs: what was skipped, a rig above all, stands in the last lines.
exec .venv/bin/python -m pytest -n "$workers" --dist worksteal -rs "$@"
