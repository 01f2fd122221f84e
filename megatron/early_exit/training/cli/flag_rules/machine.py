"""Flags that do nothing without a GPU, a backend or layers that serve them."""

import torch

from megatron.early_exit.training.cli.flag_rules.rule import dependent, is_one_of

MACHINE = (
    dependent(
        needs="--transformer-impl transformer_engine",
        met=lambda args: args.transformer_impl != "local",
        names=(
            *("fused_residual_rmsnorm", "use_te_activation_func", "flash_attention_version"),
            *("use_transformer_engine_op_fuser", "te_precision_config_file"),
            *("cpu_offloading_num_layers", "experimental_attention_variant"),
            *("heterogeneous_layers_config_path", "batch_invariant_mode"),
        ),
    ),
    dependent(
        needs="--distributed-backend nccl",
        met=is_one_of("distributed_backend", "nccl"),
        families=("flight_recorder_", "sharp_"),
        names=(
            *("nccl_communicator_config_path", "use_sharp", "high_priority_stream_groups"),
            *("disable_symmetric_registration", "ddp_pad_buckets_for_high_nccl_busbw"),
            "create_all_gather_group",
        ),
    ),
    dependent(
        needs="a GPU, which this machine lacks",
        met=lambda args: torch.cuda.is_available(),
        names=(
            *("empty_unused_memory_level", "log_device_memory_used", "gpu_sniff_test_interval"),
            *("log_energy", "disable_bf16_reduced_precision_matmul"),
        ),
    ),
    dependent(
        needs="--cuda-graph-impl local or transformer_engine",
        met=lambda args: (
            args.cuda_graph_impl != "none" or args.enable_cuda_graph or args.external_cuda_graph
        ),
        families=("cuda_graph_",),
        but=("cuda_graph_impl",),
    ),
)
