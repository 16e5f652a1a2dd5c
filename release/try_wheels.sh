#!/usr/bin/env bash
# Tries the wheels in DIRECTORY without a compiler: this machine's in a clean environment, from install to tokens, and the
# kernels of the Arm one under qemu-user, where that and gcc-aarch64-linux-gnu's C library are installed.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
wheels=$(realpath "$1") zig_python=$(realpath -s "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

echo "== $(uname -m): a clean environment without a compiler"
"${PYTHON:-python3}" -m venv clean
mkdir bin
for tool in env ls cat rm mkdir; do ln -s "$(command -v "$tool")" bin/; done
run() { env -i PATH="$work/clean/bin:$work/bin" HOME="$work" CC=no-compiler "$@"; }
run clean/bin/pip --disable-pip-version-check --quiet install "torch==2.13.0" "$(ls "$wheels"/npuq-*_"$(uname -m)".whl)"
run npuq --version | tee version
grep -q "native kernels" version || { echo "the wheel's library does not load" >&2; exit 1; }
# The best level of this processor, as a build of its own compiler finds it: a slow one gives right results too.
grep -q avx2 /proc/cpuinfo && { grep -Eq "avx2|avx512" version || { echo "the wheel does not find AVX2" >&2; exit 1; }; }
run npuq convert "$root/examples/tiny-deepseek-v3-fp8" artifact
run npuq verify artifact --source "$root/examples/tiny-deepseek-v3-fp8"
run npuq generate artifact --prompt "The river" --max-new-tokens 8

# The kernels of a processor's wheel, run by a program that zig compiles.
check() {
  "$zig_python" -m zipfile -e "$wheels"/npuq-*_"$1".whl "$1"
  "$zig_python" -m ziglang cc -target "$1"-linux-gnu.2.17 -O1 -I "$root/native" "$root/tests/native/library_check.c" \
    "$1"/npuq/native/libnpuq.so -Wl,-rpath,"$work/$1/npuq/native" -lm -o "check-$1"
  "${@:2}" "./check-$1"
}

if [ "$(uname -m)" = x86_64 ]; then
  echo "== x86_64: the kernels"
  check x86_64
fi

echo "== aarch64: the kernels under qemu-user"
if ! command -v qemu-aarch64 >/dev/null || [ ! -e /usr/aarch64-linux-gnu/lib/ld-linux-aarch64.so.1 ]; then
  echo "skipped: qemu-user and gcc-aarch64-linux-gnu are not installed"
  exit
fi
check aarch64 qemu-aarch64 -L /usr/aarch64-linux-gnu
