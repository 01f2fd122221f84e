# shellcheck shell=bash disable=SC2034 # ../launch.sh reads what is set here
# What the model scripts have in common: the recipe. A model script reads this file and calls
# `launch` with its flags.

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

# EE-LLM's recipe (arXiv 2312.04916 and the settings published with it): Llama's layers and
# optimizer, 2048 sequences of 2048 tokens per iteration, the same learning rates for all sizes.
recipe_flags=(
    --normalization RMSNorm
    --position-embedding-type rope
    --swiglu
    --disable-bias-linear
    --hidden-dropout 0
    --attention-dropout 0
    --init-method-std 0.01
    --seq-length 2048
    --max-position-embeddings 2048
    --global-batch-size 2048
    --bf16
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
    --lr 3e-4
    --min-lr 3e-5
    --lr-decay-style cosine
    --lr-warmup-iters 2000
    --use-distributed-optimizer
    --overlap-grad-reduce
    --split "990,9,1"
    --num-workers 2
    --eval-interval 1200
    --eval-iters 10
    --log-interval 10
    --log-throughput
    --save-interval 240 # about a billion tokens
    --save-retain-interval 9600
)

purpose="Trains the model of this file."
dry_run_does="train a tiny model"
