"""Mixtures of experts, by hand: what their layers take, keep, send and exchange."""

import json
from dataclasses import replace

import pytest

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.planner.command_line.model_flags import read_model
from megatron.early_exit.planner.costs.exchanges import Exchanges
from megatron.early_exit.planner.costs.experts import Experts
from megatron.early_exit.planner.costs.hardware import ACCELERATORS
from megatron.early_exit.planner.costs.layout import Layout, stage_expert_weights, stage_weights
from megatron.early_exit.planner.costs.model_costs import ExitExecution, model_costs
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.training_options import DEFAULT_OPTIONS
from megatron.early_exit.planner.costs.update import update_costs
from megatron.early_exit.planner.named_models import NAMED_MODELS
from megatron.early_exit.planner.search.candidates import candidates
from megatron.early_exit.planner.search.plans import find_plans
from megatron.early_exit.planner.search.prediction import Costing, Fills
from megatron.early_exit.planner.search.request import PlanRequest
from tools.plan_pipeline import build_parser, main

H100 = ACCELERATORS["h100"]
NONE = EarlyExitConfig()
EXPERTS = Experts(num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=1024)
MIXTURE = ModelShape.llama(
    num_layers=8,
    hidden_size=2048,
    ffn_hidden_size=1024,
    num_attention_heads=16,
    num_query_groups=4,
    vocab_size=32000,
    seq_length=2048,
    experts=EXPERTS,
)
ATTENTION = 2048 * (2048 + 2048 + 2 * 512)
EXPERT = 3 * 2048 * 1024


def layout(**sizes: int) -> Layout:
    return Layout(layers_per_stage=(8,), num_ranks=1, **sizes)


def stage(shape: ModelShape = MIXTURE, **sizes: int):
    (only,) = model_costs(shape, layout(**sizes), H100, NONE, ExitExecution()).stages
    return only


def test_published_sizes():
    """235 billion weights, of which 22 are used for each token."""
    shape = NAMED_MODELS["qwen3-235b-a22b"].shape
    outer = 2 * shape.projection_weights
    assert shape.num_layers * shape.layer_weights + outer == pytest.approx(235e9, rel=0.005)
    assert shape.num_layers * shape.used_layer_weights + outer == pytest.approx(22e9, rel=0.015)


def test_weights_are_where_they_belong():
    one = layout(tensor_parallel=2, data_parallel=4, expert_parallel=4, expert_tensor_parallel=1)
    assert stage_expert_weights(MIXTURE, one) == (8 * 2 * EXPERT,)
    projections = 2 * 32000 * 2048
    # Each accelerator has the whole router.
    expected = (8 * ATTENTION + projections) / 2 + 8 * 2048 * 8
    assert stage_weights(MIXTURE, one, NONE) == (expected,)
    shared = replace(MIXTURE, experts=replace(EXPERTS, moe_shared_expert_intermediate_size=512))
    assert stage_weights(shared, one, NONE)[0] - expected == 8 * 3 * 2048 * 512 / 2
    # Two accelerators have the same experts, and eight the same attention... of four replicas.
    assert (one.num_replicas, one.num_expert_replicas) == (4, 2)
    costs = stage(tensor_parallel=2, data_parallel=4, expert_parallel=4)
    static = expected * (6 + 12 / 4) + 8 * 2 * EXPERT * (6 + 12 / 2)
    assert costs.static_bytes == pytest.approx(static)


def test_a_mixture_takes_the_products_of_the_experts_of_a_token():
    """With as many tokens for each expert as a wide MLP has, beside copies and the router."""
    wide = replace(MIXTURE, experts=None, ffn_hidden_size=2 * 1024, seq_length=16384)
    mixture = replace(MIXTURE, seq_length=16384)
    dense_s, experts_s = stage(wide).forward_s, stage(mixture).forward_s
    assert dense_s < experts_s < 1.6 * dense_s
    copied = 8 * 16384 * 2 * 2048 * 8 / (0.85 * 3.35e12)
    assert experts_s - dense_s > copied
    every = replace(mixture, experts=replace(EXPERTS, moe_router_topk=4))
    products_s = 8 * 2 * 2 * EXPERT * 16384 / (0.7 * 989e12)
    assert stage(every).forward_s - experts_s > products_s + copied


def test_few_tokens_for_each_expert_are_slow():
    many = replace(MIXTURE, experts=replace(EXPERTS, num_experts=512))
    assert stage(many).forward_s > 1.2 * stage().forward_s
    # With more accelerators each expert gets more of them.
    spread = stage(many, data_parallel=8, expert_parallel=8)
    assert spread.backward_s < stage(many).backward_s


def test_copies_are_kept():
    narrow = replace(MIXTURE, experts=replace(EXPERTS, moe_router_topk=1))
    # A copy's hidden state, gate, up and their product, in bf16, in each layer.
    expected = 8 * 2048 * 2 * (2048 + 3 * 1024)
    assert stage().activation_bytes - stage(narrow).activation_bytes == expected
    shared = stage(tensor_parallel=2, expert_tensor_parallel=2)
    alone = stage(tensor_parallel=2, data_parallel=1, expert_parallel=2)
    # Both partners have the input of an expert that they share.
    assert shared.activation_bytes - alone.activation_bytes == 8 * 1024 * 2 * 2 * 2048


@pytest.mark.parametrize(
    ("sizes", "near", "far"),
    [
        ({"data_parallel": 8, "expert_parallel": 8}, 7 / 8, 0),
        ({"data_parallel": 16, "expert_parallel": 16}, 7 / 16, 8 / 16),
        # Two of the groups are on a node.
        (
            {
                "tensor_parallel": 4,
                "data_parallel": 8,
                "expert_parallel": 8,
                "expert_tensor_parallel": 4,
            },
            1 / 8,
            6 / 8,
        ),
    ],
)
def test_tokens_are_sent_to_their_experts(sizes, near, far):
    def waits_s(one: Layout) -> float:
        exchanges = Exchanges(accelerator=H100, shape=MIXTURE, layout=one, options=DEFAULT_OPTIONS)
        return exchanges.layer_s(0.0)[0]

    one = layout(**sizes)
    together = replace(one, expert_parallel=1)
    copies = 2048 * 2 * 2 * 2048 / one.tensor_parallel
    expected = max(15e-6 + near * copies / (0.8 * 450e9), 15e-6 + far * copies / (0.8 * 50e9))
    # There and back.
    assert waits_s(one) - waits_s(together) == pytest.approx(2 * expected)


def test_an_oversubscribed_network_is_slow_beyond_a_leaf():
    one = layout(data_parallel=32, expert_parallel=32)
    slow = replace(H100, oversubscription=4.0, nodes_per_leaf=2)
    fast_s, slow_s, wide_s = (
        Exchanges(
            accelerator=accelerator, shape=MIXTURE, layout=one, options=DEFAULT_OPTIONS
        ).layer_s(0.0)[0]
        for accelerator in (H100, slow, replace(slow, nodes_per_leaf=4))
    )
    # 24 of 32 parts leave the node, 16 the leaf.
    part_s = 2048 * 2 * 2 * 2048 / 32 / (0.8 * 50e9)
    assert slow_s - fast_s == pytest.approx(2 * (16 * 4 - 24) * part_s)
    assert wide_s == fast_s
    # A ring leaves each leaf once, for both of its nodes, whose shares of the way out are added up.
    first_s, *others_s = (
        update_costs(MIXTURE, layout(data_parallel=32), accelerator, NONE).reduce_s[0]
        for accelerator in (
            *(H100, slow, replace(slow, nodes_per_leaf=1)),
            *(replace(slow, oversubscription=2.0), replace(slow, nodes_per_leaf=4)),
        )
    )
    assert [s / first_s for s in others_s] == pytest.approx([2, 4, 1, 1], rel=0.01)


def test_experts_are_reduced_among_their_own_replicas():
    one = layout(data_parallel=16, expert_parallel=8)
    update = update_costs(MIXTURE, one, H100, NONE)
    (experts,), (others,) = stage_expert_weights(MIXTURE, one), stage_weights(MIXTURE, one, NONE)
    # Two of the same experts, each on another node; all others on 8 ports of each.
    expected = 15e-6 + experts * 4 / 2 / (0.8 * 50e9)
    expected += 15e-6 + others * 4 * 15 / 16 / (0.8 * 400e9)
    assert update.reduce_s == pytest.approx((expected,))


# --- plans ---------------------------------------------------------------------------------------


def request_of(**more) -> PlanRequest:
    return PlanRequest(
        **{
            "shape": MIXTURE,
            "placements": (NONE,),
            "accelerator": H100,
            "num_accelerators": 8,
            "global_batch_size": 16,
            "memory_limit_bytes": 6e9,
            "pipeline_parallel": 2,
            "num_chunks": 1,
            **more,
        }
    )


def test_search_finds_what_trying_all_finds():
    request = request_of()
    best: dict[object, float] = {}
    wide = replace(request, memory_limit_bytes=1e12)
    tried = [Costing.of(one, wide) for one in candidates(wide)]
    for costing in tried:
        one, prediction = costing.candidate.layout, costing.predict(Fills())
        # Megatron's rules.
        assert 8 % one.expert_parallel == 0
        assert (one.num_replicas * one.tensor_parallel) % (
            one.expert_parallel * one.expert_tensor_parallel
        ) == 0
        assert one.expert_tensor_parallel in (1, one.tensor_parallel)
        if one.use_tp_pp_dp_mapping:
            assert one.expert_parallel * one.expert_tensor_parallel == one.tensor_parallel
        if prediction.peak_bytes <= request.memory_limit_bytes:
            best[one.tensor_parallel] = min(
                prediction.step_s, best.get(one.tensor_parallel, prediction.step_s)
            )
    plans = find_plans(request, 3)
    assert [plan.prediction.step_s for plan in plans.best] == pytest.approx(
        sorted(best.values())[:3]
    )
    # Costs of most need not be derived.
    assert plans.num_candidates < len(tried)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"expert_parallel": 3},
            "--expert-model-parallel-size 3 is out of range, allowed: divisors of --num-experts 8",
        ),
        (
            {"expert_tensor_parallel": 3},
            "--expert-tensor-parallel-size 3 is out of range, allowed: divisors of "
            "--moe-ffn-hidden-size 1024",
        ),
        (
            {"shape": replace(MIXTURE, experts=None), "expert_parallel": 2},
            "--expert-model-parallel-size 2 has no effect without --num-experts",
        ),
        (
            {"placements": (EarlyExitConfig(exit_layer_nums=(2,), use_exit_block=True),)},
            "--use-exit-block cannot be combined with --num-experts 8",
        ),
        ({"memory_limit_bytes": 1e8}, r"none of the layouts of 8 GPUs fits into 0\.1 GB each"),
    ],
)
def test_what_cannot_be_planned_is_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        find_plans(request_of(**changes), 1)


# --- descriptions --------------------------------------------------------------------------------

QWEN = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
TYPES = {"layer_types": ["linear_attention", "full_attention"]}
WITHOUT = {name: value for name, value in QWEN.items() if name not in ("num_experts",)}


def read(tmp_path, config: dict[str, object], words: str = "") -> Experts | None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = build_parser().parse_args([f"--config={tmp_path}", *words.split()])
    return read_model(args).shape.experts


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"sliding_window": 128, "use_sliding_window": False}, ""),
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}, ""),
        ({"sliding_window": 128}, "--seq-length 128"),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 4}, ""),
        ({"layer_types": None, "attn_layer_period": 1, "moe_num_experts": 0}, ""),
    ],
)
def test_entries_that_change_nothing_are_allowed(tmp_path, entries, words):
    assert read(tmp_path, QWEN | entries, words) == read(tmp_path, QWEN, words)


def test_mixtures_have_files(tmp_path):
    sizes = {"num_experts": 16, "moe_router_topk": 4, "moe_ffn_hidden_size": 128}
    assert read(tmp_path, QWEN) == Experts(**sizes)
    assert read(tmp_path, WITHOUT) is None
    shared = QWEN | {"shared_expert_intermediate_size": 512}
    assert read(tmp_path, shared) == Experts(**sizes, moe_shared_expert_intermediate_size=512)
    mixtral = {name: QWEN[name] for name in QWEN if name != "moe_intermediate_size"}
    mixtral |= {"num_experts": None, "num_local_experts": 8}
    expected = Experts(num_experts=8, moe_router_topk=4, moe_ffn_hidden_size=1024)
    assert read(tmp_path, mixtral) == expected
    routed = WITHOUT | {"n_routed_experts": 16, "n_shared_experts": 2}
    assert read(tmp_path, routed) == Experts(**sizes, moe_shared_expert_intermediate_size=256)
    changed = read(tmp_path, QWEN, "--moe-router-topk 2 --moe-ffn-hidden-size 64")
    assert changed == Experts(num_experts=16, moe_router_topk=2, moe_ffn_hidden_size=64)


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        (QWEN | {"kv_lora_rank": 512}, "", "kv_lora_rank 512: multi-latent attention is not mod"),
        (QWEN | {"first_k_dense_replace": 1}, "", "first_k_dense_replace 1: a mixture of diff"),
        (QWEN | {"mlp_only_layers": [1]}, "", "mlp_only_layers [1]: a mixture of different"),
        (QWEN | {"expert_layer_period": 2}, "", "expert_layer_period 2: a mixture of different"),
        (QWEN | {"attn_layer_period": 8}, "", "attn_layer_period 8: a mixture of different"),
        (WITHOUT | {"moe_num_experts": 64}, "", "moe_num_experts 64: a mixture of experts of this"),
        (WITHOUT | {"moe_k": 6}, "", "moe_k 6: a mixture of experts of this kind is not modelled"),
        (WITHOUT | {"mamba_d_state": 16}, "", "mamba_d_state 16: a state in place of attention"),
        (QWEN | {"sliding_window": 128}, "", "sliding_window 128: attention in a window is not"),
        (QWEN | TYPES, "", "layer_types with linear_attention: a mixture of different layers is"),
        (QWEN, "--moe-router-topk 17", "--moe-router-topk 17 is out of range, allowed: 1 to"),
        (WITHOUT, "--moe-router-topk 2", "--moe-router-topk 2 has no effect without --num-experts"),
        (QWEN, "--moe-layer-freq 2", "--moe-layer-freq 2 is not modelled"),
        (QWEN, "--moe-token-dispatcher-type flex", "--moe-token-dispatcher-type flex is not"),
        (QWEN, "--multi-latent-attention", "--multi-latent-attention is not modelled"),
        (
            QWEN,
            "--fill-explicit-bubbles",
            "--fill-explicit-bubbles cannot be combined with --num-experts 16, as in training",
        ),
        (QWEN, "--profile x.json", "--num-experts 16: profiles have dense models"),
        (QWEN, "--nodes-per-leaf 4", "--nodes-per-leaf 4 has no effect without --oversubscription"),
        (QWEN, "--oversubscription 0.5", "--oversubscription 0.5 is out of range, allowed: 1"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(tmp_path, capsys, config, words, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = [f"--config={tmp_path}", "--gpus", "8", "--global-batch-size", "8", *words.split()]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_what_is_modelled_of_such_a_flag_is_accepted(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    given = [f"--config={tmp_path}", "--gpus", "8", "--global-batch-size", "8", "--json"]
    assert main([*given, "--moe-token-dispatcher-type", "alltoall"]) == 0
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    assert " ".join(plan["flags"]).count("--moe-token-dispatcher-type alltoall") == 1
