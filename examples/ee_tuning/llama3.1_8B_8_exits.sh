#!/usr/bin/env bash
# Llama 3.1 8B with exits after every fourth of its 32 layers.
# llama3.1_8B_8_exits.sh --help tells how to run it.
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
    --exit-layer-nums 4 8 12 16 20 24 28 32
    --micro-batch-size 4 # x 2 replicas x 2 microbatches
)

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${model_flags[@]}" -- "$@"
