"""Ranges of the numbers among Megatron's flags, and of those that have to fit together.

Megatron divides by some, and indexes by others, long after the start."""

import math
from argparse import Namespace

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron.early_exit.errors import out_of_range
from megatron.early_exit.ranges import ABOVE_ZERO, BELOW_ONE, ZERO_OR_MORE, ZERO_TO_ONE, Range

_POSITIVE = (
    *("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels"),
    *("num_query_groups", "seq_length", "max_position_embeddings", "make_vocab_size_divisible_by"),
    *("vocab_size", "padded_vocab_size", "micro_batch_size", "global_batch_size", "seed"),
    *("eval_micro_batch_size", "eval_global_batch_size", "tensor_model_parallel_size"),
    *("pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"),
    *("expert_tensor_parallel_size", "num_layers_per_virtual_pipeline_stage"),
    *("num_virtual_stages_per_pipeline_rank", "moe_router_topk", "moe_ffn_hidden_size"),
    *("log_interval", "tensorboard_log_interval", "save_interval", "save_retain_interval"),
    *("log_memory_interval", "distributed_timeout_minutes", "num_dataset_builder_threads"),
    *("check_weight_hash_across_dp_replicas_interval", "rotary_base"),
    *("rotary_percent", "rope_scaling_factor", "recompute_num_layers", "adam_eps"),
    *("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
)
_NOT_NEGATIVE = (
    *("train_iters", "train_samples", "eval_iters", "num_workers", "lr", "weight_decay"),
    *("clip_grad", "manual_gc_interval", "num_experts", "init_method_std"),
    *("lr_warmup_iters", "lr_warmup_samples", "start_eval_at_iter", "mtp_num_layers"),
    "mtp_loss_scaling_factor",
    # 0 is off.
    *("non_persistent_save_interval", "exit_interval", "exit_duration_in_mins"),
    *("train_sync_interval", "loss_scale"),
)
_SHARES = ("hidden_dropout", "attention_dropout", "rotary_percent")
_LESS_THAN_ONE = ("adam_beta1", "adam_beta2")

_SCHEDULE_FORM = (
    "allowed: 'TOKENS:BATCH TOKENS:BATCH ...', the first from 0 tokens on, more tokens each time, "
    "numbers with or without K, M, B or T behind them"
)


def check_numbers(args: Namespace) -> None:
    """Refuse numbers that are out of range; best called before Megatron's own validation.

    Raises:
        ValueError: naming the flag, its value and the range.
    """
    ABOVE_ZERO.check_flags(args, *_POSITIVE)
    ZERO_OR_MORE.check_flags(args, *_NOT_NEGATIVE)
    ZERO_TO_ONE.check_flags(args, *_SHARES)
    BELOW_ONE.check_flags(args, *_LESS_THAN_ONE)


def check_combinations(args: Namespace) -> None:
    """Refuse what Megatron would stop at in words that do not say which flag is meant; best called
    before its own validation.

    Raises:
        ValueError: naming the flags, their values and what is allowed.
    """
    if args.save is not None and args.save_interval is None:
        raise ValueError(f"--save {args.save} needs --save-interval: how many iterations apart")
    if args.wandb_project and not (args.wandb_save_dir or args.save):
        raise ValueError(f"--wandb-project {args.wandb_project} needs --wandb-save-dir or --save")
    if args.wandb_project and not args.tensorboard_dir:
        raise ValueError(
            f"--wandb-project {args.wandb_project} needs --tensorboard-dir: Megatron sends losses "
            "to W&B only where it writes them for TensorBoard, too"
        )
    if args.num_experts:
        most = Range(least=1, most=args.num_experts, most_means="--num-experts")
        most.check_flags(args, "moe_router_topk")
    sizes = {
        "--tensor-model-parallel-size": args.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
        "--context-parallel-size": args.context_parallel_size,
    }
    product = math.prod(sizes.values())
    if args.world_size % product:
        named = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1)
        raise ValueError(
            f"{named} takes multiples of {product} processes, and there are {args.world_size}"
        )
    batch, microbatch = args.global_batch_size, args.micro_batch_size
    if batch is None or microbatch is None or args.decrease_batch_size_if_needed:
        return
    if batch % (microbatch * (replicas := args.world_size // product)):
        allowed = f"multiples of --micro-batch-size {microbatch} x {replicas} replicas"
        raise out_of_range("--global-batch-size", batch, allowed)


def check_batch_size_schedule(args: Namespace) -> None:
    """Refuse a schedule of batch sizes that cannot be read or kept; after Megatron's validation.

    Raises:
        ValueError: naming the flag, its value and what is allowed.
    """
    text = args.step_batch_size_schedule
    if text is None:
        return
    flag = f"--step-batch-size-schedule {text!r}"
    if args.decrease_batch_size_if_needed:
        raise ValueError(f"{flag} cannot be combined with --decrease-batch-size-if-needed")
    replicas = args.data_parallel_size * args.gtp_weight_remat_size
    multiple = args.micro_batch_size * replicas
    try:
        schedule = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(text, args.seq_length)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{flag} cannot be understood ({error}), {_SCHEDULE_FORM}") from error
    starts = [start for start, _ in schedule]
    if not starts or starts[0] != 0 or len(set(starts)) < len(starts):
        raise ValueError(
            f"{flag} changes after {starts} samples of --seq-length {args.seq_length} tokens, "
            f"{_SCHEDULE_FORM}"
        )
    # A run that goes on may have left the first sizes behind, with fewer replicas than now.
    sizes = [size for _, size in schedule]
    for size in sizes if args.load is None else sizes[-1:]:
        if size < 1 or size % multiple:
            allowed = (
                f"multiples of --micro-batch-size {args.micro_batch_size} x {replicas} replicas"
            )
            raise out_of_range(f"{flag}: a batch of", size, allowed)
