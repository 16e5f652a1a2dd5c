#!/usr/bin/env bash
# Runs the benchmarks one after the other, writes one JSON, and the tables of benchmarks/README.md from it.
# bash benchmarks/all.sh [--quick] [--only NAME…] [--output FILE]; benchmarks/record.py has all options.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" benchmarks/record.py "$@"
