#!/usr/bin/env bash
# 30 billion parameters, exits after layers 15 and 30, each with an output projection of its own.
# 30B.sh --help tells how to run it.
set -euo pipefail

model_flags=(
    --num-layers 60
    --hidden-size 6656
    --num-attention-heads 52
    --untie-embeddings-and-output-weights
    --pre-exit # before layer k + 1 is after layer k, on the later stage at a boundary
    --exit-layer-nums 16 31
    --exit-layer-weight 0.1 0.2
    --untie-exit-output-weights
    --tensor-model-parallel-size 4
    --sequence-parallel
    --pipeline-model-parallel-size 4
    --micro-batch-size 1
    --train-iters 192000 # of 4.2 million tokens: 800 billion
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
