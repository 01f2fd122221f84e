# shellcheck shell=bash
# What the launchers in the folders here have in common: checks of the environment, the dry run, and
# the start of torchrun. A launch.sh of a folder reads this file and fills in what is "to fill in".

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# --- to fill in --------------------------------------------------------------------------------

recipe_flags=() # flags of all models of the folder
purpose=        # for --help: what its scripts do
dry_run_does=   # for --help: what a dry run does
more_paths=     # for --help: paths that the scripts read beside those of `usage`

# The same paths elsewhere; nothing to do where there are none.
check_more() { :; }      # adds to `problems` what is wrong with them
add_more() { :; }        # adds their flags
shrink_more() { :; }     # puts folders in `scratch` in their place
prepare_dry_run() { :; } # writes what a dry run reads there

# -----------------------------------------------------------------------------------------------

usage() {
    cat <<END
usage: [VARIABLE=value ...] $0 [FLAG ...]

$purpose Flags of pretrain_early_exit_gpt.py that are given here are added
after the script's own and override them.

Paths, the same on every node (all must exist):
${more_paths:+$more_paths
}  DATA_PATH        prefix of an indexed data set (PREFIX.bin and PREFIX.idx), or a mixture:
                   'weight prefix weight prefix ...'
  TOKENIZER_MODEL  SentencePiece model, or the folder of a Hugging Face tokenizer
  TOKENIZER_TYPE   SentencePieceTokenizer (default) or HuggingFaceTokenizer
  CHECKPOINT_DIR   folder to save checkpoints in, and to resume from
  TENSORBOARD_DIR  folder for TensorBoard's event files

Machines:
  GPUS_PER_NODE    GPUs of each node (default 8)
  NNODES           number of nodes (default 1)
  NODE_RANK        with several nodes: which one this is, 0 to NNODES - 1
  MASTER_ADDR      with several nodes: host name or address of node 0
  MASTER_PORT      a free port on node 0 (default 29500; chosen by itself on one node)
  PYTHON           interpreter (default: the project's .venv, else python3)

What to do:
  DRY_RUN=1        $dry_run_does
                   by the same flags for 3 iterations, on the CPU of this machine with made-up
                   data; needs no other variable
  PRINT_ONLY=1     check everything, print the command, and stop
END
}

fail() { # MESSAGE...
    printf 'error: %s\n' "$@" >&2
    exit 2
}

# --- flags -----------------------------------------------------------------------------------

# The last value given to a flag, which is the one that counts.
value_of() { # FLAG
    local i value=
    for ((i = 0; i < ${#flags[@]}; i++)); do
        case ${flags[i]} in
            "$1") value=${flags[i + 1]-} ;;
            "$1="*) value=${flags[i]#*=} ;;
        esac
    done
    echo "$value"
}

# The same for the size of a parallel group.
size_of() { # FLAG
    local size
    size=$(value_of "$1")
    [[ $size =~ ^[1-9][0-9]{0,8}$ ]] || fail "$1 ${size:-''} is out of range, allowed: 1 or more"
    echo "$size"
}

# The pipeline stages that are run: in EE-Tuning maybe only the first of those that divide a model.
stages_run() {
    if [[ -n $(value_of --tune-exit-pipeline-parallel-size) ]]; then
        size_of --tune-exit-pipeline-parallel-size
    else
        size_of --pipeline-model-parallel-size
    fi
}

# Gives a flag of the script another value, and says so.
replace() { # FLAG VALUE
    local i
    for ((i = 0; i < ${#flags[@]}; i++)); do
        if [[ ${flags[i]} == "$1" && ${flags[i + 1]} != "$2" ]]; then
            echo "dry run: $1 ${flags[i + 1]} -> $2" >&2
            flags[i + 1]=$2
        fi
    done
}

add_data() {
    flags+=(
        --tokenizer-type "${TOKENIZER_TYPE:-SentencePieceTokenizer}"
        --tokenizer-model "$TOKENIZER_MODEL"
        --data-path "${data[@]}"
    )
}

add_output() {
    flags+=(
        --save "$CHECKPOINT_DIR"
        --load "$CHECKPOINT_DIR"
        --tensorboard-dir "$TENSORBOARD_DIR"
    )
    add_more
}

# --- checks ----------------------------------------------------------------------------------

# Reports a variable that is not set.
is_set() { # NAME MEANING
    [[ -n ${!1-} ]] || { problems+=("$1 is not set, it should be $2") && return 1; }
}

check_folder() { # NAME MEANING
    is_set "$1" "$2" || return 0
    if [[ ! -d ${!1} ]]; then
        problems+=("$1: there is no folder ${!1}, it should be $2")
    elif [[ ! -w ${!1} ]]; then
        problems+=("$1: the folder ${!1} is not writable")
    fi
}

check_data() {
    local meaning="the prefix of PREFIX.bin and PREFIX.idx, or 'weight prefix weight prefix ...'"
    is_set DATA_PATH "$meaning" || return 0
    local word suffix
    for word in "${data[@]}"; do
        [[ $word =~ ^[0-9.]+(e-?[0-9]+)?$ ]] && continue
        for suffix in bin idx; do
            [[ -f $word.$suffix ]] ||
                problems+=("DATA_PATH: there is no file $word.$suffix, it should be $meaning")
        done
    done
}

check_files() {
    check_more
    check_data
    local tokenizer="a SentencePiece model or the folder of a Hugging Face tokenizer"
    if is_set TOKENIZER_MODEL "$tokenizer" && [[ ! -e $TOKENIZER_MODEL ]]; then
        problems+=("TOKENIZER_MODEL: $TOKENIZER_MODEL does not exist, it should be $tokenizer")
    fi
    check_folder CHECKPOINT_DIR "the folder to save checkpoints in and to resume from"
    check_folder TENSORBOARD_DIR "the folder for TensorBoard's event files"
}

check_number() { # NAME LOWEST HIGHEST
    if [[ ! ${!1} =~ ^[0-9]{1,9}$ ]] || ((10#${!1} < $2 || 10#${!1} > $3)); then
        problems+=("$1=${!1} is out of range, allowed: $2 to $3")
        return 1
    fi
}

check_machines() {
    NNODES=${NNODES:-1}
    GPUS_PER_NODE=${GPUS_PER_NODE:-8}
    local tensor pipeline microbatch batch
    tensor=$(size_of --tensor-model-parallel-size)
    pipeline=$(stages_run)
    microbatch=$(size_of --micro-batch-size)
    batch=$(size_of --global-batch-size)
    check_number GPUS_PER_NODE 1 1024 && check_number NNODES 1 65536 || return 0
    local several="with NNODES=$NNODES"
    if ((NNODES > 1)); then
        is_set MASTER_ADDR "the host name or address of node 0 $several" || :
        if is_set NODE_RANK "the number of this node, 0 to $((NNODES - 1)), $several"; then
            check_number NODE_RANK 0 $((NNODES - 1)) || :
        fi
    fi
    if ((NNODES * GPUS_PER_NODE % (tensor * pipeline) != 0)); then
        problems+=("NNODES x GPUS_PER_NODE = $NNODES x $GPUS_PER_NODE is no multiple of the \
$tensor x $pipeline GPUs that one model takes (tensor x pipeline parallel)")
        return
    fi
    local replicas=$((NNODES * GPUS_PER_NODE / (tensor * pipeline)))
    if ((batch % (microbatch * replicas) != 0)); then
        problems+=("--global-batch-size $batch is no multiple of --micro-batch-size $microbatch x \
$replicas replicas: give another of the two, or other GPUs")
    fi
}

# --- dry run ---------------------------------------------------------------------------------

# The same flags with sizes that a small machine can train: every layer, exit, stage and microbatch
# size stays, and so does tensor parallelism, at 2 instead of 4 with 2 stages to keep to 4 processes.
shrink() {
    replace --hidden-size 64
    replace --ffn-hidden-size 128
    replace --num-attention-heads 4
    replace --num-query-groups 2
    replace --seq-length 64
    replace --max-position-embeddings 64
    if (($(value_of --tensor-model-parallel-size) > 1)); then
        replace --tensor-model-parallel-size 2
        replace --pipeline-model-parallel-size 2
    fi
    # As many microbatches as stages.
    local microbatch stages
    microbatch=$(size_of --micro-batch-size)
    stages=$(stages_run)
    replace --global-batch-size $((microbatch * stages))
    replace --num-workers 0
    replace --train-iters 3
    replace --lr-warmup-iters 1
    replace --eval-interval 3
    replace --eval-iters 1
    replace --log-interval 1
    replace --save-interval 3
    replace --save-retain-interval 3

    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    export TMPDIR=$scratch # for what torch leaves behind
    CHECKPOINT_DIR=$scratch/checkpoints
    TENSORBOARD_DIR=$scratch/tensorboard
    local data=(--mock-data --tokenizer-type NullTokenizer --vocab-size 255)
    flags+=("${data[@]}")
    echo "dry run: ${data[*]} instead of DATA_PATH and TOKENIZER_MODEL" >&2
    echo "dry run: a temporary folder instead of CHECKPOINT_DIR and TENSORBOARD_DIR" >&2
    echo "dry run: on the CPU" >&2
    export CUDA_VISIBLE_DEVICES=
    shrink_more
}

# As many processes on this machine as the flags ask for.
use_this_machine() {
    local tensor pipeline
    tensor=$(size_of --tensor-model-parallel-size)
    pipeline=$(stages_run)
    NNODES=1
    GPUS_PER_NODE=$((tensor * pipeline))
    unset MASTER_ADDR
}

# --- start -----------------------------------------------------------------------------------

# The command on one line per flag, ready to be pasted.
show() { # WORD...
    local word
    printf '%q' "$1"
    for word in "${@:2}"; do
        [[ $word == --* || $word == */pretrain_early_exit_gpt.py ]] && printf ' \\\n   '
        printf ' %q' "$word"
    done
    echo
}

find_python() {
    local venv=$root/.venv/bin/python
    if [[ -n ${PYTHON-} ]]; then
        echo "$PYTHON"
    elif [[ -x $venv ]]; then
        echo "$venv"
    else
        echo python3
    fi
}

# Passes a signal on; torchrun ends its workers.
end_dry_run() { # PID STATUS
    trap '' INT TERM
    kill -TERM "$1" || :
    wait "$1" || :
    exit "$2"
}

launch() { # MODEL_FLAG... -- [FLAG...]
    flags=()
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    shift
    flags+=("${recipe_flags[@]}")
    local word
    for word in "$@"; do
        if [[ $word == -h || $word == --help ]]; then
            usage
            exit 0
        fi
    done

    problems=()
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        shrink
        add_output
        flags+=("$@")
        use_this_machine
    else
        local data
        read -ra data -d '' <<<"${DATA_PATH-}" || : # it ends at the end of the text, status 1
        check_files
        ((${#problems[@]} > 0)) || { add_data && add_output; }
        flags+=("$@")
        check_machines
    fi
    ((${#problems[@]} == 0)) || fail "${problems[@]}"

    local where=(--standalone)
    if ((NNODES > 1)) || [[ -n ${MASTER_ADDR-} ]]; then
        where=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-0}"
            --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    fi
    local command=(
        "$(find_python)" -m torch.distributed.run
        "${where[@]}" --nproc-per-node "$GPUS_PER_NODE"
        "$root/pretrain_early_exit_gpt.py" "${flags[@]}"
    )
    if [[ ${PRINT_ONLY:-0} == 1 ]]; then
        show "${command[@]}"
        return
    fi
    # One process per GPU: their threads should not fight over the cores.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    if [[ -n ${scratch-} ]]; then
        prepare_dry_run
        # Not exec: the temporary folder has to go afterwards. Nor in the foreground: this shell would
        # heed signals only when it has ended.
        "${command[@]}" &
        trap "end_dry_run $! 130" INT
        trap "end_dry_run $! 143" TERM
        wait $!
    else
        exec "${command[@]}"
    fi
}
