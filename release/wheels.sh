#!/usr/bin/env bash
# Makes what a release consists of in DIRECTORY (dist/ by default), and tries it: the sdist, and one wheel for all
# Pythons for each processor, built from that sdist by zig for glibc 2.17. Needs no compiler but zig, which pip installs.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${1:-dist}")

"${PYTHON:-python3}" release/check.py
[ -x .venv-release/bin/python ] || "${PYTHON:-python3}" -m venv .venv-release
python=$PWD/.venv-release/bin/python
"$python" -m pip --disable-pip-version-check --quiet install "auditwheel>=6.2" "build>=1.2" "setuptools>=77" "ziglang>=0.14"

rm -rf "$target"
"$python" -m build --no-isolation --sdist --outdir "$target" .
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -xzf "$target"/npuq-*.tar.gz -C "$work" --strip-components 1
for machine in x86_64 aarch64; do
  (cd "$work" && rm -rf build && NPUQ_TARGET=$machine-linux-gnu.2.17 "$python" -m build --no-isolation --wheel --outdir "$target" .)
  # auditwheel reads the symbols that the library asks of glibc. Its whole output is read: it fails where a pipe closes.
  shown=$("$python" -m auditwheel show "$target"/npuq-*_"$machine".whl)
  grep -q "\"manylinux_2_17_$machine\"" <<< "$shown" ||
    { echo "the $machine wheel needs more than glibc 2.17" >&2; exit 1; }
done
bash release/try_wheels.sh "$target" "$python"
