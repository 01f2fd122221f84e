"""Flags of checkpoints that do nothing without another one."""

from megatron.early_exit.training.cli.flag_rules.rule import any_given, dependent

CHECKPOINTS = (
    dependent(
        needs="--save: nothing would be saved",
        met=any_given("save"),
        names=(
            *("save_interval", "save_retain_interval", "non_persistent_save_interval"),
            *("save_params_interval", "save_activations_interval", "save_wgrads_interval"),
            *("save_dgrads_interval", "async_save", "log_progress"),
        ),
    ),
    dependent(
        needs="--save or --ckpt-convert-format: nothing would be saved",
        met=any_given("save", "ckpt_convert_format"),
        names=("no_save_optim", "no_save_rng"),
    ),
    dependent(
        needs="--load or --pretrained-checkpoint: nothing would be loaded",
        met=any_given("load", "pretrained_checkpoint"),
        names=(
            *(
                "ckpt_step",
                "no_load_optim",
                "no_load_rng",
                "finetune",
                "exit_on_missing_checkpoint",
            ),
            *("load_main_params_from_ckpt", "override_ckpt_iteration", "ckpt_fully_parallel_load"),
        ),
    ),
    dependent(
        needs="--use-checkpoint-args",
        met=any_given("use_checkpoint_args"),
        names=(*("use_mp_args_from_checkpoint_args", "use_tokenizer_model_from_checkpoint_args"),),
    ),
    dependent(
        needs="--async-save",
        met=any_given("async_save"),
        families=("async_",),
        but=("async_save",),
        names=("use_persistent_ckpt_worker",),
    ),
    dependent(
        needs="--non-persistent-save-interval or --load",
        met=any_given("non_persistent_save_interval", "load"),
        families=("non_persistent_",),
        but=("non_persistent_save_interval",),
    ),
    dependent(needs="--replication", met=any_given("replication"), families=("replication_",)),
    dependent(
        needs="--ckpt-convert-format",
        met=any_given("ckpt_convert_format"),
        names=("ckpt_convert_save",),
    ),
)
