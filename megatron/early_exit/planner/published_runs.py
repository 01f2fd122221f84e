"""Training runs that others published, as the planner sees them.

Columns of the file that they are read from say what the papers tell. What the papers mean by it is
the same for all rows: full recomputation is what sequence parallelism was compared with, and runs
without it; a run whose collectives overlap has the distributed optimizer, and one that writes its
attention matrix has dropout, as the models of that time had. Gradients are exchanged in 16 bits.
Columns of heads' sizes, experts and FP8 may be missing, or empty where a run has none.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.errors import out_of_range
from megatron.early_exit.planner.costs.experts import Experts
from megatron.early_exit.planner.costs.hardware import ACCELERATORS, Accelerator
from megatron.early_exit.planner.costs.layout import Layout
from megatron.early_exit.planner.costs.model_costs import ExitExecution, model_costs
from megatron.early_exit.planner.costs.model_shape import ModelShape
from megatron.early_exit.planner.costs.training_options import (
    FP8,
    FP8Format,
    FP8Recipe,
    Recompute,
    TrainingOptions,
)
from megatron.early_exit.planner.costs.update import Overlap, update_costs
from megatron.early_exit.planner.search.candidates import Candidate
from megatron.early_exit.planner.search.prediction import Costing, Fills, Prediction
from megatron.early_exit.ranges import ONE_OR_MORE

_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("vocab_size", "seq_length"),
)
_NUMBERS = (
    *_SIZES,
    *("num_gpus", "tensor_parallel", "context_parallel", "pipeline_parallel", "chunks_per_stage"),
    *("micro_batch_size", "global_batch_size"),
)
_SWITCHES = (
    *("gated_linear_unit", "tied_embeddings", "flash_attention", "overlapped_collectives"),
)
_EXPERTS = ("num_experts", "moe_router_topk", "moe_ffn_hidden_size")
_SCHEDULES = ("1f1b", "1f1b-i", "zb1p")

# The zero-bubble paper counts activations with the attention matrix, s b h (34 + 5 a s / h), and
# its peaks are those of such runs: they grow by that much with each microbatch in flight, so that a
# row that says otherwise is wrong about it.
_WRITES_ATTENTION = "arXiv 2401.10241"

# The planner's default.
_PASS_OVERHEAD_S = 50e-6


class NotModelled(ValueError):
    """A run that the planner cannot express."""


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run, and what was measured.

    Attributes:
        name: of the run.
        source: where it was published.
        accelerator: that it ran on.
        candidate: its model and layout.
        overlaps_exchanges: replicas exchange gradients and weights beside computations.
        step_s: measured seconds of a step.
        peak_bytes: measured memory of the fullest accelerator, if it was published.
    """

    name: str
    source: str
    accelerator: Accelerator
    candidate: Candidate
    overlaps_exchanges: bool
    step_s: float
    peak_bytes: float | None

    def predict(self) -> Prediction:
        """What the planner expects of the run."""
        one, no_exits = self.candidate, EarlyExitConfig()
        costs = model_costs(
            *(one.shape, one.layout, self.accelerator, no_exits, ExitExecution()),
            pass_overhead_s=_PASS_OVERHEAD_S,
            options=one.options,
        )
        update = update_costs(one.shape, one.layout, self.accelerator, no_exits, one.options)
        overlap = Overlap(self.overlaps_exchanges, self.overlaps_exchanges)
        return Costing(one, costs, update, overlap).predict(Fills())


def read_runs(path: Path) -> tuple[list[PublishedRun], list[str]]:
    """Read the runs of a file of comma-separated values with a line of column names.

    Returns:
        The runs, and for each other row why it is not modelled: it has a schedule or an accelerator
        that the planner does not know.

    Raises:
        ValueError: it cannot be read, or a row is not a run; the message names line and column.
    """
    runs, refused = [], []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                try:
                    runs.append(_run(row, f"{path}, line {reader.line_num}"))
                except NotModelled as error:
                    refused.append(str(error))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not (runs or refused):
        raise ValueError(f"{path} has no runs, allowed: one or more rows below the column names")
    return runs, refused


def _run(row: Mapping[str, str | None], where: str) -> PublishedRun:
    read = _Row(row, where)
    number = {name: read.value(name, int) for name in _NUMBERS}
    for name, value in number.items():
        try:
            ONE_OR_MORE.check(**{name: value})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    switch = {name: bool(read.value(name, int)) for name in _SWITCHES}
    schedule = read.choice("schedule", _SCHEDULES)
    gpu = read.choice("gpu", tuple(ACCELERATORS))
    recompute: Any = read.choice("recompute", get_args(Recompute))
    ranks, chunks = number["pipeline_parallel"], number["chunks_per_stage"]
    of_replica = ranks * number["tensor_parallel"] * number["context_parallel"]
    replicas = number["num_gpus"] // of_replica
    for name, divisor in (
        ("num_gpus", of_replica),
        ("global_batch_size", replicas * number["micro_batch_size"]),
    ):
        if not divisor or number[name] % divisor:
            problem = out_of_range(name, number[name], f"multiples of {max(divisor, of_replica)}")
            raise ValueError(f"{where}: {problem}")
    source, overlaps = read.text("source"), switch["overlapped_collectives"]
    flash = switch["flash_attention"] and _WRITES_ATTENTION not in source
    peak = read.text("published_peak_memory_gb")
    try:
        layout = Layout(
            layers_per_stage=_layers(read, number["num_layers"], ranks * chunks),
            num_ranks=ranks,
            tensor_parallel=number["tensor_parallel"],
            context_parallel=number["context_parallel"],
            data_parallel=replicas,
            microbatch_size=number["micro_batch_size"],
            expert_parallel=read.number_or("expert_parallel", 1),
            expert_tensor_parallel=read.number_or("expert_tensor_parallel", 1),
        )
        shape = ModelShape.llama(
            **{name: number[name] for name in _SIZES},
            gated_linear_unit=switch["gated_linear_unit"],
            share_embeddings_and_output_weights=switch["tied_embeddings"],
            **({"kv_channels": read.value("kv_channels", int)} if read.text("kv_channels") else {}),
            experts=_experts(read),
        )
    except NotModelled:
        raise
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    options = TrainingOptions(
        recompute=recompute,
        flash_attention=flash,
        has_dropout=not flash,
        sequence_parallel=recompute != "full",
        tp_comm_overlap=overlaps,
        overlaps_messages=overlaps,
        distributed_optimizer=overlaps,
        gradient_bytes=2,
        fp8=_fp8(read, ACCELERATORS[gpu]),
    )
    return PublishedRun(
        name=read.text("name"),
        source=source,
        accelerator=ACCELERATORS[gpu],
        candidate=Candidate(
            shape=shape,
            layout=layout,
            num_chunks=chunks,
            num_microbatches=number["global_batch_size"] // replicas // layout.microbatch_size,
            exits=EarlyExitConfig(),
            options=options,
            zero_bubble=schedule == "zb1p",
        ),
        overlaps_exchanges=overlaps,
        step_s=read.value("published_step_s", float),
        peak_bytes=read.value("published_peak_memory_gb", float) * 1e9 if peak else None,
    )


def _experts(read: "_Row") -> Experts | None:
    if not read.text("num_experts"):
        return None
    read.choice("moe_token_dispatcher", ("alltoall",))
    shared = read.number_or("moe_shared_expert_intermediate_size", 0)
    numbers = {name: read.value(name, int) for name in _EXPERTS}
    return Experts(**numbers, moe_shared_expert_intermediate_size=shared)


def _fp8(read: "_Row", accelerator: Accelerator) -> FP8 | None:
    if not read.text("fp8_recipe"):
        return None
    if accelerator.fp8_flops_per_s is None:
        raise NotModelled(f"{read.where}: fp8_recipe is not modelled on this gpu, it has no FP8")
    recipe: Any = read.choice("fp8_recipe", get_args(FP8Recipe))
    # What it is does not change the time.
    kind: FP8Format = "hybrid"
    return FP8(format=kind, recipe=recipe, param_gather=bool(read.number_or("fp8_param_gather", 0)))


def _layers(read: "_Row", num_layers: int, num_stages: int) -> tuple[int, ...]:
    if read.text("layers_per_stage"):
        return read.value("layers_per_stage", lambda text: tuple(map(int, text.split())))
    if num_layers % num_stages:
        raise read.refusal("layers_per_stage", f"the layers of each of {num_stages} stages")
    return (num_layers // num_stages,) * num_stages


@dataclass(frozen=True)
class _Row:
    row: Mapping[str, str | None]
    where: str

    def text(self, column: str) -> str:
        return (self.row.get(column) or "").strip()

    def value[T](self, column: str, parse: Callable[[str], T]) -> T:
        try:
            return parse(self.text(column))
        except ValueError:
            raise self.refusal(column, "a number") from None

    def number_or(self, column: str, default: int) -> int:
        return self.value(column, int) if self.text(column) else default

    def choice(self, column: str, allowed: tuple[str, ...]) -> str:
        text = self.text(column)
        if text not in allowed:
            known = ", ".join(allowed)
            raise NotModelled(f"{self.where}: {column} {text!r} is not modelled, allowed: {known}")
        return text

    def refusal(self, column: str, allowed: str) -> ValueError:
        found = self.text(column) or "missing"
        return ValueError(f"{self.where}: {column} is {found}, allowed: {allowed}")
