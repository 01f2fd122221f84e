"""What differs between an engine in a single process and one divided over several."""

import atexit
import secrets
import sys
from collections.abc import Mapping, Sequence
from random import Random
from typing import Protocol

from torch import Tensor, distributed

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.inference.compute.runner import SegmentRunner
from megatron.early_exit.inference.compute.segments import SegmentedModel
from megatron.early_exit.inference.decoding.loop import DecodingLoop
from megatron.early_exit.inference.decoding.request import Request
from megatron.early_exit.inference.decoding.results import GeneratedToken
from megatron.early_exit.inference.decoding.scoring import PrefixScore
from megatron.early_exit.inference.parallel.control import ControlPlane
from megatron.early_exit.inference.parallel.heartbeat import Heartbeat
from megatron.early_exit.inference.parallel.pipeline_driver import PipelineDriver
from megatron.early_exit.inference.parallel.pipeline_follower import PipelineFollower
from megatron.early_exit.inference.parallel.pipeline_stage import PipelineStage
from megatron.early_exit.inference.parallel.process_groups import Place, stage_as_model


class Loop(Protocol):
    """What takes requests to their ends, see `DecodingLoop`."""

    def submit(self, request: Request) -> None: ...

    def cancel(self, key: int) -> None: ...

    def step(self) -> list[tuple[Request, GeneratedToken]]: ...

    def score(self, tokens: Sequence[int], num_best: int) -> list[PrefixScore]: ...


class Undivided:
    """A model in a single process: the counterpart of `Division`.

    Args:
        model: the whole model.
    """

    def __init__(self, model: SegmentedModel) -> None:
        self.architecture = model.architecture
        self.exit_layers = tuple(exit_.position for exit_ in model.exits)

    def draw_seed(self) -> int:
        """A random seed."""
        return secrets.randbits(63)

    def loop(self, runner: SegmentRunner) -> Loop:
        """The loop over the model."""
        return DecodingLoop(runner)

    def close(self) -> None:
        """Nobody has to be parted from."""


class Division:
    """A model divided over processes, which all run the same script.

    Every process makes the same requests in the same order, and gets the same tokens. Ranks of one
    tensor-parallel group see the same logits and each decide for themselves; over a pipeline the
    first rank decides, and tells the others.

    Args:
        place: of this process.
        architecture: the whole model.
        early_exit: its exits.
    """

    def __init__(self, place: Place, architecture: Architecture, early_exit: EarlyExitConfig):
        self.place, self.architecture = place, architecture
        self.exit_layers = early_exit.positions
        self._first_exit = place.first_exit(architecture, early_exit)
        self._heartbeat = Heartbeat(place.group)
        self._control: ControlPlane | None = None
        self._pipeline: PipelineDriver | PipelineFollower | None = None
        if place.num_stages > 1:
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
        if self._control is None:
            return WatchedLoop(DecodingLoop(runner), self._heartbeat)
        stage = PipelineStage(runner, self.place, self._first_exit)
        if self.place.rank == 0:
            num_exits = len(self.exit_layers)
            self._pipeline = PipelineDriver(stage, self._control, runner.num_slots, num_exits)
        else:
            self._pipeline = PipelineFollower(stage, self._control)
        return WatchedLoop(self._pipeline, self._heartbeat)

    def close(self) -> None:
        """Leave the other processes in good order; all have to do so."""
        atexit.unregister(self._close_at_exit)
        if self._pipeline is not None:
            with self._heartbeat.working():
                self._pipeline.close()
        self._heartbeat.close()
        if self._control is not None:
            self._control.close()

    def _close_at_exit(self) -> None:
        # After an error nothing is said, and the others take this process for dead.
        if getattr(sys, "last_exc", None) is None and distributed.is_initialized():
            self.close()


class WatchedLoop:
    """A loop that needs all processes to be alive while it runs.

    Args:
        loop: what does the work.
        heartbeat: knows who is alive.
    """

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

    def score(self, tokens: Sequence[int], num_best: int) -> list[PrefixScore]:
        """See `DecodingLoop`."""
        with self._heartbeat.working():
            return self.loop.score(tokens, num_best)


def divided_model(
    place: Place,
    architecture: Architecture,
    early_exit: EarlyExitConfig,
    weights: Mapping[str, Tensor],
    compile_rows: bool = False,
) -> tuple[SegmentedModel, Division]:
    """This process's part of a model.

    Args:
        place: of the process.
        architecture: the whole model.
        early_exit: its exits.
        weights: this process's parts of the tensors, see `own_part`.
        compile_rows: see `SegmentedModel`.
    """
    shape, exits, renamed = stage_as_model(place, architecture, early_exit, weights)
    model = SegmentedModel(shape, exits, renamed, place.tensor, compile_rows)
    return model, Division(place, architecture, early_exit)
