#!/usr/bin/env bash
#SBATCH --job-name=early-exit-server
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --output=%x-%j.log
# Serves a model that is divided over the GPUs of one node; submit it from the project's root.
set -euo pipefail

usage() {
    cat <<END
usage: LOAD=/path/to/checkpoint sbatch [SBATCH OPTION ...] examples/serving/slurm.sh [FLAG ...]

TENSOR (default 2) processes share each layer, PIPELINE (default 2) stages share the layers; the job
needs as many GPUs as their product. PORT is 5000 unless it is set, PYTHON .venv/bin/python. FLAGs
go to the server. Clients need EARLY_EXIT_API_KEY, if it is set. PRINT_ONLY=1 prints the command.
END
}

fail() { # MESSAGE
    printf 'error: %s\n' "$1" >&2
    exit 2
}

case ${1-} in
    -h | --help) usage && exit ;;
esac

[[ -n ${LOAD-} ]] || fail "LOAD is not set, it should be a checkpoint's folder"
[[ -d $LOAD ]] || fail "LOAD=$LOAD is no folder"
TENSOR=${TENSOR:-2} PIPELINE=${PIPELINE:-2}
[[ $TENSOR =~ ^[1-9][0-9]*$ ]] || fail "TENSOR=$TENSOR is no number, allowed: 1 or more"
[[ $PIPELINE =~ ^[1-9][0-9]*$ ]] || fail "PIPELINE=$PIPELINE is no number, allowed: 1 or more"

# torchrun kills what is left 30 seconds after SIGTERM, so the server has to be done before.
command=(
    "${PYTHON:-.venv/bin/python}" -m torch.distributed.run
    --standalone
    --nproc-per-node "$((TENSOR * PIPELINE))"
    tools/run_early_exit_text_generation_server.py
    --load "$LOAD"
    --host 0.0.0.0
    --port "${PORT:-5000}"
    --tensor-model-parallel-size "$TENSOR"
    --pipeline-model-parallel-size "$PIPELINE"
    --shutdown-timeout 20
    "$@"
)
if [[ -n ${PRINT_ONLY-} ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit
fi

# In place of this shell, which would keep Slurm's SIGTERM to itself.
exec "${command[@]}"
