"""How long the messages between the stages of a pipeline take, next to what the stages compute.

Drafts over stages take messages: an exit of a later stage reports to the first one before the next
draft starts, and a multi-token-prediction module is ordered to draft and answers. So what a message
takes is measured once, when an engine is loaded.
"""

from time import perf_counter

from torch import distributed

from megatron.early_exit.inference.distributed.control import ControlPlane
from megatron.early_exit.inference.distributed.process_groups import RankInfo
from megatron.early_exit.inference.model.pass_time import pass_seconds
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.modes.draft_gain import Waits

_ROUNDS = 9
"""The shortest of them counts: what else a machine does is no property of the pipeline's."""


def message_weights(
    rank_info: RankInfo, control: ControlPlane, runner: SegmentRunner, num_weights: int
) -> float:
    """Weights of layers that could be read while a message goes from one stage to another.

    All ranks have to call it together, before any other message.

    Args:
        rank_info: of this process.
        control: the messages.
        runner: this stage's layers, in which no sequence is yet.
        num_weights: of all stages' layers.

    Returns:
        The same number on all ranks.
    """
    seconds = [0.0] * rank_info.num_ranks
    (own,) = pass_seconds(runner, (1,))
    distributed.all_gather_object(seconds, own, group=rank_info.group)
    found = [_message_seconds(rank_info, control)]
    distributed.broadcast_object_list(found, src=0, group=rank_info.group)
    return found[0] / sum(seconds[:: rank_info.stage_size]) * num_weights


def _message_seconds(rank_info: RankInfo, control: ControlPlane) -> float:
    """Half the time of a message from the first stage to the last one and back; of use on the first
    rank, which measures it."""
    times = [0.0]
    if rank_info.rank == 0:
        times = []
        for _ in range(_ROUNDS):
            start = perf_counter()
            control.send(rank_info.last_leader, {"kind": "echo"})
            control.receive()
            times.append(perf_counter() - start)
    elif rank_info.rank == rank_info.last_leader:
        for _ in range(_ROUNDS):
            control.receive()
            control.send(0, {"kind": "echo"})
    return min(times) / 2


def exit_waits(stage: int, num_stages: int, message: float) -> Waits:
    """The messages of drafting with an exit.

    Args:
        stage: of the exit.
        num_stages: of the pipeline.
        message: the time of one, as weights that could be read in it, see `message_weights`.
    """
    ask = stage + 1 if stage else 0
    return Waits(ask * message, 0.0, (num_stages - stage) * message, num_stages * message)


def module_waits(num_stages: int, message: float) -> Waits:
    """The messages of drafting with a multi-token-prediction module on the last stage: an order for
    all drafts of a verification, and its answer. For the arguments see `exit_waits`."""
    return Waits(0.0, 2 * message, num_stages * message, num_stages * message)
