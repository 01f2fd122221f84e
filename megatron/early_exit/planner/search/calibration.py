"""Finds the share of an accelerator's peak that a measured step reached in its matrix products.

This one constant carries a measurement of one layout to all others. Everything else keeps its place
in the prediction: memory bandwidth, links, bubbles and the update.
"""

from dataclasses import dataclass, replace

from megatron.early_exit.planner.search.candidates import candidates
from megatron.early_exit.planner.search.plans import Plan
from megatron.early_exit.planner.search.prediction import Costing, Fills
from megatron.early_exit.planner.search.request import PlanRequest
from megatron.early_exit.ranges import Range

# Where shares are looked for: all that are possible, and none that a unit's mistake would need.
_LEAST_SHARE = 0.01
# Of the measured step: closer is no clock.
_EXACT = 1e-6
_MOST_ROUNDS = 60


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a measured step says.

    Attributes:
        achieved_share: of the accelerator's peak, in large matrix products.
        measured: the layout that was measured, predicted with this share.
        uncalibrated_s: seconds that were predicted for it without the measurement.
    """

    achieved_share: float
    measured: Plan
    uncalibrated_s: float


def calibrate(request: PlanRequest, measured_s: float) -> Calibration:
    """Find the share with which the prediction of a step is what was measured.

    Args:
        request: with everything given that chooses a layout; of several the first counts.
        measured_s: seconds of a whole step of it.

    Raises:
        ValueError: there is no such layout, or its step cannot have taken so long: no more than
            with products at the peak of the accelerator, or more than with a hundredth of it.
    """
    candidate = next(iter(candidates(request)))

    def plan(share: float | None) -> Plan:
        prediction = Costing.of(candidate, replace(request, achieved_share=share))
        found = prediction.predict(Fills())
        return Plan(costing=prediction, prediction=found, plain_s=found.step_s)

    fastest, slowest = plan(1.0), plan(_LEAST_SHARE)
    peak = f"{request.accelerator.flops_per_s / 1e12:.4g} TFLOP/s"
    Range(
        least=_rounded(fastest.prediction.step_s),
        most=_rounded(slowest.prediction.step_s),
        least_means=f"s, with matrix products at the peak of {peak}",
        most_means="s, at a hundredth of it",
    ).check(**{"--measured-step": measured_s})
    # A step grows with the inverse of the share, and nearly in proportion.
    low, high = 1.0, 1 / _LEAST_SHARE
    low_s, high_s = fastest.prediction.step_s, slowest.prediction.step_s
    for turn in range(_MOST_ROUNDS):
        ahead = (measured_s - low_s) / (high_s - low_s) if high_s > low_s else 0.5
        middle = low + (high - low) * (min(max(ahead, 0.0), 1.0) if turn % 3 < 2 else 0.5)
        found = plan(1 / middle)
        step_s = found.prediction.step_s
        if abs(step_s - measured_s) <= _EXACT * measured_s:
            break
        if step_s < measured_s:
            low, low_s = middle, step_s
        else:
            high, high_s = middle, step_s
    return Calibration(
        achieved_share=1 / middle, measured=found, uncalibrated_s=plan(None).prediction.step_s
    )


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")
