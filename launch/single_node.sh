#!/usr/bin/env bash
# Train on this machine under torchrun:  launch/single_node.sh [CONFIG [section.key=value ...]]
# The same command again goes on from the last checkpoint. Each variable can be set in the environment.
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
WORKERS=${WORKERS:-2}                                      # processes; one GPU each where there are GPUs
DEFAULT_CONFIG=${DEFAULT_CONFIG:-$HERE/../configs/demo.yaml}
PYTHON=${PYTHON:-$(command -v "$HERE/../.venv/bin/python" || command -v python3)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}               # torchrun's own choice; run.threads is what counts

if (($# == 0)); then set -- "$DEFAULT_CONFIG"; fi

# --standalone: a store of its own on a free port of the loopback.
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$WORKERS" -m localpipe train "$@"
