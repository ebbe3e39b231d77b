#!/usr/bin/env bash
#SBATCH --job-name=vlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# sbatch tools/launch/slurm.sh RECIPE [key=value ...]: a task per GPU. Three minutes before the time is up every rank
# saves and ends with 0; the job is then queued again and goes on from there, on any legal number of GPUs.
set -euo pipefail
srun --kill-on-bad-exit=1 python -m vlm run "$@" run.devices="$SLURM_NTASKS_PER_NODE" run.nodes="$SLURM_NNODES" \
  run.parallel="${PARALLEL:-fsdp2}" &
step=$!
trap 'kill -TERM $step; wait $step && scontrol requeue "$SLURM_JOB_ID"' TERM
wait $step
