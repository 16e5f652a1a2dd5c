#!/usr/bin/env bash
# The main job on a fresh machine: install npuq into .venv, convert the shipped FP8 checkpoint to W4A8, check the
# artifact, measure it against its source, and generate from it.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/environment.sh
environment .venv
npuq=.venv/bin/npuq
source=examples/tiny-deepseek-v3-fp8
output=${1:-build/tiny-deepseek-v3-w4a8}

run() {
  echo "\$ npuq $*"
  "$npuq" "$@"
  echo
}

run convert "$source" "$output"
run inspect "$output"
run verify "$output" --source "$source"
run evaluate "$output" --source "$source" --text examples/eval.txt --context 256
run generate "$output" --prompt "The state of the Union" --prompt "Call me Ishmael." --max-new-tokens 40
