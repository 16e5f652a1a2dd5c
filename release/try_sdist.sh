#!/usr/bin/env bash
# Builds a wheel from the sdist in DIRECTORY with each PYTHON given, as pip does where no wheel fits, and starts it:
#   bash release/try_sdist.sh dist python3.10 python3.11 python3.12 python3.13 python3.14
# A PYTHON that is not installed is told, and is no failure.
set -euo pipefail
sdist=$(ls "$(realpath "$1")"/npuq-*.tar.gz)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in "${@:2}"; do
  if ! command -v "$python" >/dev/null || ! "$python" -c '' 2>/dev/null; then
    echo "$python: not installed here, not tried"
    continue
  fi
  rm -rf "$work"/*
  "$python" -m venv "$work/clean"
  pip=("$work/clean/bin/python" -m pip --disable-pip-version-check --quiet)
  "${pip[@]}" wheel --no-deps --wheel-dir "$work" "$sdist"
  "${pip[@]}" install click
  "${pip[@]}" install --no-deps "$work"/npuq-*.whl
  (cd "$work" && "$work/clean/bin/npuq" --version) | sed "s|^|$python: |"
  "$work/clean/bin/npuq" convert --help >/dev/null
done
