#!/usr/bin/env bash
# 7 billion parameters, exits after layers 8 and 16, each with an output projection of its own.
# 7B.sh --help tells how to run it.
set -euo pipefail

model_flags=(
    --num-layers 32
    --hidden-size 4096
    --num-attention-heads 32
    --untie-embeddings-and-output-weights
    --pre-exit # before layer k + 1 is after layer k, on the later stage at a boundary
    --exit-layer-nums 9 17
    --exit-layer-weight 0.1 0.2
    --untie-exit-output-weights
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4
    --micro-batch-size 2
    --train-iters 192000 # of 4.2 million tokens: 800 billion
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
