#!/usr/bin/env bash
# Llama 2 13B with an exit after layer 10 of 40.
# llama2_13B_1_exit.sh --help tells how to run it.
set -euo pipefail

model_flags=(
    --num-layers 40
    --hidden-size 5120
    --ffn-hidden-size 13824
    --num-attention-heads 40
    --max-position-embeddings 4096
    --exit-layer-nums 10
    --tune-exit-pipeline-parallel-size 1 # of 4 stages: the other layers are not built
    --micro-batch-size 2 # x 8 replicas
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
