"""How a request's accelerators can be divided: what divides them, the heads, experts and batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt

from megatron.early_exit.errors import FieldError, out_of_range
from megatron.early_exit.planner.search.request import PlanRequest
from megatron.early_exit.planner.search.stage_layers import chunk_numbers


@dataclass(frozen=True, kw_only=True)
class Division:
    """Sizes of a layout, whatever the layers of its stages.

    Attributes:
        tensor: accelerators that share each layer.
        context: accelerators that share the tokens of each sequence.
        pipeline: ranks of a pipeline.
        replicas: pipelines.
        chunks: stages of each rank.
        size: sequences of a microbatch.
        experts: groups of accelerators with other experts; 0 for a model without.
        expert_tensor: accelerators of such a group.
    """

    tensor: int
    context: int
    pipeline: int
    replicas: int
    chunks: int
    size: int
    experts: int = 0
    expert_tensor: int = 1

    @property
    def mappings(self) -> tuple[bool, ...]:
        """Whether ranks may be in the order of --use-tp-pp-dp-mapping, or not. Megatron has it only
        where experts are divided over as many accelerators as share a sequence."""
        of_sequence = self.tensor * self.context
        is_free = (
            not self.experts
            or self.pipeline == 1
            or self.experts * self.expert_tensor == of_sequence
        )
        return (False, True) if is_free else (False,)


def divisions(request: PlanRequest) -> Iterator[Division]:
    """All divisions of a request.

    Raises:
        ValueError: there is none; says what does not divide what.
    """
    found = False
    for one in _divisions(request):
        found = True
        yield one
    if not found:
        raise _why_none(request)


def _divisions(request: PlanRequest) -> Iterator[Division]:
    for tensor, context, pipeline in _models(request):
        replicas = request.num_accelerators // (tensor * context * pipeline)
        if request.global_batch_size % replicas:
            continue
        for size in _microbatch_sizes(request, request.global_batch_size // replicas):
            number = request.global_batch_size // replicas // size
            for chunks in _chunk_numbers(request, pipeline, number):
                for experts, expert_tensor in _expert_sizes(request, tensor, pipeline):
                    yield Division(
                        tensor=tensor,
                        context=context,
                        pipeline=pipeline,
                        replicas=replicas,
                        chunks=chunks,
                        size=size,
                        experts=experts,
                        expert_tensor=expert_tensor,
                    )


def _models(request: PlanRequest) -> Iterator[tuple[int, int, int]]:
    """Tensor, context and pipeline parallelism."""
    for context in request.context_sizes:
        for tensor in _tensor_sizes(request, context):
            for pipeline in _pipeline_sizes(request):
                if request.num_accelerators % (tensor * context * pipeline) == 0:
                    yield tensor, context, pipeline


def _tensor_sizes(request: PlanRequest, context: int) -> list[int]:
    """Tensor-parallel sizes that stay on a node and divide the heads and what else is divided."""
    shape = request.shape
    tokens = shape.seq_length // context
    divided = shape.num_query_groups, shape.num_attention_heads, shape.shared_mlp_size
    return [
        size
        for size in _divisors(request.accelerator.per_node)
        if all(number % size == 0 for number in (*divided, tokens))
        and request.tensor_parallel in (None, size)
    ]


def _pipeline_sizes(request: PlanRequest) -> list[int]:
    """Pipeline-parallel sizes that divide the accelerators and have a layer for each stage."""
    given = request.pipeline_parallel
    sizes = _divisors(request.num_accelerators) if given is None else (given,)
    return [size for size in sizes if size <= request.shape.num_layers]


def _expert_sizes(request: PlanRequest, tensor: int, pipeline: int) -> list[tuple[int, int]]:
    """Groups with other experts, and accelerators of each: one, or as many as share a layer."""
    experts = request.shape.experts
    if experts is None:
        return [(0, 1)]
    of_stage = request.num_accelerators // pipeline
    shared_by = {1, tensor}
    if request.expert_tensor_parallel is not None:
        shared_by = {request.expert_tensor_parallel}
    given = request.expert_parallel
    groups = [size for size in _divisors(experts.num_experts) if given in (None, size)]
    return [
        (size, expert_tensor)
        for expert_tensor in sorted(shared_by)
        if experts.moe_ffn_hidden_size % expert_tensor == 0
        for size in groups
        if of_stage % (size * expert_tensor) == 0
    ]


def _microbatch_sizes(request: PlanRequest, of_replica: int) -> list[int]:
    if request.microbatch_size is not None:
        return [] if of_replica % request.microbatch_size else [request.microbatch_size]
    powers = [2**i for i in range(of_replica.bit_length())]
    return [size for size in powers if of_replica % size == 0]


def _chunk_numbers(request: PlanRequest, pipeline: int, num_microbatches: int) -> list[int]:
    # Megatron interleaves groups of as many microbatches as there are ranks.
    is_interleaved = pipeline > 1 and num_microbatches % pipeline == 0
    if request.num_chunks is None:
        return chunk_numbers(request.shape.num_layers, pipeline) if is_interleaved else [1]
    most = request.shape.num_layers // pipeline if is_interleaved else 1
    return [request.num_chunks] if request.num_chunks <= most else []


@lru_cache
def _divisors(number: int) -> tuple[int, ...]:
    """From 1 to the number, in their order."""
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return tuple(sorted({*small, *(number // size for size in small)}))


def _why_none(request: PlanRequest) -> FieldError:
    shape = request.shape
    tensors = {size for one in request.context_sizes for size in _tensor_sizes(request, one)}
    if not tensors:
        mlp = "--moe-shared-expert-intermediate-size" if shape.experts else "--ffn-hidden-size"
        widths = f", {mlp} {shape.shared_mlp_size}" if shape.shared_mlp_size else ""
        allowed = (
            f"divisors of a node's {request.accelerator.per_node} GPUs, of --num-attention-heads "
            f"{shape.num_attention_heads}, --num-query-groups {shape.num_query_groups}{widths} and "
            f"--seq-length {shape.seq_length}"
        )
        return out_of_range("--tensor-model-parallel-size", request.tensor_parallel, allowed)
    if not _pipeline_sizes(request):
        allowed = f"1 to --num-layers {shape.num_layers}"
        return out_of_range("--pipeline-model-parallel-size", request.pipeline_parallel, allowed)
    fitting = [tensor * context * pipeline for tensor, context, pipeline in _models(request)]
    if not fitting:
        contexts = request.context_sizes
        products = sorted(
            {t * c * p for t in tensors for c in contexts for p in _pipeline_sizes(request)}
        )
        sizes = "tensor times pipeline" + ("" if contexts == [1] else " times context")
        allowed = f"multiples of {sizes} parallelism, here {_few(products)}"
        problem = "cannot be divided into pipelines"
        return FieldError("--gpus", problem, allowed, value=request.num_accelerators)
    return _why_none_of_batch(request, sorted({request.num_accelerators // n for n in fitting}))


def _why_none_of_batch(request: PlanRequest, replicas: list[int]) -> FieldError:
    """With accelerators that can be divided into so many pipelines."""
    if request.num_chunks is not None and any(_divisions(replace(request, num_chunks=None))):
        allowed = (
            "1, or up to the layers of a rank in pipelines whose ranks divide the microbatches of "
            "a step"
        )
        return out_of_range("--num-virtual-stages-per-pipeline-rank", request.num_chunks, allowed)
    size = request.microbatch_size
    if size is not None and any(_divisions(replace(request, microbatch_size=None))):
        allowed = (
            f"divisors of the part of --global-batch-size {request.global_batch_size} that each "
            f"of {_few(replicas)} replicas gets"
        )
        return out_of_range("--micro-batch-size", size, allowed)
    experts = request.shape.experts
    if experts is not None:
        beside = "that times the other size of expert parallelism divide the GPUs of a stage"
        given = request.expert_parallel
        if given is not None and any(_divisions(replace(request, expert_parallel=None))):
            allowed = f"divisors of --num-experts {experts.num_experts} {beside}"
            return out_of_range("--expert-model-parallel-size", given, allowed)
        given = request.expert_tensor_parallel
        if given is not None and any(_divisions(replace(request, expert_tensor_parallel=None))):
            allowed = f"divisors of --moe-ffn-hidden-size {experts.moe_ffn_hidden_size} {beside}"
            return out_of_range("--expert-tensor-parallel-size", given, allowed)
    problem = "cannot be divided over replicas"
    allowed = f"multiples of their number, with {request.num_accelerators} GPUs {_few(replicas)}"
    return FieldError("--global-batch-size", problem, allowed, value=request.global_batch_size)


def _few(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} or others" if len(numbers) > 8 else shown
