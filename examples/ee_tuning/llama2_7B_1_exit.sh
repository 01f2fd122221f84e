#!/usr/bin/env bash
# Llama 2 7B with an exit after layer 8 of 32.
# llama2_7B_1_exit.sh --help tells how to run it.
set -euo pipefail

model_flags=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 11008
    --num-attention-heads 32
    --max-position-embeddings 4096
    --exit-layer-nums 8
    --tune-exit-pipeline-parallel-size 1 # of 4 stages: the other layers are not built
    --micro-batch-size 2 # x 8 replicas
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
