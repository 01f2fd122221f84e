#!/usr/bin/env bash
# Llama 3.1 8B with an exit after layer 8 of 32.
# llama3.1_8B_1_exit.sh --help tells how to run it.
set -euo pipefail

model_flags=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --rotary-base 500000
    --use-rope-scaling # from 8192 positions, low and high frequencies at 1 and 4
    --rope-scaling-factor 8
    --max-position-embeddings 131072
    --exit-layer-nums 8
    --tune-exit-pipeline-parallel-size 1 # of 4 stages: the other layers are not built
    --micro-batch-size 2 # x 8 replicas
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
