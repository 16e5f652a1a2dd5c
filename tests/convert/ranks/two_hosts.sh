#!/usr/bin/env bash
# The recipes of examples/ on two hosts, as far as one machine has them: network namespaces with a wire between them, and
# one directory. Needs root, or the right to make namespaces; leaves nothing behind.
#
#     bash tests/convert/ranks/two_hosts.sh .venv/bin
set -euo pipefail

root=$(cd "$(dirname "$0")/../../.." && pwd)
bin=$(cd "${1:-$root/.venv/bin}" && pwd)
if [ -z "${NPUQ_INSIDE:-}" ]; then
    NPUQ_INSIDE=1 exec unshare --net --kill-child --fork bash "$0" "$bin"
fi

folder=$(mktemp -d)
unshare --net sleep 600 &
other=$!
trap 'kill $other; rm -rf "$folder"' EXIT
sleep 0.5
ip link set lo up
ip link add wire type veth peer name wire netns "$other"
ip address add 10.77.0.1/24 dev wire
ip link set wire up
there() { nsenter --net="/proc/$other/ns/net" "$@"; }
there ip link set lo up
there ip address add 10.77.0.2/24 dev wire
there ip link set wire up

# An environment made over another one's packages has no torchrun of its own.
printf '#!/bin/sh\nexec "%s/python" -m torch.distributed.run "$@"\n' "$bin" > "$folder/torchrun"
chmod +x "$folder/torchrun"
export PATH="$folder:$bin:$PATH" PYTHONPATH="$(dirname "$root")" OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=wire
source="$root/examples/tiny-deepseek-v3-fp8" options=(--max-shard-size 1MB --workers 1 --quiet)

compare() { # name, then options: by torchrun on both hosts, and in one process
    local name=$1
    shift
    npuq convert "$source" "$folder/$name-one" "${options[@]}" "$@" > /dev/null
    local line=("$root/examples/convert_torchrun.sh" "$source" "$folder/$name" "${options[@]}" "$@")
    NODE=0 NODES=2 HOST=10.77.0.1 bash "${line[@]}" > /dev/null &
    local here=$!
    NODE=1 NODES=2 HOST=10.77.0.1 there bash "${line[@]}"
    wait "$here"
    diff -r "$folder/$name-one" "$folder/$name"
    echo "$name: the same bytes on two hosts and in one process"
}

compare data-free --method minmax
compare calibrated --method rotate+smooth+gptq --samples 4 --sequence-length 32

# The job array, without Slurm: its variables, two jobs at once and one after them. No network at all.
job() { SLURM_JOB_ID=1 SLURM_ARRAY_TASK_ID=$1 bash "$root/examples/convert.slurm" "$source" "$folder/array" "$2" \
    "${options[@]}" --method minmax; }
job 0 2 &
first=$!
there bash -c "ip link set wire down"
SLURM_JOB_ID=1 SLURM_ARRAY_TASK_ID=1 there bash "$root/examples/convert.slurm" "$source" "$folder/array" 2 \
    "${options[@]}" --method minmax
wait "$first"
job 0 finish > /dev/null
diff -r "$folder/data-free-one" "$folder/array"
echo "job array: the same bytes"
