"""How long a run of many steps takes, with checkpoints and with what failures cost.

A failure loses the work since the last checkpoint and the time to restart. Checkpoints that are
written more often lose less work, but take time: Young (1974) and Daly ("A higher order estimate of
the optimum checkpoint interval for restart dumps", 2006) give the best interval, and Daly the
expected time of a whole run.
"""

from dataclasses import dataclass
from math import exp, expm1, sqrt

from megatron.early_exit.ranges import Range

HOUR_S, DAY_S = 3600.0, 86400.0

MTBF_HOURS = 54 * 24 * 16384 / 419
"""Of one GPU with its share of the machine: Llama 3's training had 419 unexpected interruptions in
54 days on 16,384 H100s ("The Llama 3 Herd of Models", arXiv 2407.21783, section 3.3.4)."""

# Of the mean time between failures: with longer intervals hardly any of them ends well.
_LONGEST_INTERVAL = 20
# Hours or seconds: longer than anything takes, and short enough to be added up.
_MOST = 1e12


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How often machines fail, and what that costs.

    Attributes:
        mtbf_hours: mean time between failures of one accelerator.
        checkpoint_s: seconds for which a checkpoint stops training.
        restart_s: seconds from a failure until training goes on from a checkpoint.

    Raises:
        ValueError: a number is out of its range; named by its flag.
    """

    mtbf_hours: float = MTBF_HOURS
    checkpoint_s: float = 60.0
    restart_s: float = 600.0

    def __post_init__(self) -> None:
        Range(least=0, most=_MOST, excludes_least=True).check(
            **{"--mtbf-hours": self.mtbf_hours, "--checkpoint-seconds": self.checkpoint_s}
        )
        Range(least=0, most=_MOST).check(**{"--restart-seconds": self.restart_s})

    def mtbf_s(self, num_accelerators: int) -> float:
        """Mean seconds between failures of any of so many accelerators."""
        return self.mtbf_hours * HOUR_S / num_accelerators

    def best_interval_s(self, num_accelerators: int) -> float:
        """Seconds of training between checkpoints with which a run ends soonest (Daly's 2006
        estimate, whose first term is Young's)."""
        mtbf_s, cost_s = self.mtbf_s(num_accelerators), self.checkpoint_s
        if cost_s >= 2 * mtbf_s:
            return mtbf_s
        share = cost_s / (2 * mtbf_s)
        return sqrt(2 * cost_s * mtbf_s) * (1 + sqrt(share) / 3 + share / 9) - cost_s


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """What a run takes.

    Attributes:
        num_steps: of the run.
        save_interval: steps between two checkpoints.
        training_s: seconds of the steps.
        checkpoints_s: seconds for which checkpoints stop them.
        failures_s: seconds that failures are expected to cost.
        num_failures: that are expected.
    """

    num_steps: int
    save_interval: int
    training_s: float
    checkpoints_s: float
    failures_s: float
    num_failures: float

    @property
    def total_s(self) -> float:
        """Expected seconds of the run."""
        return self.training_s + self.checkpoints_s + self.failures_s


def run_length(
    num_steps: int, step_s: float, num_accelerators: int, reliability: Reliability
) -> RunLength:
    """What a run of so many steps takes, with the best interval between its checkpoints.

    Args:
        num_steps: of the run, 1 or more.
        step_s: seconds of a step.
        num_accelerators: of the run, any of which ends it when it fails.
        reliability: of these.

    Raises:
        ValueError: machines fail so often that it would hardly ever end.
    """
    mtbf_s = reliability.mtbf_s(num_accelerators)
    best = round(reliability.best_interval_s(num_accelerators) / step_s)
    interval = min(max(best, 1), num_steps)
    interval_s, cost_s = interval * step_s, reliability.checkpoint_s
    attempt_s = interval_s + cost_s
    longest_s = max(attempt_s, reliability.restart_s)
    if longest_s > _LONGEST_INTERVAL * mtbf_s:
        raise ValueError(
            f"--mtbf-hours {reliability.mtbf_hours:g} is a failure each {mtbf_s:.4g} s with "
            f"{num_accelerators} GPUs, allowed: {longest_s / _LONGEST_INTERVAL:.4g} s or more, "
            f"with {_what_is_long(interval_s, reliability)}"
        )
    training_s = num_steps * step_s
    # Daly's equation 20: the time until an interval and its checkpoint have run without a failure.
    one_s = mtbf_s * exp(reliability.restart_s / mtbf_s) * expm1(attempt_s / mtbf_s)
    total_s = one_s * training_s / interval_s
    checkpoints_s = cost_s * training_s / interval_s
    return RunLength(
        num_steps=num_steps,
        save_interval=interval,
        training_s=training_s,
        checkpoints_s=checkpoints_s,
        failures_s=total_s - training_s - checkpoints_s,
        num_failures=total_s / mtbf_s,
    )


def _what_is_long(interval_s: float, reliability: Reliability) -> str:
    """The longest of what has to end without a failure now and then."""
    restart_s, cost_s = reliability.restart_s, reliability.checkpoint_s
    if restart_s > interval_s + cost_s:
        return f"--restart-seconds {restart_s:g}"
    if cost_s > interval_s:
        return f"--checkpoint-seconds {cost_s:g}"
    return f"{interval_s:.4g} s of steps from one checkpoint to the next"
