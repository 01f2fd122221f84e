"""What exits cost in a pipeline, with the papers' models and in the setting of their figures."""

from dataclasses import replace

import pytest

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.cost_model import CostModel, StageCost
from megatron.early_exit.planner.costs.hardware import ACCELERATORS
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.model_costs import ExitExecution, model_costs
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.part_times import HardwareTimes
from megatron.early_exit.planner.costs.training_options import TrainingOptions
from megatron.early_exit.planner.paper import PAPER_MODELS, PaperModel
from megatron.early_exit.planner.simulation.long_step import StepTime
from megatron.early_exit.planner.simulation.simulator import simulate
from megatron.early_exit.schedules.generators import FilledOneFOneB, OneFOneB

NONE = EarlyExitConfig()
DEFERRED, AT_ONCE = ExitExecution(deferred=True), ExitExecution(deferred=False)

models = pytest.mark.parametrize("model", PAPER_MODELS.values(), ids=PAPER_MODELS)


def changes(model: PaperModel, exits: StepTime, mapping: bool = True) -> tuple[float, float]:
    """Step time and peak memory over those of the standard model."""
    standard = model.step(NONE, DEFERRED, mapping)
    return (
        exits.step_s / standard.step_s - 1,
        max(exits.peak_bytes) / max(standard.peak_bytes) - 1,
    )


# --- the papers' figures: a stage's forward takes 2, an exit's 1, and a backward twice that ------


def figure_costs(forward: tuple[int, ...], backward: tuple[int, ...]) -> CostModel:
    stages = (StageCost(forward_s=f, backward_s=b) for f, b in zip(forward, backward, strict=True))
    return CostModel(stages=tuple(stages), transfer_s=(0, 0, 0))


# The final head takes as long as an exit.
STANDARD = figure_costs((2, 2, 2, 3), (4, 4, 4, 6))
WITH_EXITS = {
    "plain": figure_costs((3, 3, 2, 3), (6, 6, 4, 6)),
    "deferral": figure_costs((2, 2, 2, 3), (7, 7, 4, 6)),
    "placement": figure_costs((2, 3, 3, 3), (4, 6, 6, 6)),
    "both": figure_costs((2, 2, 2, 3), (4, 7, 7, 6)),
}


@pytest.mark.parametrize("costs", WITH_EXITS.values(), ids=WITH_EXITS)
@pytest.mark.parametrize("num_microbatches", [6, 12, 48])
def test_exits_hide_behind_the_last_stage(costs, num_microbatches):
    """Two exits take 9 units of each microbatch, but of the step only what they add to the way of
    the first microbatch in and of the last one out: 6, however many microbatches there are."""
    schedule = OneFOneB(num_ranks=4, num_microbatches=num_microbatches).build()
    assert simulate(schedule, STANDARD).step_s == 9 * num_microbatches + 18
    assert simulate(schedule, costs).step_s == 9 * num_microbatches + 24


def test_exits_fill_implicit_bubbles():
    schedule = OneFOneB(num_ranks=4, num_microbatches=6).build()
    standard = simulate(schedule, STANDARD).bubble_fraction
    assert simulate(schedule, WITH_EXITS["both"]).bubble_fraction < standard


def test_filling_the_figures_bubbles_adds_no_time():
    """With exits deferred and placed; and where they are not, no more than a fill's forward."""
    plain = OneFOneB(num_ranks=4, num_microbatches=6).build()
    fills = FilledOneFOneB(num_ranks=4, num_microbatches=6, backward_forward_ratio=2.0)
    assert (fills.num_warmup_fills, fills.num_cooldown_fills) == (2, 2)
    added = {
        name: simulate(fills.build(), costs).step_s - simulate(plain, costs).step_s
        for name, costs in WITH_EXITS.items()
    }
    assert added == {"plain": 3, "deferral": 0, "placement": 2, "both": 0}
    filled = simulate(fills.build(), WITH_EXITS["both"])
    assert filled.bubble_fraction < 0.5 * simulate(plain, WITH_EXITS["both"]).bubble_fraction + 1e-9


# --- the papers' models on A100s -----------------------------------------------------------------


@models
def test_exits_cost_little_time_and_no_memory(model):
    """Pipeline neighbours in one node: at most 2 % of the step, and no peak memory."""
    time, memory = changes(model, model.step(model.model.exits.placed(pre_exit=True), DEFERRED))
    assert 0 <= time <= 0.02
    assert memory <= 0


@models
def test_neighbours_on_other_nodes_cost_more_time(model):
    """Exits make neighbouring stages equally slow, so that none hides a transfer any more."""
    exits = model.model.exits.placed(pre_exit=True)
    near, _ = changes(model, model.step(exits, DEFERRED))
    far, _ = changes(model, model.step(exits, DEFERRED, use_tp_pp_dp_mapping=False), False)
    assert near <= far <= 0.04


@models
def test_each_optimisation_saves_memory(model):
    """Without any, the first stage holds the logits of four microbatches in flight."""
    peak = {
        name: changes(model, model.step(model.model.exits.placed(pre_exit), execution))[1]
        for name, pre_exit, execution in (
            ("plain", False, AT_ONCE),
            ("deferral", False, DEFERRED),
            ("placement", True, AT_ONCE),
            ("both", True, DEFERRED),
        )
    }
    assert peak["plain"] > 0.04
    assert peak["deferral"] < peak["plain"]
    assert peak["placement"] < peak["plain"]
    assert peak["both"] <= min(peak["deferral"], peak["placement"])


def test_chunks_of_logits_save_memory_where_deferral_is_not_enough():
    model = PAPER_MODELS["1.3b"]
    exits = model.model.exits.placed(pre_exit=True)
    whole = model.step(exits, DEFERRED).peak_bytes
    chunked = model.step(exits, ExitExecution(chunk_tokens=1024)).peak_bytes
    # Stages 1 and 2 have an exit each: 8192 tokens' logits in 6 bytes, and an eighth of them.
    assert whole[1] - chunked[1] == pytest.approx(7 / 8 * 8192 * 50304 * 6)


# --- the derivation ------------------------------------------------------------------------------

TINY = ModelShape.llama(
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    vocab_size=100,
    seq_length=10,
)


def costs_of(
    layout: Layout, shape: ModelShape = TINY, exits: EarlyExitConfig = NONE, **options
) -> CostModel:
    h100 = ACCELERATORS["h100"]
    return model_costs(shape, layout, h100, exits, DEFERRED, options=TrainingOptions(**options))


def test_seven_billion_weights():
    shape = PAPER_MODELS["7b"].model.shape
    weights = shape.num_layers * shape.layer_weights + 2 * shape.projection_weights
    assert weights == pytest.approx(6.9e9, rel=0.01)


LARGE = replace(TINY, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64)
LARGE = replace(LARGE, kv_channels=128, num_query_groups=8, vocab_size=32000, seq_length=8192)
TWO_LAYERS = Layout(layers_per_stage=(2, 2), num_ranks=2)


def test_large_layers_take_little_more_than_their_operations():
    """Six operations for each weight and token, at the share of the peak that products reach, and
    not more than a fifth beside them."""
    costs = costs_of(TWO_LAYERS, LARGE)
    peak = 0.70 * 989e12
    products_s = 2 * 2 * LARGE.layer_weights * 8192 / peak
    # Half of the matrix is masked, and five products go back for two that went forward.
    attention_s = 2 * 2 * 8192 * 8192 * 8192 / (0.5 * 989e12)
    first = costs.stages[0]
    least_s = products_s + attention_s
    assert least_s < first.forward_s < 1.2 * least_s
    least_s = 2 * products_s + 2.5 * attention_s
    assert least_s < first.backward_s < 1.2 * least_s
    assert products_s < first.weight_gradient_s < 1.2 * products_s


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_takes_time_and_no_memory(recompute):
    kept, again = (
        costs_of(TWO_LAYERS, LARGE, flash_attention=False, recompute=one).stages[0]
        for one in ("none", recompute)
    )
    assert again.forward_s == kept.forward_s
    added_s = again.backward_s - kept.backward_s
    if recompute == "full":
        # All but the embedding.
        assert added_s == pytest.approx(kept.forward_s, rel=0.05)
        # The input of each layer, in bf16.
        assert again.activation_bytes == 2 * 8192 * 2 * 8192
    else:
        assert 0 < added_s < 0.5 * kept.forward_s
        # Without dropout, the matrix behind its softmax in bf16.
        matrix = 2 * 64 * 8192 * 8192 * 2
        assert kept.activation_bytes - again.activation_bytes == matrix
    assert again.backward_extra_bytes > kept.backward_extra_bytes


def test_written_attention_takes_the_time_of_its_matrix():
    flash, written = (
        costs_of(TWO_LAYERS, LARGE, flash_attention=one).stages[0] for one in (True, False)
    )
    # Eight bytes of each entry move in the forward, in two layers.
    moved_s = 2 * 8 * 64 * 8192**2 / (0.85 * 3.35e12)
    masked_s = 2 * 4 * 8192**2 * 8192 / 989e12 * (1 / 0.7 - 0.5 / 0.5)
    assert written.forward_s - flash.forward_s == pytest.approx(moved_s + masked_s)


def test_sequence_parallelism_shares_what_tensor_parallelism_does_not():
    layout = replace(TWO_LAYERS, tensor_parallel=8)
    shared, whole = (
        costs_of(layout, LARGE, sequence_parallel=one).stages[0] for one in (True, False)
    )
    # Four inputs of each of two layers, in bf16: seven eighths more on each accelerator.
    assert whole.activation_bytes - shared.activation_bytes == 2 * 7 / 8 * 8192 * 4 * 2 * 8192
    assert whole.forward_s > shared.forward_s


def test_sequences_are_shared_by_context_parallelism():
    layout = replace(TWO_LAYERS, context_parallel=2)
    whole, shared = (costs_of(one, LARGE).stages[0] for one in (TWO_LAYERS, layout))
    assert shared.forward_s == pytest.approx(whole.forward_s / 2, rel=0.05)
    assert shared.activation_bytes == whole.activation_bytes / 2
    # Over a network the ring of keys and values is no longer hidden.
    far = replace(layout, tensor_parallel=8)
    slow = replace(ACCELERATORS["h100"], network_bytes_per_s=1e9)
    times = [
        model_costs(LARGE, far, one, NONE, DEFERRED).stages[0].forward_s
        for one in (ACCELERATORS["h100"], slow)
    ]
    # Keys and values of a head's 128 entries in bf16, for half of the tokens, in two layers.
    sent_s = 2 * 4096 * 2 * 128 * 2 / (0.8 * 1e9)
    assert 0.5 * sent_s < times[1] - times[0] < sent_s


def test_messages_are_waited_for_unless_something_runs_beside_them():
    layout = Layout(layers_per_stage=(1,) * 4, num_ranks=4)
    beside, waiting = (costs_of(layout, LARGE, overlaps_messages=one) for one in (True, False))
    sent_s = beside.transfer_s[0]
    assert sent_s > 0
    assert waiting.transfer_s == (0, 0, 0)
    for stage in range(4):
        more_s = waiting.stages[stage].forward_s - beside.stages[stage].forward_s
        assert more_s == pytest.approx(sent_s if stage else 0)
        more_s = waiting.stages[stage].backward_s - beside.stages[stage].backward_s
        assert more_s == pytest.approx(sent_s if stage < 3 else 0)


def test_weights_are_where_they_belong():
    projection = 100 * 8
    layers = 2 * TINY.layer_weights
    layout = Layout(layers_per_stage=(2, 2), num_ranks=2, data_parallel=4)

    def weights(exits: EarlyExitConfig = NONE, shape: ModelShape = TINY) -> list[float]:
        found = [stage.static_bytes / 9 for stage in costs_of(layout, shape, exits).stages]
        return [(number - layers) / projection for number in found]

    assert weights() == [1, 1]
    tied = EarlyExitConfig(exit_layer_nums=(1, 2, 3))
    assert weights(tied) == [1, 2]
    untied = EarlyExitConfig(exit_layer_nums=(1, 2, 3), untie_exit_output_weights=True)
    assert weights(untied) == [3, 2]
    placed = EarlyExitConfig(exit_layer_nums=(3,), pre_exit=True, untie_exit_output_weights=True)
    assert weights(placed) == [1, 2]
    # A copy of the output layer, where it is not the embedding.
    shared = EarlyExitConfig(exit_layer_nums=(1, 2, 3), share_final_head=True)
    assert weights(shared) == [2, 1]
    one_matrix = replace(TINY, share_embeddings_and_output_weights=True)
    assert weights(shared, one_matrix) == [1, 1]


def test_deferral_moves_the_exits_forward_to_the_backward():
    layout = Layout(layers_per_stage=(2, 2), num_ranks=2)
    exits = EarlyExitConfig(exit_layer_nums=(1,))
    accelerator = ACCELERATORS["h100"]
    deferred, at_once = (
        model_costs(TINY, layout, accelerator, exits, execution).stages[0]
        for execution in (DEFERRED, AT_ONCE)
    )
    assert deferred.forward_s + deferred.backward_s == pytest.approx(
        at_once.forward_s + at_once.backward_s
    )
    assert deferred.forward_s == costs_of_standard_forward(layout)
    assert deferred.activation_bytes < at_once.activation_bytes
    assert deferred.backward_extra_bytes > at_once.backward_extra_bytes
    assert deferred.local_backward_s > 0


def costs_of_standard_forward(layout: Layout) -> float:
    costs = model_costs(TINY, layout, ACCELERATORS["h100"], NONE, DEFERRED)
    return costs.stages[0].forward_s


@pytest.mark.parametrize("flag", ["use_exit_mlp", "use_exit_block"])
def test_larger_heads_cost_more(flag):
    layout = Layout(layers_per_stage=(2, 2), num_ranks=2)
    minimal = costs_of(layout, exits=EarlyExitConfig(exit_layer_nums=(1,))).stages[0]
    larger = costs_of(layout, exits=EarlyExitConfig(exit_layer_nums=(1,), **{flag: True})).stages[0]
    assert larger.backward_s > minimal.backward_s
    assert larger.static_bytes > minimal.static_bytes
    assert larger.backward_extra_bytes > minimal.backward_extra_bytes
    assert larger.forward_s == minimal.forward_s


def test_fewer_answers_make_exits_cheaper():
    layout = Layout(layers_per_stage=(2, 2), num_ranks=2)
    every = EarlyExitConfig(exit_layer_nums=(1,))
    few = EarlyExitConfig(exit_layer_nums=(1,), exit_vocab_size=25)
    whole, part = (
        costs_of(layout, exits=exits).stages[0].local_backward_s for exits in (every, few)
    )
    # Logits are a quarter; the norm is whole.
    assert whole / 4 < part < whole


@pytest.mark.parametrize(
    ("options", "leaves"),
    [
        ({"num_ranks": 4, "tensor_parallel": 2}, [False] * 3),
        ({"num_ranks": 4, "tensor_parallel": 2, "data_parallel": 4}, [True] * 3),
        (
            {
                "num_ranks": 4,
                "tensor_parallel": 2,
                "data_parallel": 4,
                "use_tp_pp_dp_mapping": True,
            },
            [False] * 3,
        ),
        (
            {"num_ranks": 4, "tensor_parallel": 4, "use_tp_pp_dp_mapping": True},
            [False, True, False],
        ),
    ],
)
def test_stages_on_other_nodes_are_reached_over_the_network(options, leaves):
    layout = Layout(layers_per_stage=(1,) * 4, **options)
    assert [layout.leaves_node(stage, per_node=8) for stage in range(3)] == leaves
    size = 10 / options["tensor_parallel"] * 2 * 8
    # Links carry 0.8 of their rate, after 15 microseconds.
    expected = [15e-6 + size / 0.8 / (50e9 if leaving else 450e9) for leaving in leaves]
    assert costs_of(layout).transfer_s == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(layers_per_stage=(1, 1, 1), num_ranks=2), "has 3 stages, allowed: as many"),
        (lambda: Layout(layers_per_stage=(1,), num_ranks=0), "num_ranks 0 is out of range"),
        (lambda: Layout(layers_per_stage=(1, -1), num_ranks=2), "is out of range, allowed: 0 or"),
        (
            lambda: costs_of(Layout(layers_per_stage=(2, 3), num_ranks=2)),
            "has 5 layers, allowed: the 4 of the model",
        ),
        (
            lambda: costs_of(
                Layout(layers_per_stage=(2, 2), num_ranks=2),
                exits=EarlyExitConfig(exit_layer_nums=(5,)),
            ),
            "--exit-layer-nums 5 is out of range, allowed: 1 to 4",
        ),
        (
            lambda: TrainingOptions(gradient_bytes=1),
            "gradient_bytes 1 is out of range, allowed: 2 to 4",
        ),
        (
            lambda: Layout(layers_per_stage=(1,), num_ranks=1, context_parallel=0),
            "context_parallel 0 is out of range, allowed: 1 or more",
        ),
        (lambda: replace(TINY, vocab_size=0), "vocab_size 0 is out of range, allowed: 1 or more"),
        (lambda: ExitExecution(chunk_tokens=0), "chunk_tokens 0 is out of range"),
        (
            lambda: ExitExecution(deferred=False, chunk_tokens=8),
            "chunk_tokens 8 has no effect unless exits are deferred",
        ),
        (
            lambda: HardwareTimes(TINY, NONE, ACCELERATORS["h100"], achieved_share=1.5),
            "achieved_share 1.5 is out of range, allowed: above 0, up to 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
