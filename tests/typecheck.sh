#!/usr/bin/env bash
# mypy over the package as it is installed: a copy, because the repository root is the package, and a checkout has
# whatever name its owner gave it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
target=build/typing
# setuptools keeps in build/lib what a checkout no longer has.
rm -rf "$target" build/lib*
# Types need no native library: without a compiler none is built.
CC=false "$python" -m pip --disable-pip-version-check --quiet install --no-deps --target "$target" .
MYPYPATH=$target "$python" -m mypy
