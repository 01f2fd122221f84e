"""How a model runs: in a single process, or divided over several."""

import atexit
import secrets
import sys
from collections.abc import Callable, Mapping
from random import Random

from torch import Tensor, distributed

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.distributed.control import ControlPlane
from megatron.early_exit.inference.distributed.heartbeat import Heartbeat
from megatron.early_exit.inference.distributed.message_time import (
    exit_waits,
    message_weights,
    module_waits,
)
from megatron.early_exit.inference.distributed.pipeline_driver import PipelineDriver
from megatron.early_exit.inference.distributed.pipeline_stage import PipelineStage
from megatron.early_exit.inference.distributed.pipeline_worker import PipelineWorker
from megatron.early_exit.inference.distributed.process_groups import RankInfo, stage_as_model
from megatron.early_exit.inference.distributed.tensor_driver import (
    BuildRequest,
    TensorDriver,
    repeat_calls,
)
from megatron.early_exit.inference.engine.cache_budget import CacheBudget
from megatron.early_exit.inference.engine.cache_pages import CachePages
from megatron.early_exit.inference.engine.loop import Loop
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.engine.segment_loop import SegmentLoop
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.modes.draft_gain import NO_WAITS, Waits
from megatron.early_exit.inference.results import GeneratedToken

NOT_A_WORKER = (
    "work is not possible here, allowed: ranks other than 0 of an engine that is loaded with "
    "has_driver=True over several processes"
)


class WatchedLoop:
    """A loop that needs all processes to be alive while it runs, as a heartbeat knows."""

    def __init__(self, loop: Loop, heartbeat: Heartbeat) -> None:
        self.loop, self._heartbeat = loop, heartbeat

    def submit(self, request: Request) -> None:
        """See `DecodingLoop`."""
        self.loop.submit(request)

    def cancel(self, key: int) -> None:
        """See `DecodingLoop`."""
        self.loop.cancel(key)

    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """See `DecodingLoop`."""
        with self._heartbeat.working():
            return self.loop.step()


class SingleProcess:
    """A whole model in a single process: the counterpart of `ParallelBackend`."""

    def __init__(self, model: SegmentedModel) -> None:
        self.architecture = model.architecture
        self.exit_layers = tuple(exit_.position for exit_ in model.exits)
        self.exit_measure, self.has_gates = model.exit_measure, model.gates is not None
        self.has_blocks = any(exit_.head.block is not None for exit_ in model.exits)
        self.exit_vocab_size = model.exit_vocab_size
        self.num_depths = len(model.mtp)
        self.draft_vocab_size = model.draft_vocab_size
        self.is_worker = False

    def draw_seed(self) -> int:
        """A random seed."""
        return secrets.randbits(63)

    def agree(self, number: int) -> int:
        """The number itself: there are no others to agree with."""
        return number

    def pages(self, budget: CacheBudget, keeps_prefixes: bool) -> CachePages:
        """What gives sequences memory of the caches."""
        return budget.pages(keeps_prefixes)

    def loop(self, runner: SegmentRunner, pages: CachePages) -> Loop:
        """The loop over the model, whose sequences get their memory from `pages`."""
        return SegmentLoop(runner, pages)

    def waits(self, runner: SegmentRunner) -> tuple[tuple[Waits, ...], Waits]:
        """There are no messages; see `ParallelBackend.waits`."""
        return (NO_WAITS,) * len(self.exit_layers), NO_WAITS

    def work(self, loop: Loop, build: BuildRequest) -> None:
        """Refuse: there is no driver to work for."""
        raise ValueError(NOT_A_WORKER)

    def on_death(self, callback: Callable[[str], None]) -> None:
        """Does nothing: there are no peers to watch."""

    def close(self) -> None:
        """Does nothing: there are no peers to disconnect."""


class ParallelBackend:
    """A model divided over processes.

    Either all of them run the same script: every process makes the same requests in the same order,
    and gets the same tokens. Or the first one is the driver, and the others are its workers. In
    both cases ranks of one tensor-parallel group see the same logits and each decide for
    themselves; over a pipeline the first rank decides, and tells the others.

    Args:
        rank_info: of this process.
        architecture: the whole model.
        early_exit: its exits.
        has_driver: only the first rank makes requests.
        draft_vocab_size: tokens that a multi-token-prediction module drafts; None is all.

    Attributes:
        is_worker: the first rank drives this one.
    """

    def __init__(
        self,
        rank_info: RankInfo,
        architecture: Architecture,
        early_exit: EarlyExitConfig,
        has_driver: bool = False,
        draft_vocab_size: int | None = None,
    ) -> None:
        self.rank_info, self.architecture = rank_info, architecture
        self.is_worker = has_driver and rank_info.rank > 0
        self.exit_layers, self.exit_measure = early_exit.positions, early_exit.exit_measure
        self.has_gates = early_exit.use_exit_gate
        self.has_blocks = any(part.tensors == "layer" for part in early_exit.head_parts)
        self.exit_vocab_size = early_exit.exit_vocab_size or architecture.vocab_size
        self.num_depths = architecture.mtp_num_layers
        self.draft_vocab_size = draft_vocab_size or architecture.vocab_size
        self._first_exit = rank_info.exits(architecture.num_layers, early_exit).start
        self._exit_stages = rank_info.exit_stages(architecture.num_layers, early_exit)
        self._heartbeat = Heartbeat(rank_info.group)
        self._control: ControlPlane | None = None
        self._closing: PipelineDriver | PipelineWorker | TensorDriver | None = None
        self._is_closed = False
        if rank_info.num_stages > 1 or has_driver:
            self._control = ControlPlane(rank_info.group)
        seed = [secrets.randbits(63)]
        distributed.broadcast_object_list(seed, src=0, group=rank_info.group)
        self._seeds = Random(seed[0])
        atexit.register(self._close_at_exit)

    def draw_seed(self) -> int:
        """A seed that is the same on all ranks."""
        return self._seeds.getrandbits(63)

    def agree(self, number: int) -> int:
        """The least number of all ranks."""
        numbers = [0] * self.rank_info.num_ranks
        distributed.all_gather_object(numbers, number, group=self.rank_info.group)
        return min(numbers)

    def pages(self, budget: CacheBudget, keeps_prefixes: bool) -> CachePages:
        """What gives sequences memory of the caches; all ranks must call this together."""
        if self.rank_info.num_stages == 1:
            return budget.pages(keeps_prefixes)
        return budget.pages_of_stages(keeps_prefixes, self.agree)

    def loop(self, runner: SegmentRunner, pages: CachePages) -> Loop:
        """The loop over this process's part of the model."""
        return WatchedLoop(self._own_loop(runner, pages), self._heartbeat)

    def _own_loop(self, runner: SegmentRunner, pages: CachePages) -> Loop:
        control, rank_info = self._control, self.rank_info
        if rank_info.num_stages == 1:
            loop = SegmentLoop(runner, pages, is_alone=False)
            if control is None or rank_info.rank > 0:
                return loop
            self._closing = TensorDriver(loop, control, rank_info.num_ranks)
            return self._closing
        assert control is not None
        stage = PipelineStage(runner, rank_info, self._first_exit)
        if rank_info.rank == 0:
            self._closing = PipelineDriver(stage, control, runner.num_slots, pages)
        else:
            self._closing = PipelineWorker(stage, control)
        return self._closing

    def waits(self, runner: SegmentRunner) -> tuple[tuple[Waits, ...], Waits]:
        """The time of messages between stages where exits draft, for each of them, and where a
        multi-token-prediction module does, as weights that could be read in it. All ranks must call
        this together, before the first request.

        Args:
            runner: this process's part of the model.
        """
        rank_info, shape = self.rank_info, self.architecture
        can_draft = bool(self.exit_layers) or self.num_depths > 0
        if rank_info.num_stages == 1 or not can_draft:
            return (NO_WAITS,) * len(self.exit_layers), NO_WAITS
        assert self._control is not None
        num_weights = shape.num_layers * shape.layer_weights
        message = message_weights(rank_info, self._control, runner, num_weights)
        exits = (exit_waits(one, rank_info.num_stages, message) for one in self._exit_stages)
        return tuple(exits), module_waits(rank_info.num_stages, message)

    def work(self, loop: Loop, build: BuildRequest) -> None:
        """Compute for the first rank until it closes, then disconnect from the other ranks.

        Args:
            loop: what `loop` has given.
            build: makes a request from the first rank's message about it.

        Raises:
            ValueError: this is the first rank, or it does not drive the others.
        """
        if not self.is_worker:
            raise ValueError(NOT_A_WORKER)
        if self.rank_info.num_stages == 1:
            assert self._control is not None
            repeat_calls(loop, self._control, build)
        # A stage of a pipeline computes until the first one closes, whoever has made the requests.
        self.close()

    def on_death(self, callback: Callable[[str], None]) -> None:
        """See `EarlyExitEngine.on_death`."""
        self._heartbeat.on_death = callback

    def close(self) -> None:
        """Leave the other processes in good order; all have to do so."""
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self._close_at_exit)
        if self._closing is not None:
            with self._heartbeat.working():
                self._closing.close()
        self._heartbeat.close()
        if self._control is not None:
            self._control.close()

    def _close_at_exit(self) -> None:
        # After an error nothing is said, and the others take this process for dead.
        if getattr(sys, "last_exc", None) is None and distributed.is_initialized():
            self.close()


def parallel_model(
    rank_info: RankInfo,
    architecture: Architecture,
    early_exit: EarlyExitConfig,
    weights: Mapping[str, Tensor],
    compile_rows: bool = False,
    has_driver: bool = False,
    draft_vocab_size: int | None = None,
) -> tuple[SegmentedModel, ParallelBackend]:
    """This process's part of a whole model with its exits.

    `weights` has its parts of the tensors, matrices [outputs, inputs] and vectors [entries], see
    `own_part`; for `compile_rows` and `draft_vocab_size` see `SegmentedModel`, for `has_driver` see
    `ParallelBackend`.
    """
    shape, exits, renamed = stage_as_model(rank_info, architecture, early_exit, weights)
    # The stage of the module may be without exits.
    draft_vocab_size = draft_vocab_size or early_exit.exit_vocab_size
    model = SegmentedModel(
        shape,
        exits,
        renamed,
        rank_info.tensor,
        compile_rows,
        rank_info.is_first_stage,
        draft_vocab_size,
    )
    backend = ParallelBackend(rank_info, architecture, early_exit, has_driver, draft_vocab_size)
    return model, backend
