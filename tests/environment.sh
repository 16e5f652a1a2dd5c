# Sourced by the scripts that set up a virtual environment in the checkout.

# Modules and tests are compiled once, and not by each of the hundreds of processes that the tests start.
unset PYTHONDONTWRITEBYTECODE

# environment DIRECTORY [EXTRA,…]: create it if it is not there, and install npuq with these extras in place.
environment() {
  local directory=$1 extras=${2:-}
  [ -x "$directory/bin/python" ] || "${PYTHON:-python3}" -m venv "$directory"
  local pip=("$directory/bin/python" -m pip --disable-pip-version-check --quiet)
  # One torch version for all, named before anything else asks for "any torch".
  "$directory/bin/python" -c 'import torch' 2>/dev/null || "${pip[@]}" install "torch==2.13.0"
  # The library takes half a minute to compile: nothing is installed again while what an install reads is the same.
  local digest record=$directory/installed.txt
  digest=$(cat pyproject.toml setup.py $(find native -name '*.[ch]' | LC_ALL=C sort) | sha256sum)
  if [ -e native/libnpuq.so ] && [ "$(sed 1q "$record" 2>/dev/null)" = "$digest" ]; then
    local extra missing=
    for extra in ${extras//,/ }; do grep -qx "$extra" "$record" || missing=$extra; done
    [ -z "$missing" ] && return
  fi
  rm -f "$record"
  "${pip[@]}" install --editable ".${extras:+[$extras]}"
  printf '%s\n' "$digest" ${extras//,/ } > "$record"
}
