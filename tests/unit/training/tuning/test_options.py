"""EE-Tuning's flags: what they allow, and the depth of the model that they lead to."""

from argparse import Namespace

import pytest

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.training.tuning.options import (  # noqa: E402
    TuningOptions,
    learning_rates,
    plan_depth,
)

AHEAD = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.1, "seq_length": 16}


def arguments(num_layers=32, stages=1, **others):
    return Namespace(num_layers=num_layers, pipeline_model_parallel_size=stages, **others)


def exits(*layers, **heads):
    return EarlyExitConfig(exit_layer_nums=layers, **(heads or {"use_exit_norm": True}))


@pytest.mark.parametrize(
    ("layers", "stages", "options", "depth", "built_stages"),
    [
        ((8,), 1, {}, 8, 1),
        ((8, 30), 1, {}, 30, 1),
        ((9,), 4, {}, 12, 4),
        ((32,), 4, {}, 32, 4),
        ((8,), 4, {"tune_exit_pipeline_parallel_size": 2}, 16, 2),
        ((8,), 4, {"tune_exit_pipeline_parallel_size": 4}, 32, 4),
        ((8,), 1, {"exit_distillation_weight": 0.5}, 32, 1),
    ],
)
def test_depth(layers, stages, options, depth, built_stages):
    args = arguments(stages=stages)
    plan_depth(args, TuningOptions(tune_exit=True, **options), exits(*layers))
    assert (args.num_layers, args.pipeline_model_parallel_size) == (depth, built_stages)
    assert args.full_num_layers == 32


def test_a_look_ahead_head_needs_the_whole_model_and_no_exits():
    for config in (EarlyExitConfig(), exits(8)):
        args = arguments(**AHEAD)
        plan_depth(args, TuningOptions(tune_exit=True), config)
        assert args.num_layers == 32
        with pytest.raises(ValueError, match=r"^--mtp-num-layers 2 needs the whole model in each"):
            plan_depth(arguments(stages=4, **AHEAD), TuningOptions(tune_exit=True), config)


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        # Without a head that learns beside them, these exits have nothing to tune.
        ({"share_final_head": True}, {}),
        ({"untie_exit_output_weights": True}, {"freeze_exit_output_weights": True}),
        # Or nothing that learns of a teacher, or could start at random.
        ({"share_final_head": True, "use_exit_gate": True}, {"exit_distillation_weight": 0.5}),
        ({"share_final_head": True, "use_exit_gate": True}, {"random_init": True}),
    ],
)
def test_a_look_ahead_head_is_tuned_beside_any_exits(heads, options):
    tuning, config = TuningOptions(tune_exit=True, **options), exits(8, **heads)
    plan_depth(arguments(**AHEAD), tuning, config)
    with pytest.raises(ValueError, match=r"nothing to tune|no weights of their own|no effect"):
        plan_depth(arguments(), tuning, config)


@pytest.mark.parametrize("heads", [{"use_exit_norm": True}, {"share_final_head": True}])
def test_gates_need_the_whole_model(heads):
    """On however many stages."""
    config = exits(8, use_exit_gate=True, **heads)
    for stages, options in ((1, {}), (4, {}), (4, {"tune_exit_pipeline_parallel_size": 4})):
        args = arguments(stages=stages)
        plan_depth(args, TuningOptions(tune_exit=True, **options), config)
        assert (args.num_layers, args.pipeline_model_parallel_size) == (32, stages)
    message = r"^--use-exit-gate needs the whole model, allowed: --pipeline-model-parallel-size 4 w"
    with pytest.raises(ValueError, match=message):
        plan_depth(
            arguments(stages=4),
            TuningOptions(tune_exit=True, tune_exit_pipeline_parallel_size=2),
            config,
        )
    with pytest.raises(ValueError, match=r"^--exit-distillation-weight 0.5 needs the whole model"):
        plan_depth(
            arguments(stages=4),
            TuningOptions(tune_exit=True, exit_distillation_weight=0.5),
            exits(8, use_exit_gate=True, use_exit_norm=True),
        )


def test_a_gate_is_tuned_beside_frozen_projections():
    options = TuningOptions(tune_exit=True, freeze_exit_output_weights=True)
    plan_depth(arguments(), options, exits(3, use_exit_gate=True, untie_exit_output_weights=True))


@pytest.mark.parametrize(
    ("args", "options", "config", "message"),
    [
        ({}, {}, EarlyExitConfig(), "--tune-exit needs exits"),
        ({}, {}, exits(3, pre_exit=True), "--pre-exit cannot be combined with --tune-exit"),
        ({}, {}, exits(3, pre_exit=False), "--tune-exit has nothing to tune"),
        (
            {},
            {},
            exits(3, share_final_head=True),
            "--share-final-head cannot be combined with --tune-exit: exits then have no weights",
        ),
        (
            {},
            {"freeze_exit_output_weights": True},
            exits(3, untie_exit_output_weights=True),
            "--tune-exit has nothing to tune",
        ),
        (
            {},
            {"freeze_exit_output_weights": True},
            exits(3),
            "--freeze-exit-output-weights has no effect without --untie-exit-output-weights",
        ),
        ({}, {"exit_layer_lr": (1e-3,)}, exits(3, 5), "--exit-layer-lr 0.001 has 1 values"),
        ({}, {"exit_layer_lr": (0.0,)}, exits(3), "--exit-layer-lr 0.0 is out of range"),
        (
            {"stages": 4},
            {"tune_exit_pipeline_parallel_size": 5},
            exits(3),
            "--tune-exit-pipeline-parallel-size 5 is out of range, allowed: 1 to",
        ),
        (
            {"stages": 4},
            {"tune_exit_pipeline_parallel_size": 1},
            exits(9),
            "the first 1 of 4 stages have 8 layers, and there is an exit after layer 9",
        ),
        (
            {"stages": 4},
            {"exit_distillation_weight": 0.5},
            exits(9),
            "--exit-distillation-weight 0.5 needs the whole model in each process",
        ),
        (
            {"lr": 0.0},
            {"exit_layer_lr": (1e-3,)},
            exits(3),
            "--exit-layer-lr needs a positive --lr",
        ),
        (
            {**AHEAD, "seq_length": 2},
            {},
            EarlyExitConfig(),
            r"--mtp-num-layers 2 is out of range, allowed: 1 to 1 \(--seq-length less 1\)",
        ),
        (
            {**AHEAD, "mtp_loss_scaling_factor": 0.0},
            {},
            EarlyExitConfig(),
            "--mtp-loss-scaling-factor 0.0 is out of range, allowed: above 0",
        ),
        (
            {**AHEAD, "context_parallel_size": 2},
            {},
            exits(3),
            "--context-parallel-size 2 cannot be combined with --tune-exit and --mtp-num-layers 2",
        ),
        (
            {**AHEAD, "mtp_detach_heads": True},
            {},
            exits(3),
            "--mtp-detach-heads cannot be combined with --tune-exit and --mtp-num-layers 2",
        ),
        (
            AHEAD,
            {"freeze_exit_output_weights": True},
            EarlyExitConfig(),
            "--freeze-exit-output-weights has no effect without --exit-layer-nums",
        ),
        (
            AHEAD,
            {"exit_layer_lr": (1e-3,)},
            EarlyExitConfig(),
            "--exit-layer-lr 0.001 has 1 values",
        ),
        ({"num_experts": 8}, {}, exits(3), "--num-experts 8 cannot be combined with --tune-exit"),
        (
            {"overlap_grad_reduce": True},
            {},
            exits(3),
            "--overlap-grad-reduce cannot be combined with --tune-exit",
        ),
    ],
)
def test_flags_that_do_not_fit(args, options, config, message):
    args = arguments(**args)
    with pytest.raises(ValueError, match=message) as caught:
        plan_depth(args, TuningOptions(tune_exit=True, **options), config)
    assert "\n" not in str(caught.value)
    assert args.num_layers == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_init": True}, "--random-init has no effect without --tune-exit"),
        ({"exit_layer_lr": (1.0,)}, "--exit-layer-lr has no effect without --tune-exit"),
        (
            {"tune_exit": True, "exit_distillation_weight": 1.5},
            "--exit-distillation-weight 1.5 is out of range, allowed: 0 to 1",
        ),
        (
            {"tune_exit": True, "exit_distillation_temperature": 2.0},
            "--exit-distillation-temperature 2.0 has no effect without --exit-distillation-weight",
        ),
        (
            {
                "tune_exit": True,
                "exit_distillation_weight": 0.5,
                "exit_distillation_temperature": 0.0,
            },
            "--exit-distillation-temperature 0.0 is out of range, allowed: above 0",
        ),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TuningOptions(**options)


def test_each_exit_has_its_rate():
    options = TuningOptions(tune_exit=True, exit_layer_lr=(1e-3, 2e-3))
    assert learning_rates(options, exits(5, 3)) == {5: 1e-3, 3: 2e-3}


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"random_init": True}, {}),
        ({"exit_distillation_weight": 0.5}, {}),
        ({}, {"use_dynamic_exit_layer_weight": True}),
        ({}, {"exit_layer_weight": (0.5,)}),
        ({}, {"exit_layer_temperature": (2.0,)}),
        ({}, {"exit_layer_weight_warmup_iters": 3}),
    ],
    ids=lambda one: next(iter(one), "none"),
)
def test_gates_alone_have_one_loss(options, config):
    (name,) = {**options, **config}
    gates = exits(3, use_exit_gate=True, **config)
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"^{flag} has no effect where only gates are tuned"):
        plan_depth(arguments(), TuningOptions(tune_exit=True, **options), gates)
