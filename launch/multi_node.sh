#!/usr/bin/env bash
# Train on several nodes: run on every node, with the same words but for NODE_RANK (0 .. NNODES-1):
#   launch/multi_node.sh HOST:PORT NODE_RANK NNODES [CONFIG [section.key=value ...]]
# HOST is an address of node 0 that all nodes reach, PORT a free port there. Node 0 hosts the first stages, so it alone
# reads the data; every node sees the run directory. The same commands again go on from the last checkpoint.
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
WORKERS=${WORKERS:-2}                                      # processes a node; one GPU each where there are GPUs
JOIN_S=${JOIN_S:-900}                                      # how long a node waits for the others to start
DEFAULT_CONFIG=${DEFAULT_CONFIG:-$HERE/../configs/demo.yaml}
PYTHON=${PYTHON:-$(command -v "$HERE/../.venv/bin/python" || command -v python3)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}               # torchrun's own choice; run.threads is what counts

if (($# < 3)) || [[ $1 != *:* ]]; then
    echo "usage: $0 HOST:PORT NODE_RANK NNODES [CONFIG [section.key=value ...]]" >&2
    exit 2
fi
endpoint=$1 node_rank=$2 nnodes=$3
shift 3
if (($# == 0)); then set -- "$DEFAULT_CONFIG"; fi

# The static rendezvous keeps the order of the nodes, so neighbouring stages stay on one node where they can.
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$nnodes" --node-rank "$node_rank" --nproc-per-node "$WORKERS" \
    --rdzv-backend static --rdzv-endpoint "$endpoint" --rdzv-conf "timeout=$JOIN_S" \
    -m localpipe train "$@"
