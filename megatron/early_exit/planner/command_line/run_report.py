"""How long a whole run takes with a plan, as text and as JSON."""

from typing import Any

from megatron.early_exit.planner.command_line.run_flags import Run
from megatron.early_exit.planner.drawing.text import seconds_text
from megatron.early_exit.planner.search.plans import Plan
from megatron.early_exit.planner.search.request import PlanRequest
from megatron.early_exit.planner.search.run_length import DAY_S, HOUR_S


def run_text(run: Run, plan: Plan, request: PlanRequest) -> str:
    """Lines that say how long the run takes with a plan."""
    length, reliability = run.length(plan, request), run.reliability
    step_s = plan.prediction.step_s
    mtbf = _long_text(reliability.mtbf_s(request.num_accelerators))
    rows = (
        ("steps", length.training_s, f"{length.num_steps:,} of {seconds_text(step_s)}"),
        (
            "checkpoints",
            length.checkpoints_s,
            f"{reliability.checkpoint_s:g} s each {_long_text(length.save_interval * step_s)}, "
            f"the best interval (Young, Daly): --save-interval {length.save_interval}",
        ),
        (
            "failures",
            length.failures_s,
            f"{length.num_failures:,.1f}, one each {mtbf}, with {reliability.restart_s:g} s to "
            "restart",
        ),
    )
    lines = [f"{run.text} tokens with the first take {length.total_s / DAY_S:,.2f} days:\n"]
    lines += [f"    {name:<11}  {s / DAY_S:>9,.2f} days  {what}" for name, s, what in rows]
    return "\n".join(lines)


def _long_text(seconds: float) -> str:
    for unit, size in (("days", DAY_S), ("hours", HOUR_S), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return seconds_text(seconds)


def run_json(run: Run, plan: Plan, request: PlanRequest) -> dict[str, Any]:
    """How long the run takes with a plan, as JSON values in seconds."""
    length = run.length(plan, request)
    return {
        "train_tokens": run.num_tokens,
        "num_steps": length.num_steps,
        "total_s": length.total_s,
        "days": length.total_s / DAY_S,
        "training_s": length.training_s,
        "checkpoints_s": length.checkpoints_s,
        "failures_s": length.failures_s,
        "num_failures": length.num_failures,
        "save_interval": length.save_interval,
        "mtbf_s": run.reliability.mtbf_s(request.num_accelerators),
    }


def run_or_refusal(run: Run, plan: Plan, request: PlanRequest) -> dict[str, Any]:
    """The same, or for a plan with which a run would hardly ever end, why."""
    try:
        return run_json(run, plan, request)
    except ValueError as error:
        return {"error": str(error)}
