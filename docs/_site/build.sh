#!/usr/bin/env bash
# Builds the documentation's site in build/site, in an environment of its own. A link or an anchor that leads nowhere, and a
# page that the navigation leaves out, are errors. `bash docs/_site/build.sh serve` shows it at http://127.0.0.1:8000/.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -x .venv-docs/bin/python ] || "${PYTHON:-python3}" -m venv .venv-docs
.venv-docs/bin/python -m pip --disable-pip-version-check --quiet install \
  "mkdocs>=1.6,<2" "mkdocs-material>=9.6,<10" "mkdocstrings[python]>=0.29,<2" ruff
export NO_MKDOCS_2_WARNING=1 # of mkdocs-material, about a next major version that is not used
.venv-docs/bin/python -m mkdocs "${1:-build}" --strict --quiet
