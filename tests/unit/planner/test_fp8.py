"""Products in FP8, by hand: what they take and keep, and where they are refused."""

from dataclasses import replace

import pytest

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.experts import Experts
from megatron.early_exit.planner.costs.hardware import ACCELERATORS
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.model_costs import ExitExecution, model_costs
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.training_options import FP8, TrainingOptions
from megatron.early_exit.planner.costs.update import update_costs
from tools.plan_pipeline import main

H100 = ACCELERATORS["h100"]
NONE = EarlyExitConfig()
SHAPE = ModelShape.llama(
    num_layers=2,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    vocab_size=32000,
    seq_length=8192,
)
ALONE = Layout(layers_per_stage=(2,), num_ranks=1)
EIGHT = replace(ALONE, data_parallel=8)


def stage(fp8: FP8 | None, shape: ModelShape = SHAPE, exits: EarlyExitConfig = NONE, at=ALONE):
    options = TrainingOptions(fp8=fp8)
    (only,) = model_costs(shape, at, H100, exits, ExitExecution(), options=options).stages
    return only


PLAIN, FAST = stage(None), stage(FP8(format="hybrid"))


def test_products_of_layers_run_at_the_peak_of_fp8():
    products_s = 2 * 2 * SHAPE.layer_weights * 8192 / (0.7 * 989e12)
    saved_s = PLAIN.forward_s - FAST.forward_s
    # Half of the time of the products, less what makes their inputs FP8.
    entries = 2 * 8192 * (3 * 8192 + 28672)
    assert saved_s == pytest.approx(products_s / 2 - entries * 4 / (0.85 * 3.35e12), rel=0.1)
    assert 0.45 * PLAIN.weight_gradient_s < FAST.weight_gradient_s < 0.65 * PLAIN.weight_gradient_s
    # The scale of a whole tensor takes another look at it.
    assert stage(FP8(format="e4m3", recipe="tensorwise")).forward_s > FAST.forward_s
    assert stage(FP8(format="e4m3")) == FAST


def test_inputs_are_kept_in_fp8_and_weights_twice():
    # Two inputs of a layer's width and one of the MLP's, less the attention's output in FP8.
    fewer = 2 * 8192 * (2 * 8192 + 28672 - 8192)
    assert PLAIN.activation_bytes - FAST.activation_bytes == fewer
    more = FAST.static_bytes - PLAIN.static_bytes
    assert more == pytest.approx(2 * 2 * SHAPE.layer_weights)
    gathered = stage(FP8(format="hybrid", param_gather=True))
    assert gathered.static_bytes == PLAIN.static_bytes


def test_weights_are_gathered_in_fp8():
    times = [
        update_costs(SHAPE, EIGHT, H100, NONE, TrainingOptions(fp8=fp8)).gather_s[0]
        for fp8 in (None, FP8(format="hybrid"), FP8(format="hybrid", param_gather=True))
    ]
    assert times[0] == times[1]
    saved = 2 * SHAPE.layer_weights * 7 / 8
    assert times[0] - times[2] == pytest.approx(saved / (0.8 * 450e9))


def test_exits_project_in_bf16_and_have_blocks_in_fp8():
    added = {}
    for block in (False, True):
        exits = EarlyExitConfig(exit_layer_nums=(1,), use_exit_block=block)
        added[block] = [
            stage(fp8, exits=exits).backward_s - stage(fp8).backward_s
            for fp8 in (None, FP8(format="hybrid"))
        ]
    assert added[False][0] == pytest.approx(added[False][1])
    assert added[True][1] < 0.8 * added[True][0]


def test_experts_are_multiplied_in_fp8():
    mixture = replace(
        SHAPE, experts=Experts(num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=14336)
    )
    plain, fast = stage(None, mixture), stage(FP8(format="hybrid"), mixture)
    assert fast.forward_s < 0.8 * plain.forward_s
    # But not the router.
    quantized = 2 * (mixture.layer_weights - mixture.router_weights)
    assert fast.static_bytes - plain.static_bytes == pytest.approx(2 * quantized)
    assert fast.activation_bytes < plain.activation_bytes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fp8-format hybrid", "--fp8-format 'hybrid' is not possible on a GPU without FP8"),
        (
            "--gpu h100 --fp8-format hybrid --fp8-recipe mxfp8",
            "--fp8-recipe 'mxfp8' needs a Blackwell GPU, allowed: delayed, tensorwise, blockwise",
        ),
        ("--fp8-recipe delayed", "--fp8-recipe delayed has no effect without --fp8-format"),
        ("--fp8-param-gather", "--fp8-param-gather has no effect without --fp8-format"),
        ("--fp8-tflops 900", "--fp8-tflops 900 has no effect without --fp8-format"),
        ("--gpu h100 --fp8-format hybrid --profile x.json", "profiles are in bf16"),
        ("--fp4-format e2m1", "--fp4-format e2m1 is not modelled: products in FP4"),
    ],
)
def test_what_is_not_possible_is_refused(capsys, words, message):
    assert main(["--config", "7b", "--gpus", "8", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
