#!/usr/bin/env bash
# Llama 2 70B with exits after every eighth of its 80 layers.
# llama2_70B_8_exits.sh --help tells how to run it.
set -euo pipefail

model_flags=(
    --num-layers 80
    --hidden-size 8192
    --ffn-hidden-size 28672
    --num-attention-heads 64
    --group-query-attention
    --num-query-groups 8
    --max-position-embeddings 4096
    --exit-layer-nums 10 20 30 40 50 60 70 80
    --micro-batch-size 4 # x 2 replicas x 2 microbatches
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
