"""What the platform finds, defaults and refuses."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import replace as changed

import pytest
import torch

from megatron.early_exit import platform
from megatron.early_exit.platform.machine import Platform

MACHINE = platform.prepare()
GPU = Platform(
    device="cuda",
    backend="nccl",
    transformer_engine=True,
    apex=True,
    num_devices=8,
    compiled_fusions=True,
)
NO_APEX = changed(GPU, apex=False)
BARE_GPU = changed(GPU, transformer_engine=False, apex=False)
CPU = changed(BARE_GPU, device="cpu", backend="gloo", compiled_fusions=False)


def parse(machine: Platform, *flags: str):
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    platform.set_argument_defaults(parser, machine)
    return parser.parse_args(flags)


def test_one_line_tells_what_was_chosen() -> None:
    assert CPU.describe() == (
        "platform: cpu, gloo, local layers (PyTorch attention and norms), no compiled fusions"
    )
    assert GPU.describe() == ("platform: cuda, nccl, Transformer Engine layers, compiled fusions")


def test_preparing_again_changes_nothing() -> None:
    before = torch.zeros, torch.cuda.device_count
    assert platform.prepare() is MACHINE
    assert (torch.zeros, torch.cuda.device_count) == before


def test_defaults_on_a_cpu() -> None:
    args = parse(CPU)
    assert args.distributed_backend == "gloo"
    assert args.transformer_impl == "local"
    assert args.no_persist_layer_norm
    fusions = {name for name, on in vars(args).items() if name.endswith("_fusion") and on is True}
    assert fusions == {"gradient_reduce_div_fusion"}
    platform.check_arguments(args, CPU)


def test_defaults_on_a_gpu() -> None:
    bare, full, no_apex = parse(BARE_GPU), parse(GPU), parse(NO_APEX)
    assert bare.distributed_backend == full.distributed_backend == "nccl"
    assert (bare.transformer_impl, full.transformer_impl) == ("local", "transformer_engine")
    assert bare.bias_swiglu_fusion
    assert full.bias_swiglu_fusion
    assert not bare.gradient_accumulation_fusion
    assert full.gradient_accumulation_fusion
    # Megatron's own output projection insists on Apex where this is on.
    assert not no_apex.gradient_accumulation_fusion
    platform.check_arguments(bare, BARE_GPU)
    platform.check_arguments(full, GPU)


def test_defaults_for_flags_that_megatron_dropped_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="transformer_impl"):
        platform.set_argument_defaults(ArgumentParser(), CPU)


@pytest.mark.parametrize(
    ("flags", "machine"),
    [
        ("--transformer-impl transformer_engine", CPU),
        ("--transformer-impl transformer_engine", BARE_GPU),
        ("--distributed-backend nccl", CPU),
        ("--fp8-format hybrid", BARE_GPU),
        ("--context-parallel-size 2", CPU),
        ("--moe-grouped-gemm", CPU),
        ("--tp-comm-overlap", BARE_GPU),
        ("--cuda-graph-impl local", CPU),
        ("--use-torch-fsdp2", CPU),
        ("--te-rng-tracker", CPU),
        ("--attention-backend flash", CPU),
        ("--attention-backend flash", BARE_GPU),
        ("--use-nccl-ub", CPU),
        ("--optimizer-cpu-offload", CPU),
        ("--optimizer-cuda-graph", CPU),
        ("--profile", CPU),
        ("--record-memory-history", CPU),
        ("--use-megatron-fsdp", CPU),
    ],
)
def test_flags_that_the_machine_cannot_serve_are_refused(flags: str, machine: Platform) -> None:
    with pytest.raises(ValueError, match=f"{flags} needs a GPU.*which this machine lacks"):
        platform.check_arguments(parse(machine, *flags.split()), machine)
    platform.check_arguments(parse(GPU, *flags.split()), GPU)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with pytest.raises(ValueError, match=r"--nproc-per-node 9 is out of range, allowed: 1 to 8"):
        platform.check_arguments(parse(GPU), GPU)
    platform.check_arguments(parse(CPU), changed(CPU, num_devices=1024))


def test_flags_of_transformer_engine_are_refused_for_local_layers() -> None:
    flags = ["--transformer-impl", "local", "--context-parallel-size", "2"]
    with pytest.raises(ValueError, match="needs --transformer-impl transformer_engine"):
        platform.check_arguments(parse(GPU, *flags), GPU)


def test_experts_with_biases_are_refused() -> None:
    flags = ["--num-experts", "2"]
    with pytest.raises(ValueError, match=r"--num-experts 2 .* needs --disable-bias-linear"):
        platform.check_arguments(parse(CPU, *flags), CPU)
    platform.check_arguments(parse(CPU, *flags, "--disable-bias-linear"), CPU)
    platform.check_arguments(parse(GPU, *flags), GPU)
