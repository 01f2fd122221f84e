#!/usr/bin/env bash
#SBATCH --job-name=early-exit
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
# Runs one of the model scripts on every node of a Slurm job; submit it from the project's root.
set -euo pipefail

usage() {
    cat <<END
usage: VARIABLE=value ... sbatch [SBATCH OPTION ...] examples/ee_training/slurm.sh MODEL [FLAG ...]

MODEL is 1.3B, 7B, 13B or 30B. The job's nodes and GPUs become the script's NNODES, NODE_RANK,
GPUS_PER_NODE, MASTER_ADDR and MASTER_PORT; its paths are yours to set, and FLAGs go to it:
see examples/ee_training/MODEL.sh --help. Eight nodes of eight GPUs unless sbatch is told otherwise.
END
}

fail() { # MESSAGE
    printf 'error: %s\n' "$1" >&2
    exit 2
}

case ${1-} in
    '') usage >&2 && exit 2 ;;
    -h | --help) usage && exit ;;
esac

[[ -n ${SLURM_JOB_ID-} ]] || fail "SLURM_JOB_ID is not set: start this with sbatch"

# Slurm runs a copy of this file that lies elsewhere, so the folder is where sbatch was called.
script=$SLURM_SUBMIT_DIR/examples/ee_training/$1.sh
[[ -f $script ]] || fail "there is no $script: call sbatch in the project's root, with a model's name"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# Jobs that share a node get different ports.
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
NNODES=$SLURM_JOB_NUM_NODES
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
export MASTER_ADDR MASTER_PORT NNODES GPUS_PER_NODE

# shellcheck disable=SC2016 # each node has a number of its own
exec srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' node "$script" "${@:2}"
