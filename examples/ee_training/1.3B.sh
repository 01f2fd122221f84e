#!/usr/bin/env bash
# 1.3 billion parameters, exits after layers 6 and 12, all output projections tied.
# 1.3B.sh --help tells how to run it.
set -euo pipefail

model_flags=(
    --num-layers 24
    --hidden-size 2048
    --num-attention-heads 16
    --pre-exit # before layer k + 1 is after layer k, on the later stage at a boundary
    --exit-layer-nums 7 13
    --exit-layer-weight 0.25 0.5
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4
    --micro-batch-size 4
    --train-iters 72000 # of 4.2 million tokens: 300 billion
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
