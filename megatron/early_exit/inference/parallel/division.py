"""What differs between an engine in a single process and one divided over several."""

import atexit
import secrets
import sys
from collections.abc import Callable, Mapping
from random import Random

from torch import Tensor, distributed

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.compute.runner import SegmentRunner
from megatron.early_exit.inference.compute.segmented_model import SegmentedModel
from megatron.early_exit.inference.decoding.loop import DecodingLoop
from megatron.early_exit.inference.parallel.control import ControlPlane
from megatron.early_exit.inference.parallel.heartbeat import Heartbeat
from megatron.early_exit.inference.parallel.loop import Loop, WatchedLoop
from megatron.early_exit.inference.parallel.pipeline_driver import PipelineDriver
from megatron.early_exit.inference.parallel.pipeline_follower import PipelineFollower
from megatron.early_exit.inference.parallel.pipeline_stage import PipelineStage
from megatron.early_exit.inference.parallel.process_groups import Place, stage_as_model
from megatron.early_exit.inference.parallel.tensor_driver import (
    BuildRequest,
    TensorDriver,
    repeat_calls,
)

NOT_FOLLOWING = (
    "follow is not possible here, allowed: ranks other than 0 of an engine that is loaded with "
    "driven=True over several processes"
)


class Undivided:
    """A model in a single process: the counterpart of `Division`.

    Args:
        model: the whole model.
    """

    def __init__(self, model: SegmentedModel) -> None:
        self.architecture = model.architecture
        self.exit_layers = tuple(exit_.position for exit_ in model.exits)
        self.is_follower = False

    def draw_seed(self) -> int:
        """A random seed."""
        return secrets.randbits(63)

    def loop(self, runner: SegmentRunner) -> Loop:
        """The loop over the model."""
        return DecodingLoop(runner)

    def follow(self, loop: Loop, build: BuildRequest) -> None:
        """There is nobody to follow."""
        raise ValueError(NOT_FOLLOWING)

    def on_death(self, callback: Callable[[str], None]) -> None:
        """There is nobody whose death could be told of."""

    def close(self) -> None:
        """Nobody has to be parted from."""


class Division:
    """A model divided over processes.

    Either all of them run the same script: every process makes the same requests in the same order,
    and gets the same tokens. Or the first one drives the others, which follow. In both cases ranks
    of one tensor-parallel group see the same logits and each decide for themselves; over a pipeline
    the first rank decides, and tells the others.

    Args:
        place: of this process.
        architecture: the whole model.
        early_exit: its exits.
        driven: only the first rank makes requests.

    Attributes:
        is_follower: the first rank drives this one.
    """

    def __init__(
        self,
        place: Place,
        architecture: Architecture,
        early_exit: EarlyExitConfig,
        driven: bool = False,
    ) -> None:
        self.place, self.architecture = place, architecture
        self.is_follower = driven and place.rank > 0
        self.exit_layers = early_exit.positions
        self._first_exit = place.first_exit(architecture, early_exit)
        self._heartbeat = Heartbeat(place.group)
        self._control: ControlPlane | None = None
        self._closing: PipelineDriver | PipelineFollower | TensorDriver | None = None
        self._is_closed = False
        if place.num_stages > 1 or driven:
            self._control = ControlPlane(place.group)
        seed = [secrets.randbits(63)]
        distributed.broadcast_object_list(seed, src=0, group=place.group)
        self._seeds = Random(seed[0])
        atexit.register(self._close_at_exit)

    def draw_seed(self) -> int:
        """A seed that is the same on all ranks."""
        return self._seeds.getrandbits(63)

    def loop(self, runner: SegmentRunner) -> Loop:
        """The loop over this process's part of the model."""
        return WatchedLoop(self._own_loop(runner), self._heartbeat)

    def _own_loop(self, runner: SegmentRunner) -> Loop:
        control, place = self._control, self.place
        if place.num_stages == 1:
            loop = DecodingLoop(runner, is_alone=False)
            if control is None or place.rank > 0:
                return loop
            self._closing = TensorDriver(loop, control, place.num_ranks)
            return self._closing
        assert control is not None
        stage = PipelineStage(runner, place, self._first_exit)
        if place.rank == 0:
            num_exits = len(self.exit_layers)
            self._closing = PipelineDriver(stage, control, runner.num_slots, num_exits)
        else:
            self._closing = PipelineFollower(stage, control)
        return self._closing

    def follow(self, loop: Loop, build: BuildRequest) -> None:
        """Compute for the first rank until it closes, and part from the others, too.

        Args:
            loop: what `loop` has given.
            build: makes a request of what the first rank tells of it.

        Raises:
            ValueError: this is the first rank, or it does not drive the others.
        """
        if not self.is_follower:
            raise ValueError(NOT_FOLLOWING)
        if self.place.num_stages == 1:
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


def divided_model(
    place: Place,
    architecture: Architecture,
    early_exit: EarlyExitConfig,
    weights: Mapping[str, Tensor],
    compile_rows: bool = False,
    driven: bool = False,
) -> tuple[SegmentedModel, Division]:
    """This process's part of a model.

    Args:
        place: of the process.
        architecture: the whole model.
        early_exit: its exits.
        weights: this process's parts of the tensors, see `own_part`.
        compile_rows: see `SegmentedModel`.
        driven: see `Division`.
    """
    shape, exits, renamed = stage_as_model(place, architecture, early_exit, weights)
    model = SegmentedModel(shape, exits, renamed, place.tensor, compile_rows)
    return model, Division(place, architecture, early_exit, driven)
