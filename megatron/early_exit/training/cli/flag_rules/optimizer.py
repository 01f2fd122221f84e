"""Flags of the optimizer that do nothing without another one."""

from megatron.early_exit.training.cli.flag_rules.rule import any_given, dependent, is_one_of

OPTIMIZER = (
    dependent(
        needs="--optimizer muon, dist_muon or adaptive_muon",
        met=is_one_of("optimizer", "muon", "dist_muon", "adaptive_muon"),
        families=("muon_",),
    ),
    dependent(
        needs="--optimizer lion, or --muon-scalar-optimizer lion",
        met=lambda args: "lion" in (args.optimizer, args.muon_scalar_optimizer),
        families=("lion_",),
    ),
    dependent(needs="--optimizer sgd", met=is_one_of("optimizer", "sgd"), names=("sgd_momentum",)),
    dependent(
        needs="an --optimizer that has Adam in it (adam, soap, or muon with "
        "--muon-scalar-optimizer adam)",
        met=lambda args: (
            args.optimizer not in ("sgd", "lion")
            and not ("muon" in args.optimizer and args.muon_scalar_optimizer == "lion")
        ),
        families=("adam_",),
    ),
    dependent(
        needs="--optimizer-cpu-offload",
        met=any_given("optimizer_cpu_offload"),
        families=("pin_cpu_",),
        names=(
            *("optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload"),
            "overlap_cpu_optimizer_d2h_h2d",
        ),
    ),
    dependent(
        needs="--lr-decay-style WSD", met=is_one_of("lr_decay_style", "WSD"), families=("lr_wsd_",)
    ),
    dependent(needs="--decoupled-lr", met=any_given("decoupled_lr"), names=("decoupled_min_lr",)),
)
