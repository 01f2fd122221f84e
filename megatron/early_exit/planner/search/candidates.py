"""The layouts that a request allows, before anything is known of their time and memory."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import FieldError, out_of_range
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.model_costs import PartSeconds, part_seconds
from megatron.early_exit.planner.costs.model_shape import ModelShape, padded_vocab_size
from megatron.early_exit.planner.costs.training_options import DEFAULT_OPTIONS, TrainingOptions
from megatron.early_exit.planner.search.request import PlanRequest
from megatron.early_exit.planner.search.stage_layers import chunk_numbers, stage_layers


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout of a model with exits.

    Attributes:
        shape: of the model, with the vocabulary padded for the layout.
        layout: of its stages.
        num_chunks: on each rank; above 1, the schedule is interleaved.
        num_microbatches: of a step, for each replica.
        exits: of the model, with their placement.
        options: of its training.
        zero_bubble: the schedule is ZB-H1, which training does not run.
    """

    shape: ModelShape
    layout: Layout
    num_chunks: int
    num_microbatches: int
    exits: EarlyExitConfig
    options: TrainingOptions = DEFAULT_OPTIONS
    zero_bubble: bool = False


def candidates(request: PlanRequest) -> Iterator[Candidate]:
    """All layouts that divide the accelerators, the heads and the batch.

    Raises:
        ValueError: there is none; says what does not divide what.
    """
    shapes = list(_divisions(request))
    if not shapes:
        raise _why_none(request)
    parts_of = _Parts(request)
    for tensor, pipeline, chunks, size in shapes:
        replicas = request.num_accelerators // (tensor * pipeline * request.context_parallel)
        variants = [
            (exits, replace(options, overlaps_messages=chunks > 1 or options.overlaps_messages))
            for recompute in request.recomputes
            for options in (replace(request.options, recompute=recompute),)
            for exits in request.placements
        ]
        layers = [
            list(
                stage_layers(
                    parts_of.seconds(tensor, size, exits, options),
                    *(exits, request.shape.num_layers, pipeline, chunks),
                )
            )
            for exits, options in variants
        ]
        for mapping in (False, True):
            for (exits, options), divisions in zip(variants, layers, strict=True):
                for layers_per_stage in divisions:
                    yield Candidate(
                        shape=parts_of.shape(tensor),
                        layout=Layout(
                            layers_per_stage=layers_per_stage,
                            num_ranks=pipeline,
                            tensor_parallel=tensor,
                            context_parallel=request.context_parallel,
                            data_parallel=replicas,
                            microbatch_size=size,
                            use_tp_pp_dp_mapping=mapping,
                        ),
                        num_chunks=chunks,
                        num_microbatches=request.global_batch_size // replicas // size,
                        exits=exits,
                        options=options,
                    )


@dataclass(frozen=True)
class _Parts:
    """What the parts of the model take in the layouts of a request."""

    request: PlanRequest
    found: dict[Hashable, PartSeconds] = field(default_factory=dict)

    def shape(self, tensor: int) -> ModelShape:
        """With the vocabulary padded for so many tensor-parallel partners."""
        shape = self.request.shape
        return replace(shape, vocab_size=padded_vocab_size(shape.vocab_size, tensor))

    def seconds(
        self, tensor: int, size: int, exits: EarlyExitConfig, options: TrainingOptions
    ) -> PartSeconds:
        """By tensor-parallel partners and sequences of a microbatch."""
        key = tensor, size, exits, options
        if key not in self.found:
            request, shape = self.request, self.shape(tensor)
            layout = Layout(
                layers_per_stage=(shape.num_layers,),
                num_ranks=1,
                tensor_parallel=tensor,
                context_parallel=request.context_parallel,
                microbatch_size=size,
            )
            times = request.times(shape, exits, layout, options)
            self.found[key] = part_seconds(
                shape, layout, request.accelerator, exits, times, options
            )
        return self.found[key]


def _divisions(request: PlanRequest) -> Iterator[tuple[int, int, int, int]]:
    """Tensor and pipeline parallelism, chunks of a rank, and sequences of a microbatch."""
    for tensor in tensor_sizes(request):
        for pipeline in pipeline_sizes(request):
            together = tensor * pipeline * request.context_parallel
            if request.num_accelerators % together:
                continue
            replicas = request.num_accelerators // together
            if request.global_batch_size % replicas:
                continue
            for size in _microbatch_sizes(request, request.global_batch_size // replicas):
                number = request.global_batch_size // replicas // size
                for chunks in _chunk_numbers(request, pipeline, number):
                    yield tensor, pipeline, chunks, size


def tensor_sizes(request: PlanRequest) -> list[int]:
    """Tensor-parallel sizes that stay on a node and divide the heads and what else is divided."""
    shape = request.shape
    tokens = shape.seq_length // request.context_parallel
    divided = shape.num_query_groups, shape.num_attention_heads, shape.ffn_hidden_size
    return [
        size
        for size in _divisors(request.accelerator.per_node)
        if all(number % size == 0 for number in (*divided, tokens))
        and request.tensor_parallel in (None, size)
    ]


def pipeline_sizes(request: PlanRequest) -> list[int]:
    """Pipeline-parallel sizes that divide the accelerators and have a layer for each stage."""
    sizes = _divisors(request.num_accelerators)
    if request.pipeline_parallel is not None:
        sizes = [request.pipeline_parallel]
    return [size for size in sizes if size <= request.shape.num_layers]


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


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _why_none(request: PlanRequest) -> FieldError:
    shape = request.shape
    if not tensor_sizes(request):
        allowed = (
            f"divisors of a node's {request.accelerator.per_node} GPUs, of --num-attention-heads "
            f"{shape.num_attention_heads}, --num-query-groups {shape.num_query_groups}, "
            f"--ffn-hidden-size {shape.ffn_hidden_size} and --seq-length {shape.seq_length}"
        )
        return out_of_range("--tensor-model-parallel-size", request.tensor_parallel, allowed)
    if not pipeline_sizes(request):
        allowed = f"1 to --num-layers {shape.num_layers}"
        return out_of_range("--pipeline-model-parallel-size", request.pipeline_parallel, allowed)
    context = request.context_parallel
    products = sorted(
        {t * p * context for t in tensor_sizes(request) for p in pipeline_sizes(request)}
    )
    fitting = [size for size in products if request.num_accelerators % size == 0]
    if not fitting:
        sizes = "tensor times pipeline" if context == 1 else "tensor times pipeline times context"
        allowed = f"multiples of {sizes} parallelism, here {_few(products)}"
        problem = "cannot be divided into pipelines"
        return FieldError("--gpus", problem, allowed, value=request.num_accelerators)
    if request.num_chunks is not None and any(_divisions(replace(request, num_chunks=None))):
        allowed = (
            "1, or up to the layers of a rank in pipelines whose ranks divide the microbatches of "
            "a step"
        )
        return out_of_range("--num-virtual-stages-per-pipeline-rank", request.num_chunks, allowed)
    replicas = sorted({request.num_accelerators // size for size in fitting})
    size = request.microbatch_size
    if size is not None and any(_divisions(replace(request, microbatch_size=None))):
        allowed = (
            f"divisors of the part of --global-batch-size {request.global_batch_size} that each "
            f"of {_few(replicas)} replicas gets"
        )
        return out_of_range("--micro-batch-size", size, allowed)
    problem = "cannot be divided over replicas"
    allowed = f"multiples of their number, with {request.num_accelerators} GPUs {_few(replicas)}"
    return FieldError("--global-batch-size", problem, allowed, value=request.global_batch_size)


def _few(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} or others" if len(numbers) > 8 else shown
