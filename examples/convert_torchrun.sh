#!/usr/bin/env bash
# Convert a checkpoint on several machines at once, with any method, calibrated ones too. Run on each machine, with its
# number in NODE (under Slurm: srun --ntasks-per-node=1 bash …, which sets it):
#
#     NODE=0 NODES=2 HOST=node0 bash examples/convert_torchrun.sh SOURCE OUTPUT [options of npuq convert]
#
# HOST is machine 0, and all reach its PORT. OUTPUT is a directory that all of them share. A rank that ends early ends
# all; the same line on any number of machines continues. Where a machine's name leads to no address of its own that the
# others reach, GLOO_SOCKET_IFNAME=eth0 names the interface.
set -euo pipefail

exec torchrun \
    --nnodes "${NODES:-1}" \
    --node-rank "${NODE:-${SLURM_NODEID:-0}}" \
    --nproc-per-node "${RANKS_PER_NODE:-1}" \
    --master-addr "${HOST:-localhost}" \
    --master-port "${PORT:-29400}" \
    -m npuq convert "$@"
