"""Flags of memory and precision that do nothing without another one."""

from megatron.early_exit.training.cli.flag_rules.rule import any_given, dependent, is_one_of

PRECISION = (
    dependent(
        needs="--recompute-granularity full",
        met=is_one_of("recompute_granularity", "full"),
        names=("recompute_method", "recompute_num_layers"),
    ),
    dependent(
        needs="--recompute-granularity selective or --recompute-activations",
        met=lambda args: (
            args.recompute_granularity == "selective"
            or args.recompute_activations
            or args.moe_layer_recompute
        ),
        names=("recompute_modules",),
    ),
    dependent(
        needs="--fp16",
        met=any_given("fp16"),
        names=("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
    ),
    dependent(
        needs="--fp16, --bf16 or --use-distributed-optimizer",
        # 0 is Megatron's own choice.
        met=lambda args: (
            not args.loss_scale or args.fp16 or args.bf16 or args.use_distributed_optimizer
        ),
        names=("loss_scale",),
    ),
    dependent(
        needs="--fp8-format or --fp4-format",
        met=any_given("fp8", "fp4"),
        names=("first_last_layers_bf16", "reuse_grad_buf_for_mxfp8_param_ag"),
    ),
    dependent(
        needs="--first-last-layers-bf16",
        met=any_given("first_last_layers_bf16"),
        families=("num_layers_at_",),
    ),
    dependent(
        needs="--fp8-format",
        met=any_given("fp8"),
        families=("fp8_",),
        names=("keep_fp8_transpose_cache",),
    ),
    dependent(needs="--fp4-format", met=any_given("fp4"), families=("fp4_",)),
    dependent(
        needs="--cpu-offloading-num-layers",
        met=any_given("cpu_offloading_num_layers"),
        names=("cpu_offloading_retain_pinned_cpu_buffers",),
    ),
    dependent(
        needs="--fine-grained-activation-offloading",
        met=any_given("fine_grained_activation_offloading"),
        families=("fine_grained_offloading_",),
        names=(
            *("offload_modules", "min_offloaded_tensor_size", "delay_offload_until_cuda_graph"),
            *("delta_offload_bytes_across_pp_ranks", "activation_offload_fraction"),
        ),
    ),
    dependent(
        needs="--cross-entropy-loss-fusion",
        met=any_given("cross_entropy_loss_fusion"),
        names=("cross_entropy_fusion_impl",),
    ),
)
