"""The costs that modes of decoding decide by, of a model as it is divided and compiled here."""

from dataclasses import dataclass, replace
from typing import Self

from megatron.early_exit.inference.distributed.parallel_backend import (
    ParallelBackend,
    SingleProcess,
)
from megatron.early_exit.inference.engine.policy import ROWS_OF_READINGS, Costs, readings_of
from megatron.early_exit.inference.model.pass_time import module_seconds, pass_seconds
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.modes.draft_gain import SAME_READINGS, DraftCosts, Readings
from megatron.early_exit.inference.modes.exit_gain import ExitCosts


@dataclass(frozen=True, slots=True)
class ModeCosts:
    """What takes time, in weights that are read.

    Attributes:
        readings: how long the weights of layers take to read for several rows; measured where
            layers are compiled for a CPU.
        drafts: what drafting takes with each exit.
        mtp: what it takes with the multi-token-prediction module; None without one.
        exits: what tokens take that may leave at exits.
    """

    readings: Readings
    drafts: tuple[DraftCosts, ...]
    mtp: DraftCosts | None
    exits: ExitCosts

    @classmethod
    def measured(cls, backend: ParallelBackend | SingleProcess, runner: SegmentRunner) -> Self:
        """The costs with what has to be measured; all ranks must call this together.

        Args:
            backend: of the engine.
            runner: this process's part of the model, in which no sequence is yet.
        """
        whole, layers = backend.architecture, backend.exit_layers
        device = runner.model.device.type
        # Exits are asked by themselves, so it does not matter which of them share a projection.
        costs = Costs.of(whole, layers, backend.exit_vocab_size, True, device)
        measured = _Measured.of(backend, runner, costs.rows)
        costs = replace(costs, readings=measured.readings)
        block = float(whole.layer_weights) if backend.has_blocks else 0.0
        exit_waits, mtp_waits = backend.waits(runner)
        drafts = tuple(
            costs.of_drafts(index, block, waits) for index, waits in enumerate(exit_waits)
        )
        mtp = None
        if backend.num_depths:
            vocabulary = backend.draft_vocab_size
            mtp = costs.of_mtp_drafts(whole, vocabulary, mtp_waits, measured.module)
        return cls(costs.readings, drafts, mtp, costs.of_exits(block))


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was measured, where compiled layers have other products for several rows on a CPU.

    Attributes:
        readings: how long the weights of layers take to read for several rows.
        module: the time of asking the multi-token-prediction module about a row, over that of a row
            through all layers; None where it was not measured, as over pipeline stages.
    """

    readings: Readings = SAME_READINGS
    module: float | None = None

    @classmethod
    def of(
        cls, backend: ParallelBackend | SingleProcess, runner: SegmentRunner, rows: float
    ) -> Self:
        can_draft = bool(backend.exit_layers) or backend.num_depths > 0
        has_room = runner.capacity > max(ROWS_OF_READINGS)
        if not (can_draft and has_room and runner.model.has_loops):
            return cls()
        seconds = pass_seconds(runner, ROWS_OF_READINGS)
        readings, module = readings_of(seconds, rows), None
        if runner.model.mtp and runner.model.begins_with_tokens:
            module = _agreed(backend, module_seconds(runner) / seconds[0])
        return cls(Readings(*(_agreed(backend, one) for one in readings)), module)


def _agreed(backend: ParallelBackend | SingleProcess, ratio: float) -> float:
    """The same number on all ranks, which have to decide alike."""
    return backend.agree(round(1000 * ratio)) / 1000
