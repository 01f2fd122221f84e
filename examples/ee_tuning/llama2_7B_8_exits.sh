#!/usr/bin/env bash
# Llama 2 7B with exits after every fourth of its 32 layers.
# llama2_7B_8_exits.sh --help tells how to run it.
set -euo pipefail

model_flags=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 11008
    --num-attention-heads 32
    --max-position-embeddings 4096
    --exit-layer-nums 4 8 12 16 20 24 28 32
    --micro-batch-size 4 # x 2 replicas x 2 microbatches
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
