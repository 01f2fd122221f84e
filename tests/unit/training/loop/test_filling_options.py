"""Bubble filling's flags: what they allow, and what they make of a run's batches."""

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
from megatron.core.transformer.enums import LayerType

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.training.loop import exit_stages as stages_of_exits  # noqa: E402
from megatron.early_exit.training.loop.exit_stages import exit_stages  # noqa: E402
from megatron.early_exit.training.loop.filling_options import FillingOptions, plan_fills  # noqa: E402


@pytest.fixture(autouse=True)
def _plain_transformer_config(monkeypatch):
    """What Megatron derives from a whole command line, of which these tests give a part."""

    def config(args):
        given = vars(args)
        return SimpleNamespace(
            num_layers=args.num_layers,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=None,
            pipeline_model_parallel_layout=given.get("layout"),
            num_layers_in_first_pipeline_stage=given.get("first"),
            num_layers_in_last_pipeline_stage=given.get("last"),
            account_for_embedding_in_pipeline_split=False,
            account_for_loss_in_pipeline_split=False,
        )

    monkeypatch.setattr(stages_of_exits, "core_transformer_config_from_args", config)


def arguments(**others):
    args = {
        "num_layers": 8,
        "pipeline_model_parallel_size": 4,
        "micro_batch_size": 2,
        "data_parallel_size": 3,
        "global_batch_size": 60,
    }
    return Namespace(**(args | others))


def plan(args, *exits, pre_exit=False, backward_forward_ratio=2.0, **options):
    config = EarlyExitConfig(exit_layer_nums=exits, pre_exit=pre_exit)
    options["backward_forward_ratio"] = backward_forward_ratio
    return plan_fills(args, FillingOptions(fill_explicit_bubbles=True, **options), config)


def test_fills_are_extra_samples_of_each_step():
    args = arguments()
    line = plan(args, 2, 4)
    assert args.global_batch_size == 60 + 4 * 6
    assert line == (
        "bubble filling: 2 microbatches in the warm-up and 2 in the cool-down of 14, global batch "
        "size 84"
    )


def test_or_samples_of_the_batch():
    args = arguments()
    line = plan(args, 2, 4, fill_samples="from-batch")
    assert args.global_batch_size == 60
    assert "2 microbatches in the warm-up and 2 in the cool-down of 10," in line


def test_as_many_as_the_assumed_ratio_allows_until_it_is_measured():
    assert plan(arguments(), 2, 4, backward_forward_ratio="auto").startswith(
        "bubble filling: once the ratio is measured; if it is 1.5: 1 microbatches in the "
    )
    assert FillingOptions(fill_explicit_bubbles=True).is_measured
    # Nothing depends on it.
    none = {"num_fill_warmup_microbatches": 0, "num_fill_cooldown_microbatches": 0}
    assert not FillingOptions(fill_explicit_bubbles=True, **none).is_measured


def test_a_measured_ratio_never_takes_the_last_microbatch():
    """A run that was checked with the assumed ratio does not end once another is measured."""
    options = FillingOptions(fill_explicit_bubbles=True, fill_samples="from-batch")
    stages = frozenset(range(8))
    with_room = options.generator(8, 12, stages, 3.0)
    assert (with_room.num_warmup_fills, with_room.num_cooldown_fills) == (5, 5)
    assert with_room.num_microbatches == 2
    without = options.generator(8, 10, stages, 3.0)
    assert (without.num_warmup_fills, without.num_cooldown_fills) == (4, 4)
    assert without.num_microbatches == 2
    given = replace(options, backward_forward_ratio=3.0)
    with pytest.raises(ValueError, match="takes 10 of the 10 microbatches"):
        given.generator(8, 10, stages, 3.0)


@pytest.mark.parametrize(
    ("stages", "ratio", "fills"),
    [(4, 1.5, (1, 1)), (4, 1.6, (1, 1)), (8, 1.6, (4, 4)), (8, 3.0, (4, 4)), (5, 100.0, (2, 2))],
)
def test_extra_samples_leave_as_many_full_microbatches_as_were_asked_for(stages, ratio, fills):
    args = arguments(pipeline_model_parallel_size=stages, num_layers=8 * stages)
    asked = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    exits = tuple(range(8, 8 * stages, 8))
    plan(args, *exits, backward_forward_ratio="auto")
    microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    options = FillingOptions(fill_explicit_bubbles=True)
    own = exit_stages(args, EarlyExitConfig(exit_layer_nums=exits))
    filled = options.generator(stages, microbatches, own, ratio)
    assert (filled.num_warmup_fills, filled.num_cooldown_fills) == fills
    assert filled.num_microbatches == asked


def test_extra_samples_that_do_not_fit_run_through_the_whole_pipeline():
    """With a smaller ratio than the assumed one: the samples of a step stay what they are."""
    filled = FillingOptions(fill_explicit_bubbles=True).generator(4, 12, frozenset({0, 1}), 0.4)
    assert (filled.num_warmup_fills, filled.num_cooldown_fills) == (0, 0)
    assert filled.num_microbatches == 12


def test_fills_that_reach_no_exit_are_left_out():
    # With the exits on the second and third stage, only the deeper fill reaches one.
    assert "1 microbatches in the warm-up and 2" in plan(arguments(), 3, 5, pre_exit=True)
    assert "0 microbatches in the warm-up and 2" in plan(arguments(), 8)


@pytest.mark.parametrize(
    ("others", "pre_exit", "stages"),
    [
        ({}, False, {0, 1, 3}),
        # After the second layer is before the third, on the next stage.
        ({}, True, {0, 2}),
        ({"first": 1, "last": 1}, False, {1, 3}),
        ({"layout": [1, 3, 3, 1]}, False, {1, 2, 3}),
    ],
)
def test_stages_of_exits(others, pre_exit, stages):
    if "layout" in others:
        numbers = others["layout"]
        chunks = [[[LayerType.decoder] * number] for number in numbers]
        others = {"layout": SimpleNamespace(layout=chunks)}
    layers = (2, 6) if pre_exit else (2, 4, 8)
    if "first" in others:
        layers = (3, 8)
    if "layout" in others:
        layers = (4, 5, 8)
    config = EarlyExitConfig(exit_layer_nums=layers, pre_exit=pre_exit)
    assert exit_stages(arguments(**others), config) == stages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backward_forward_ratio": 0.0, "fill_explicit_bubbles": True},
            "--backward-forward-ratio 0.0 is out of range, allowed: 0.01 to 100, or auto",
        ),
        (
            {"num_fill_warmup_microbatches": -1, "fill_explicit_bubbles": True},
            "--num-fill-warmup-microbatches -1 is out of range, allowed: 0 or more",
        ),
        (
            {"num_fill_cooldown_microbatches": 1},
            "--num-fill-cooldown-microbatches has no effect without --fill-explicit-bubbles",
        ),
        (
            {"backward_forward_ratio": 1.6},
            "--backward-forward-ratio has no effect without --fill-explicit-bubbles",
        ),
        ({"fill_samples": "from-batch"}, "--fill-samples has no effect without"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FillingOptions(**options)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (
            arguments(pipeline_model_parallel_size=1),
            {},
            "--fill-explicit-bubbles has no effect with --pipeline-model-parallel-size 1",
        ),
        (
            arguments(),
            {"num_fill_cooldown_microbatches": 4},
            "--num-fill-cooldown-microbatches 4 is out of range, allowed: 0 to 3 with 4 stages",
        ),
        (
            arguments(global_batch_size=24),
            {"fill_samples": "from-batch"},
            "--fill-explicit-bubbles takes 4 of the 4 microbatches of a step and leaves none",
        ),
        (
            arguments(num_experts=4),
            {},
            "--num-experts 4 cannot be combined with --fill-explicit-bubbles: fills would reach",
        ),
        (
            arguments(tune_exit=True),
            {},
            "--tune-exit cannot be combined with --fill-explicit-bubbles: there are no gradients",
        ),
    ],
)
def test_flags_that_do_not_fit(args, options, message):
    with pytest.raises(ValueError, match=message):
        plan(args, 2, 4, **options)
