#!/usr/bin/env bash
# One node, all its GPUs: tools/launch/torchrun.sh RECIPE [key=value ...]. GPUS says how many (default: all there are).
# Several nodes: run it on each with NODES, NODE_RANK and HEAD (the first node's address).
set -euo pipefail
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
nodes=${NODES:-1}
exec torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --node-rank "${NODE_RANK:-0}" \
  --master-addr "${HEAD:-127.0.0.1}" --master-port "${PORT:-29500}" \
  -m vlm run "$@" run.devices="$gpus" run.nodes="$nodes" run.parallel="${PARALLEL:-fsdp2}"
