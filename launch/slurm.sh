#!/usr/bin/env bash
# One learner node and the others as workers, under Slurm. Submit with
#   DATABASE_URL=postgresql://user@host/database SNAPSHOTS=/shared/snapshots sbatch launch/slurm.sh recipe=NAME ...
# A PostgreSQL server must be reachable from all nodes; SNAPSHOTS is a folder on a shared filesystem.
#SBATCH --job-name=rlkit
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:TERM@300
set -euo pipefail
export DATABASE_URL SNAPSHOTS
here=$(cd "$(dirname "$0")" && pwd)
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
learner=${nodes[0]} others=$(IFS=,; echo "${nodes[*]:1}")
trap 'kill -TERM $(jobs -p) 2> /dev/null || true; wait' TERM INT
srun --nodes="$((${#nodes[@]} - 1))" --nodelist="$others" "$here/two_hosts.sh" workers "$@" rollout.workers=8 &
# Seven learner ranks on the first node, and its last GPU for the evaluator.
srun --overlap --nodes=1 --nodelist="$learner" env CUDA_VISIBLE_DEVICES=7 "$here/two_hosts.sh" evaluator "$@" rollout.workers=8 &
srun --overlap --nodes=1 --nodelist="$learner" env CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6 \
  accelerate launch --config_file "$here/accelerate/gpus.yaml" --num_processes 7 -m rlkit learner "$@" \
  rollout.workers=8 "buffer.url=$DATABASE_URL" "rollout.snapshot_dir=$SNAPSHOTS" &
wait -n  # whichever ends first: the learner at the end of the run, or a failure
status=$?
kill -TERM $(jobs -p) 2> /dev/null || true
wait
exit "$status"
