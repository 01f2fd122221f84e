#!/usr/bin/env bash
# Llama 2 70B with an exit after layer 20 of 80.
# llama2_70B_1_exit.sh --help tells how to run it.
set -euo pipefail

model_flags=(
    --num-layers 80
    --hidden-size 8192
    --ffn-hidden-size 28672
    --num-attention-heads 64
    --group-query-attention
    --num-query-groups 8
    --max-position-embeddings 4096
    --exit-layer-nums 20
    --tune-exit-pipeline-parallel-size 1 # of 4 stages: the other layers are not built
    --micro-batch-size 2 # x 8 replicas
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
