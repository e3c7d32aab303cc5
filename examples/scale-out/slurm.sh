#!/usr/bin/env bash
# A study on 2 Slurm nodes with 8 GPUs each: `sbatch slurm.sh`. Ray is started on all nodes, the study on the first.
#SBATCH --job-name=synapse
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
set -euo pipefail

# The environment that has synapse[ray], on a file system that all nodes share.
source "${SYNAPSE_ENV:-/shared/venv}/bin/activate"

# Its own port, so that two jobs may share a node.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

srun --label ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_NNODES" -- \
    synapse run "${SYNAPSE_STUDY:-study.yaml}" --workers $((8 * SLURM_NNODES)) --gpus-per-worker 1
