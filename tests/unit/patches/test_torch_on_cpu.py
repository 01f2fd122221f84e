"""Torch answers Megatron on a machine without CUDA, and everybody else as before."""

from __future__ import annotations

import types

import pytest
import torch

from megatron.early_exit import platform

on_cpu = pytest.mark.skipif(
    platform.prepare().device != "cpu", reason="only a machine without CUDA is changed"
)


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
