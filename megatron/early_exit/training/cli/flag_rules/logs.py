"""Flags of logs, profiles and whatever watches a run that do nothing without another one."""

from megatron.early_exit.training.cli.flag_rules.rule import any_given, dependent

LOGS = (
    dependent(
        needs="--tensorboard-dir",
        met=any_given("tensorboard_dir"),
        families=("tensorboard_",),
        but=("tensorboard_dir",),
        names=(
            *("log_timers_to_tensorboard", "log_loss_scale_to_tensorboard"),
            "log_validation_ppl_to_tensorboard",
            *("log_memory_to_tensorboard", "log_world_size_to_tensorboard"),
        ),
    ),
    dependent(
        needs="--wandb-project",
        met=any_given("wandb_project"),
        families=("wandb_",),
        but=("wandb_project",),
    ),
    dependent(
        needs="--profile",
        met=any_given("profile"),
        families=("profile_step_", "pytorch_profiler_"),
        names=("use_pytorch_profiler", "nvtx_ranges", "record_shapes"),
    ),
    dependent(
        needs="--profile or --record-memory-history",
        met=any_given("profile", "record_memory_history"),
        names=("profile_ranks",),
    ),
    dependent(
        needs="--record-memory-history",
        met=any_given("record_memory_history"),
        names=("memory_snapshot_path",),
    ),
    dependent(
        needs="--logits-save-dir",
        met=any_given("logits_save_dir"),
        families=("logits_save_",),
        but=("logits_save_dir",),
    ),
    dependent(
        needs="--log-straggler",
        met=any_given("log_straggler"),
        families=("straggler_",),
        names=("disable_straggler_on_startup",),
    ),
    dependent(
        needs="--enable-ft-package",
        met=any_given("enable_ft_package"),
        names=("calc_ft_timeouts", "ft_num_warmup_iters"),
    ),
    dependent(
        needs="--fault-injector-ranks or --fault-injector-num-ranks",
        met=any_given("fault_injector_ranks", "fault_injector_num_ranks"),
        families=("fault_injector_",),
        but=("fault_injector_ranks", "fault_injector_num_ranks"),
    ),
    dependent(
        needs="--error-injection-rate",
        met=any_given("error_injection_rate"),
        names=("error_injection_type",),
    ),
    dependent(
        needs="--manual-gc",
        met=any_given("manual_gc"),
        names=("manual_gc_interval", "manual_gc_eval"),
    ),
)
