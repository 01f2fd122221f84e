"""The flags of a whole run: how many tokens it sees, and how often its machines fail."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from megatron.early_exit.flags import refuse_given
from megatron.early_exit.planner.search.plans import Plan
from megatron.early_exit.planner.search.request import PlanRequest
from megatron.early_exit.planner.search.run_length import (
    MTBF_HOURS,
    Reliability,
    RunLength,
    run_length,
)
from megatron.early_exit.ranges import Range

_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_TOKENS = Range(least=1, most=1e18)
_RELIABILITY = ("mtbf_hours", "checkpoint_seconds", "restart_seconds")


def parse_tokens(text: str) -> float:
    """A number of tokens, such as 15T, 300B or 1e12.

    Raises:
        ArgumentTypeError: it is none, or out of range.
    """
    unit = _UNITS.get(text[-1:].upper())
    try:
        number = float(text if unit is None else text[:-1]) * (unit or 1)
    except ValueError:
        number = 0.0
    if number not in _TOKENS:
        allowed = f"{_TOKENS.least:g} to {_TOKENS.most:g}, for example 15T, 300B or 1e12"
        raise ArgumentTypeError(f"{text} is not a number of tokens, allowed: {allowed}")
    return number


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of many steps.

    Attributes:
        num_tokens: that it sees, or a few more with the last step.
        text: the number as it was given.
        reliability: of its machines.
    """

    num_tokens: float
    text: str
    reliability: Reliability

    def length(self, plan: Plan, request: PlanRequest) -> RunLength:
        """What it takes with a plan.

        Raises:
            ValueError: see `run_length`.
        """
        tokens = request.global_batch_size * request.shape.seq_length
        step_s, gpus = plan.prediction.step_s, request.num_accelerators
        return run_length(ceil(self.num_tokens / tokens), step_s, gpus, self.reliability)


def add_run_flags(parser: ArgumentParser) -> None:
    """Add the flags of a whole run to a command line."""
    add = parser.add_argument_group("a whole run", "how long it takes, with failures").add_argument
    add("--train-tokens", type=parse_tokens, help="tokens of the run, for example 15T or 300B")
    mtbf = (
        "mean hours between failures of one GPU (default: Llama 3's, "
        f"{MTBF_HOURS:.0f}: 419 in 54 days on 16,384 GPUs)"
    )
    add("--mtbf-hours", type=float, default=MTBF_HOURS, help=mtbf)
    default = Reliability()
    stops = "time for which a checkpoint stops training (default: %(default)s, an assumption)"
    add("--checkpoint-seconds", type=float, default=default.checkpoint_s, help=stops)
    restart = "time from a failure until training goes on (default: %(default)s, an assumption)"
    add("--restart-seconds", type=float, default=default.restart_s, help=restart)


def read_run(args: Namespace, default_of: Callable[[str], object]) -> Run | None:
    """The run that the flags describe, if any.

    Args:
        args: parsed arguments.
        default_of: the value of a flag that is not given.

    Raises:
        ValueError: a flag is out of range, or has no effect.
    """
    if args.train_tokens is None:
        refuse_given(args, _RELIABILITY, "without --train-tokens", default_of)
        return None
    reliability = Reliability(
        mtbf_hours=args.mtbf_hours,
        checkpoint_s=args.checkpoint_seconds,
        restart_s=args.restart_seconds,
    )
    return Run(
        num_tokens=args.train_tokens,
        text=_tokens_text(args.train_tokens),
        reliability=reliability,
    )


def _tokens_text(number: float) -> str:
    for unit, size in reversed(_UNITS.items()):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
