"""The flags of plans, as Megatron reads and checks them."""

import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron.early_exit import platform

MACHINE = platform.prepare()

from megatron.core.transformer.enums import LayerType  # noqa: E402
from megatron.core.transformer.transformer_block import get_num_layers_to_build  # noqa: E402
from megatron.training.arguments import (  # noqa: E402
    core_transformer_config_from_args,
    parse_args,
    validate_args,
)

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.planner.command_line.model_flags import placements  # noqa: E402
from megatron.early_exit.planner.command_line.plan_flags import flags, one_flag_a_line  # noqa: E402
from megatron.early_exit.planner.costs.hardware import ACCELERATORS  # noqa: E402
from megatron.early_exit.planner.costs.model_shape import ModelShape  # noqa: E402
from megatron.early_exit.planner.costs.training_options import FP8, TrainingOptions  # noqa: E402
from megatron.early_exit.planner.costs.update import Overlap  # noqa: E402
from megatron.early_exit.planner.named_models import NAMED_MODELS  # noqa: E402
from megatron.early_exit.planner.search.filling import FillRequest, fill_bubbles  # noqa: E402
from megatron.early_exit.planner.search.plans import Plan, find_plans  # noqa: E402
from megatron.early_exit.planner.search.request import PlanRequest  # noqa: E402
from megatron.early_exit.training.cli.arguments import add_early_exit_arguments  # noqa: E402
from megatron.early_exit.training.loop.exit_stages import exit_stages  # noqa: E402
from megatron.early_exit.training.loop.filling_options import FillingOptions  # noqa: E402
from tests.helpers.speed import patient  # noqa: E402

Parse = Callable[[list[str], int], Namespace]
GPUS = 64


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Parses and checks flags as a run on so many GPUs does, without starting any process."""

    def add(parser: ArgumentParser) -> ArgumentParser:
        add_early_exit_arguments(parser)
        platform.set_argument_defaults(parser, MACHINE)
        return parser

    def run(words: list[str], gpus: int) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["pretrain", *words])
        monkeypatch.setenv("WORLD_SIZE", str(gpus))
        monkeypatch.setenv("RANK", "0")
        # For --moe-grouped-gemm.
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        args = parse_args(add)
        validate_args(args)
        return args

    return run


def request_of(name: str, **more) -> PlanRequest:
    model = NAMED_MODELS[name]
    return PlanRequest(
        shape=model.shape,
        placements=placements(model.exits, model.shape.num_layers),
        accelerator=ACCELERATORS["a100-80gb"],
        num_accelerators=GPUS,
        global_batch_size=model.global_batch_size,
        memory_limit_bytes=72e9,
        **more,
    )


def model_flags(shape: ModelShape) -> list[str]:
    words = (
        f"--num-layers {shape.num_layers} --hidden-size {shape.hidden_size} "
        f"--ffn-hidden-size {shape.ffn_hidden_size} --seq-length {shape.seq_length} "
        f"--num-attention-heads {shape.num_attention_heads} --bf16 --lr 1e-4 "
        f"{'--swiglu' if shape.gated_linear_unit else '--squared-relu'} "
        f"--group-query-attention --num-query-groups {shape.num_query_groups} "
        f"--kv-channels {shape.kv_channels} "
        f"--max-position-embeddings {shape.seq_length} --train-iters 10 --normalization RMSNorm"
    )
    if (experts := shape.experts) is not None:
        words += f" --num-experts {experts.num_experts} --moe-router-topk {experts.moe_router_topk}"
        words += f" --moe-ffn-hidden-size {experts.moe_ffn_hidden_size} --disable-bias-linear"
    return words.split()


def check(plan: Plan, request: PlanRequest, parse: Parse) -> Namespace:
    """What Megatron makes of a plan's flags has to be the plan."""
    words = flags(plan, request)
    assert shlex.split(one_flag_a_line(words).replace("\\\n", " ")) == words
    args = parse([*model_flags(request.shape), *words], request.num_accelerators)
    one, layout = plan.costing.candidate, plan.costing.candidate.layout
    assert args.tensor_model_parallel_size == layout.tensor_parallel
    assert args.sequence_parallel == (layout.tensor_parallel > 1)
    assert args.pipeline_model_parallel_size == layout.num_ranks
    assert (args.virtual_pipeline_model_parallel_size or 1) == one.num_chunks
    assert args.data_parallel_size == layout.data_parallel
    assert args.use_tp_pp_dp_mapping == layout.use_tp_pp_dp_mapping
    assert args.use_distributed_optimizer
    per_step = layout.data_parallel * args.micro_batch_size * one.num_microbatches
    assert args.global_batch_size == per_step
    assert EarlyExitConfig.from_attributes(args) == one.exits
    assert layers_that_megatron_builds(args) == layout.layers_per_stage
    if request.shape.experts is not None:
        assert args.expert_model_parallel_size == layout.expert_parallel
        assert args.expert_tensor_parallel_size == layout.expert_tensor_parallel
        assert (args.moe_token_dispatcher_type, args.moe_grouped_gemm) == ("alltoall", True)
    return args


def layers_that_megatron_builds(args: Namespace) -> tuple[int, ...]:
    config = core_transformer_config_from_args(args)
    chunks = args.virtual_pipeline_model_parallel_size or 1
    ranks = range(args.pipeline_model_parallel_size)
    if config.pipeline_model_parallel_layout is not None:
        stages = config.pipeline_model_parallel_layout.layout
        return tuple(
            stages[rank][chunk].count(LayerType.decoder)
            for chunk in range(chunks)
            for rank in ranks
        )
    whole_ranks = replace(config, virtual_pipeline_model_parallel_size=None)
    return tuple(
        get_num_layers_to_build(whole_ranks, pp_rank=rank) // chunks
        for _ in range(chunks)
        for rank in ranks
    )


@pytest.mark.parametrize(("name", "tensor"), [("1.3b", 1), ("30b", 2)])
def test_megatron_accepts_every_plan(name, tensor, parse):
    overlap = Overlap(grad_reduce=True, param_gather=True)
    request = request_of(name, overlap=overlap, tensor_parallel=tensor)
    plans = find_plans(request, 3, every_variant=True).best
    plans += find_plans(replace(request, num_chunks=1), 3).best
    assert {plan.costing.candidate.num_chunks > 1 for plan in plans} == {True, False}
    for plan in plans:
        args = check(plan, request, parse)
        assert args.overlap_grad_reduce
        assert args.overlap_param_gather


def test_megatron_accepts_options_of_training(parse):
    options = TrainingOptions(overlaps_messages=False, gradient_bytes=2, tp_comm_overlap=True)
    request = request_of(
        "30b", recomputes=("full",), context_parallel=2, tensor_parallel=4, options=options
    )
    (plan,) = find_plans(request, 1).best
    args = check(plan, request, parse)
    assert args.context_parallel_size == 2
    assert (args.recompute_granularity, args.recompute_num_layers) == ("full", 1)
    assert args.grad_reduce_in_bf16
    assert args.tp_comm_overlap
    selective = replace(request, recomputes=("selective",))
    (plan,) = find_plans(selective, 1).best
    assert check(plan, selective, parse).recompute_granularity == "selective"


LLAMA_405B = ModelShape.llama(
    num_layers=126,
    hidden_size=16384,
    ffn_hidden_size=53248,
    num_attention_heads=128,
    num_query_groups=8,
    vocab_size=128256,
    seq_length=8192,
)
NEMOTRON_340B = ModelShape.llama(
    num_layers=96,
    hidden_size=18432,
    ffn_hidden_size=73728,
    num_attention_heads=96,
    num_query_groups=8,
    vocab_size=256000,
    seq_length=4096,
    gated_linear_unit=False,
)
QWEN3_32B = ModelShape.llama(
    num_layers=64,
    hidden_size=5120,
    ffn_hidden_size=25600,
    num_attention_heads=64,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
    seq_length=4096,
)


def h100_request(shape: ModelShape, gpus: int, batch: int, *exits: int, **more) -> PlanRequest:
    return PlanRequest(
        shape=shape,
        placements=placements(EarlyExitConfig(exit_layer_nums=exits), shape.num_layers),
        accelerator=ACCELERATORS["h100"],
        num_accelerators=gpus,
        global_batch_size=batch,
        memory_limit_bytes=72e9,
        recomputes=("none", "full"),
        **more,
    )


@pytest.mark.parametrize(
    ("shape", "gpus", "batch"),
    [
        (LLAMA_405B, 4096, 1024),
        (LLAMA_405B, 16384, 2048),
        (NEMOTRON_340B, 128, 32),
        (QWEN3_32B, 64, 512),
        (NAMED_MODELS["qwen3-235b-a22b"].shape, 512, 2048),
    ],
    ids=["405B on 4,096", "405B on 16,384", "340B on 128", "32B on 64", "235B mixture on 512"],
)
def test_published_models_are_planned_in_seconds(shape, gpus, batch, parse):
    request = h100_request(shape, gpus, batch)
    begin = time.monotonic()
    best = find_plans(request, 3).best
    assert time.monotonic() - begin < patient(30)
    assert len(best) == 3
    for plan in best:
        check(plan, request, parse)
    if shape is LLAMA_405B:
        assert not any(plan.costing.candidate.layout.is_even for plan in best)


def test_megatron_accepts_experts_with_exits_and_fp8(parse, monkeypatch):
    # Transformer Engine's, which is not installed here.
    checked = "megatron.core.transformer.transformer_config.is_te_min_version"
    monkeypatch.setattr(checked, lambda *_, **__: True)
    fp8 = FP8(format="hybrid", recipe="tensorwise", param_gather=True)
    request = h100_request(
        *(NAMED_MODELS["qwen3-235b-a22b"].shape, 512, 2048, 23, 47),
        tensor_parallel=2,
        pipeline_parallel=8,
        num_chunks=1,
        expert_parallel=8,
        expert_tensor_parallel=2,
        options=TrainingOptions(fp8=fp8),
    )
    (plan,) = find_plans(request, 1).best
    args = check(plan, request, parse)
    assert (args.fp8, args.fp8_recipe, args.fp8_param_gather) == ("hybrid", "tensorwise", True)


@pytest.mark.parametrize("pre_exit", [False, True])
def test_exits_are_on_the_stages_where_training_has_them(pre_exit, parse):
    fixed = {"tensor_parallel": 8, "pipeline_parallel": 16, "num_chunks": 1}
    request = h100_request(LLAMA_405B, 4096, 1024, 32, 64, **fixed)
    request = replace(request, placements=(request.placements[pre_exit],))
    (plan,) = find_plans(request, 1).best
    exits, layout = plan.costing.candidate.exits, plan.costing.candidate.layout
    assert exits.pre_exit == pre_exit
    assert not layout.is_even
    args = check(plan, request, parse)
    assert exit_stages(args, exits) == frozenset(exits.stages(layout.layers_per_stage))


def test_fills_have_flags(parse):
    request = request_of(
        "30b", num_chunks=1, pipeline_parallel=4, tensor_parallel=2, microbatch_size=1
    )
    (plan,) = fill_bubbles(
        find_plans(request, 1).best, FillRequest(backward_forward_ratio=2.0), 72e9
    )
    args = check(plan, request, parse)
    options = FillingOptions.from_attributes(args)
    assert options.fill_explicit_bubbles
    # They come on top of the batch, as the plan has them.
    assert options.fill_samples == "extra"
    one = plan.costing.candidate
    stages = frozenset(one.exits.stages(one.layout.layers_per_stage))
    places = options.places(4, stages, 2.0)
    assert (places.num_warmup_fills, places.num_cooldown_fills) == (2, 2)
    assert (plan.fills.num_warmup, plan.fills.num_cooldown) == (2, 2)
