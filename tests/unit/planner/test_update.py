"""What a step takes beside its pipeline, by hand."""

from dataclasses import replace

import pytest

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.costs.cost_model import CostModel, StageCost
from megatron.early_exit.planner.costs.hardware import ACCELERATORS
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.training_options import TrainingOptions
from megatron.early_exit.planner.costs.update import Overlap, Update, update_costs

H100 = ACCELERATORS["h100"]
TINY = ModelShape.llama(
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    vocab_size=100,
    seq_length=10,
    share_embeddings_and_output_weights=True,
)
NONE = EarlyExitConfig()
PROJECTION = 100 * 8
# Bandwidth of the memory that programs reach.
MEMORY = 0.85 * 3.35e12


def sent_s(num_bytes: float, link: float) -> float:
    """Seconds on a link that carries 0.8 of its rate, after 15 microseconds."""
    return 15e-6 + num_bytes / (0.8 * link)


def layout(replicas: int, tensor: int = 1, ranks: int = 2, mapping: bool = False) -> Layout:
    return Layout(
        layers_per_stage=(4 // ranks,) * ranks,
        num_ranks=ranks,
        tensor_parallel=tensor,
        data_parallel=replicas,
        use_tp_pp_dp_mapping=mapping,
    )


def test_a_single_replica_has_nothing_to_exchange():
    update = update_costs(TINY, layout(1, ranks=1), H100, NONE)
    assert (update.reduce_s, update.gather_s, update.embedding_s) == ((0,), (0,), 0)
    weights = 4 * TINY.layer_weights + PROJECTION
    # Zeroed gradients, and 34 bytes for the norm and the update, at 0.85 of the bandwidth.
    assert update.optimizer_s == pytest.approx((weights * 38 / MEMORY,))


def test_replicas_exchange_gradients_and_weights():
    weights = 2 * TINY.layer_weights + PROJECTION
    update = update_costs(TINY, layout(4), H100, NONE)
    assert update.reduce_s == pytest.approx((sent_s(weights * 4 * 3 / 4, 450e9),) * 2)
    assert update.gather_s == pytest.approx((sent_s(weights * 2 * 3 / 4, 450e9),) * 2)
    assert update.optimizer_s == pytest.approx((weights * (4 + 34 / 4) / MEMORY,) * 2)


def test_without_the_distributed_optimizer_all_replicas_update_all_weights():
    weights = 2 * TINY.layer_weights + PROJECTION
    options = TrainingOptions(distributed_optimizer=False, gradient_bytes=2)
    update = update_costs(TINY, layout(4), H100, NONE, options)
    # An all-reduce of bf16 gradients.
    assert update.reduce_s == pytest.approx((2 * sent_s(weights * 2 * 3 / 4, 450e9),) * 2)
    assert update.gather_s == (0, 0)
    assert update.optimizer_s == pytest.approx((weights * 38 / MEMORY,) * 2)


def test_partners_of_a_sequence_have_the_same_weights():
    one = replace(layout(2), context_parallel=2)
    assert update_costs(TINY, one, H100, NONE) == update_costs(TINY, layout(4), H100, NONE)


def test_more_nodes_wait_for_the_slowest():
    few, many = (update_costs(TINY, layout(n), H100, NONE) for n in (4, 1024))
    assert few.slowdown == 1
    # 256 nodes: eight doublings of half a percent.
    assert many.slowdown == pytest.approx(1.04)
    step_s = replace(UPDATE, fixed_s=0.02, slowdown=1.04).step_s(COSTS, STARTS, ENDS, Overlap())
    assert step_s == pytest.approx(1.04 * (UPDATE.step_s(COSTS, STARTS, ENDS, Overlap()) + 0.02))


@pytest.mark.parametrize(
    ("options", "on_node"),
    [
        # 16 neighbours: 8 of them use the 8 ports of their node.
        ({"replicas": 16}, 8),
        ({"replicas": 16, "tensor": 4}, 2),
        ({"replicas": 16, "tensor": 8}, 1),
        ({"replicas": 16, "mapping": True}, 4),
        ({"replicas": 16, "tensor": 4, "mapping": True}, 1),
    ],
)
def test_replicas_on_many_nodes_share_their_ports(options, on_node):
    one = layout(**options)
    weights = (2 * TINY.layer_weights + PROJECTION) / one.tensor_parallel
    link = min(on_node * 50e9, 450e9)
    expected = sent_s(weights * 4 * 15 / 16, link)
    assert update_costs(TINY, one, H100, NONE).reduce_s == pytest.approx((expected,) * 2)


def test_tied_embeddings_are_summed_over_their_stages():
    size = PROJECTION * 4
    near = update_costs(TINY, layout(1), H100, NONE).embedding_s
    assert near == pytest.approx(sent_s(size, 450e9))
    tied = EarlyExitConfig(exit_layer_nums=(2,))
    four = Layout(layers_per_stage=(1,) * 4, num_ranks=4, data_parallel=8)
    # Stages 0, 1 and 3, in different nodes by Megatron's default order.
    far = update_costs(TINY, four, H100, tied).embedding_s
    assert far == pytest.approx(sent_s(2 * 2 / 3 * size, 50e9))


# --- when it is done -----------------------------------------------------------------------------

UPDATE = Update(reduce_s=(4.0, 6.0), embedding_s=0.5, optimizer_s=(1.0, 2.0), gather_s=(3.0, 5.0))
COSTS = CostModel(
    stages=(StageCost(forward_s=1.0, backward_s=2.0), StageCost(forward_s=1.5, backward_s=3.0)),
    transfer_s=(0.0,),
)
STARTS, ENDS = (0.0, 1.0), (20.0, 18.0)


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        # Reduced at 24 in either rank; gathered 4 after the next step could have begun.
        (Overlap(grad_reduce=False), 24 + 0.5 + 2 + 4),
        # Rank 0 begins to reduce at 18, rank 1 at 15.
        (Overlap(), 22 + 0.5 + 2 + 4),
        # Beside the first forwards: 3 - 1 are left of rank 0, 5 - 1 - 1.5 of rank 1.
        (Overlap(param_gather=True), 22 + 0.5 + 2 + 2.5),
    ],
)
def test_communication_runs_beside_computations(overlap, expected):
    assert UPDATE.step_s(COSTS, STARTS, ENDS, overlap) == pytest.approx(expected)


def test_chunks_are_reduced_beside_backwards_of_earlier_ones():
    stages = (StageCost(forward_s=1.0, backward_s=2.0),) * 4
    costs = CostModel(stages=stages, transfer_s=(0.0,) * 3)
    nothing = {"embedding_s": 0.0, "optimizer_s": (0.0, 0.0), "gather_s": (0.0, 0.0)}
    # Stage 2 has two backwards of stage 0 behind its own: it begins 2 + 2 x 2 before the end.
    update = Update(reduce_s=(1.0, 0.0, 5.0, 0.0), **nothing)
    assert update.step_s(costs, (0, 0), (20, 20), Overlap()) == pytest.approx(20)
    late = Update(reduce_s=(1.0, 0.0, 7.0, 0.0), **nothing)
    assert late.step_s(costs, (0, 0), (20, 20), Overlap()) == pytest.approx(22)
