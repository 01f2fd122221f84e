#!/usr/bin/env bash
# 13 billion parameters, exits after layers 10 and 20, each with an output projection of its own.
# 13B.sh --help tells how to run it.
set -euo pipefail

model_flags=(
    --num-layers 40
    --hidden-size 5120
    --num-attention-heads 40
    --untie-embeddings-and-output-weights
    --pre-exit # before layer k + 1 is after layer k, on the later stage at a boundary
    --exit-layer-nums 11 21
    --exit-layer-weight 0.1 0.2
    --untie-exit-output-weights
    --tensor-model-parallel-size 2
    --sequence-parallel
    --pipeline-model-parallel-size 4
    --micro-batch-size 1
    --train-iters 192000 # of 4.2 million tokens: 800 billion
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
