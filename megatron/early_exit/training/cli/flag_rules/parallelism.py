"""Flags of parallelism that do nothing without another one."""

from megatron.early_exit.training.cli.flag_rules.rule import any_given, dependent

PARALLELISM = (
    dependent(
        needs="--tp-comm-overlap",
        met=any_given("tp_comm_overlap"),
        families=("tp_comm_",),
        but=("tp_comm_overlap",),
    ),
    dependent(
        needs="virtual stages (--num-layers-per-virtual-pipeline-stage, "
        "--num-virtual-stages-per-pipeline-rank or --pipeline-model-parallel-layout)",
        met=any_given(
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "pipeline_model_parallel_layout",
        ),
        names=("microbatch_group_size_per_vp_stage", "overlap_p2p_comm_warmup_flush"),
    ),
    dependent(
        needs="--use-megatron-fsdp",
        met=any_given("use_megatron_fsdp"),
        families=("megatron_fsdp_", "fsdp_", "outer_dp_", "data_parallel_sharding_"),
        names=(
            *("gradient_reduce_div_fusion", "suggested_communication_unit_size"),
            "strict_fsdp_dtensor_load",
        ),
    ),
    dependent(
        needs="--use-torch-fsdp2", met=any_given("use_torch_fsdp2"), families=("torch_fsdp2_",)
    ),
    dependent(
        needs="--context-parallel-size 2 or more",
        met=lambda args: args.context_parallel_size > 1,
        names=("cp_comm_type",),
    ),
)
