# shellcheck shell=bash disable=SC2034,SC2154 # ../launch.sh reads and sets the others
# What the model scripts have in common: the recipe, and the model that is tuned. A model script
# reads this file and calls `launch` with its flags.

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

# EE-Tuning's recipe (arXiv 2402.00518 and the settings published with it) for Llama 2 and its successors: MLP exits
# with a norm and a projection of their own, 40,000 iterations of 16 sequences of 2048 tokens.
recipe_flags=(
    --tune-exit
    --use-exit-norm
    --use-exit-mlp
    --untie-exit-output-weights
    --untie-embeddings-and-output-weights
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --position-embedding-type rope
    --swiglu
    --disable-bias-linear
    --hidden-dropout 0
    --attention-dropout 0
    --seq-length 2048
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4
    --global-batch-size 16
    --train-iters 40000 # of 32,768 tokens: 1.31 billion
    --bf16
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --adam-eps 1e-5
    --clip-grad 1.0
    --lr 1e-4
    --min-lr 1e-5
    --lr-decay-style linear
    --lr-warmup-fraction 0.01
    --use-distributed-optimizer
    # Rank 0 reads and hashes the whole model before the others go on.
    --distributed-timeout-minutes 60
    --split "990,9,1"
    --num-workers 2
    --eval-interval 1000
    --eval-iters 10
    --log-interval 10
    --log-throughput
    --save-interval 1000 # 33 million tokens
    --save-retain-interval 10000
)

purpose="Tunes the exits of the model of this file (EE-Tuning); the model itself is frozen."
dry_run_does="make a tiny model of random weights and tune its exits"
more_paths="  BASE_DIR         the model, as tools/checkpoint.py import-hf writes it"

check_more() {
    local meaning="the model that gets exits, as tools/checkpoint.py import-hf writes it"
    is_set BASE_DIR "$meaning" || return 0
    if [[ ! -f $BASE_DIR/latest_checkpointed_iteration.txt ]]; then
        problems+=("BASE_DIR: there is no checkpoint in $BASE_DIR, it should be $meaning")
    elif [[ $BASE_DIR -ef ${CHECKPOINT_DIR-} ]]; then
        problems+=("BASE_DIR and CHECKPOINT_DIR are both $BASE_DIR: exits are saved in a folder of \
their own")
    fi
}

# --load, the run's own checkpoints, goes before it once there are any.
add_more() {
    flags+=(--pretrained-checkpoint "$BASE_DIR")
}

shrink_more() {
    BASE_DIR=$scratch/base
    echo "dry run: a temporary model of random weights instead of BASE_DIR" >&2
}

# The model to tune: the one that the flags without those of tuning train, after one iteration.
prepare_dry_run() {
    local word is_kept=1 model_flags=()
    for word in "${flags[@]}"; do
        case $word in
            --tune-exit* | --exit-* | --use-exit-* | --untie-exit-* | --freeze-exit-* | \
                --pre-exit | --random-init | --pretrained-checkpoint | --load | --tensorboard-dir | \
                --*-parallel-size | --*-parallel-size=* | --sequence-parallel) is_kept= ;;
            --*) is_kept=1 ;;
        esac
        [[ -z $is_kept ]] || model_flags+=("$word")
    done
    model_flags+=(
        --micro-batch-size 1 --global-batch-size 1 --train-iters 1
        --eval-iters 0 --save-interval 1 --save "$BASE_DIR" --no-save-optim
    )
    "$(find_python)" "$root/pretrain_early_exit_gpt.py" "${model_flags[@]}" >"$scratch/base.log" \
        2>&1 || { cat "$scratch/base.log" >&2 && fail "the temporary model cannot be made"; }
}
