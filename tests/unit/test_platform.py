"""What the platform finds, emulates, defaults, refuses and silences."""

from __future__ import annotations

import logging
import types
import warnings
from argparse import ArgumentParser
from dataclasses import replace as changed

import pytest
import torch

from megatron.early_exit import platform
from megatron.early_exit.platform.machine import Platform
from megatron.early_exit.platform.quiet import LOG_RECORDS, WARNINGS, silence
from megatron.early_exit.platform.replace import replace

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

on_cpu = pytest.mark.skipif(
    MACHINE.device != "cpu", reason="only a machine without CUDA is changed"
)


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


@on_cpu
def test_cuda_calls_of_megatron_have_answers_on_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.cuda.current_device()).cuda().device.type == "cpu"
    assert torch.nn.Linear(1, 1).cuda(torch.cuda.current_device()).weight.device.type == "cpu"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert isinstance(torch.ones(1), torch.cuda.FloatTensor)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.Event(enable_timing=True).record()
    assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated() // 2 > 0


@on_cpu
def test_cuda_random_state_is_the_cpus() -> None:
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


@on_cpu
def test_everybody_else_still_learns_that_there_is_no_cuda() -> None:
    assert not torch.cuda.is_available()
    assert not torch.accelerator.is_available()


def test_operations_are_not_intercepted() -> None:
    """The replaced functions are factories; operations remain torch's built-in ones."""
    assert isinstance(torch.add, types.BuiltinFunctionType)
    assert isinstance(torch.matmul, types.BuiltinFunctionType)
    assert not torch.overrides._get_current_function_mode_stack()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_device_contexts_still_say_where_tensors_are_made() -> None:
    with torch.device("meta"):
        made = [torch.ones(2), torch.empty(2), torch.zeros(2), torch.rand(2), torch.tensor([1.0])]
    assert all(tensor.is_meta for tensor in made)


def test_the_absence_of_what_is_replaced_is_an_error() -> None:
    owner = types.SimpleNamespace(present=1)
    replace(owner, "present", 2)
    assert owner.present == 2
    with pytest.raises(RuntimeError, match=r"no attribute 'gone'"):
        replace(owner, "gone", 2)


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
    with pytest.raises(ValueError, match=r"--nproc-per-node 9 of torchrun .* 1 to 8"):
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


def test_listed_warnings_are_silent_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence()
        for start in WARNINGS:
            warnings.warn(f"{start} and so on", stacklevel=1)
        warnings.warn("Only 3 GB are left on the disk", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["Only 3 GB are left on the disk"]


def test_listed_log_records_are_silent_and_others_are_not() -> None:
    for name, start in LOG_RECORDS:
        logger = logging.getLogger(name)
        shown: list[str] = []
        # Not by caplog: torch's loggers of some releases hand nothing on to the root's.
        handler = logging.Handler()
        handler.emit = lambda record, shown=shown: shown.append(record.getMessage())  # type: ignore[method-assign, misc]
        logger.addHandler(handler)
        try:
            logger.warning("%s and so on", start)
            logger.warning("Something else")
        finally:
            logger.removeHandler(handler)
        assert shown == ["Something else"], name
