#!/usr/bin/env bash
# Llama 2 13B with exits after every eighth of its 40 layers.
# llama2_13B_8_exits.sh --help tells how to run it.
set -euo pipefail

model_flags=(
    --num-layers 40
    --hidden-size 5120
    --ffn-hidden-size 13824
    --num-attention-heads 40
    --max-position-embeddings 4096
    --exit-layer-nums 5 10 15 20 25 30 35 40
    --micro-batch-size 4 # x 2 replicas x 2 microbatches
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
