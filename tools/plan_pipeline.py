"""Find the fastest parallel layout in which the training of a model with exits fits into memory.

    python tools/plan_pipeline.py --config 30b --gpu a100-80gb --gpus 64

ranks layouts (tensor x pipeline x data parallelism, chunks, microbatches, placements of exits) by
the step time that a simulator predicts, and prints the flags of the fastest one;
--fill-explicit-bubbles adds partial microbatches in the bubbles. --timeline draws the schedule of
the fastest layout as a picture (.png, .svg) or as an interactive page (.html). --schedule simulates
and draws a single schedule instead, on stages without a model that take given times:

    python tools/plan_pipeline.py --schedule filled --pipeline-model-parallel-size 4 \\
        --num-microbatches 6 --exit-stages 1 2 --timeline filled.html"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron.early_exit.errors import one_line
from megatron.early_exit.planner.command_line.details import memory_table, time_table
from megatron.early_exit.planner.command_line.drawn_plan import draw_plan
from megatron.early_exit.planner.command_line.measured_step_flags import (
    add_measured_step_flag,
    open_request,
    origin_of_share,
    read_measured_step,
)
from megatron.early_exit.planner.command_line.model_flags import add_model_flags, read_model
from megatron.early_exit.planner.command_line.plan_flags import flags, one_flag_a_line
from megatron.early_exit.planner.command_line.profile_flags import add_profile_flags
from megatron.early_exit.planner.command_line.report import (
    LEGEND,
    as_json,
    origin_of_times,
    table,
)
from megatron.early_exit.planner.command_line.request_flags import (
    add_fill_flags,
    add_request_flags,
    read_fill_request,
    read_request,
)
from megatron.early_exit.planner.command_line.run_flags import add_run_flags, read_run
from megatron.early_exit.planner.command_line.run_report import run_or_refusal, run_text
from megatron.early_exit.planner.command_line.schedule_flags import (
    add_schedule_flags,
    read_schedule,
    refuse_schedule_flags,
)
from megatron.early_exit.planner.command_line.unmodelled_flags import (
    add_unmodelled_flags,
    refuse_unmodelled,
)
from megatron.early_exit.planner.drawing import check_timeline_file, write_timeline
from megatron.early_exit.planner.drawing.extras import Extras
from megatron.early_exit.planner.drawing.text import draw_text
from megatron.early_exit.planner.search.filling import fill_bubbles
from megatron.early_exit.planner.search.plans import Plan, Plans, find_plans
from megatron.early_exit.planner.search.request import PlanRequest
from megatron.early_exit.planner.simulation.simulator import simulate
from megatron.early_exit.planner.simulation.timeline import Timeline
from megatron.early_exit.ranges import ONE_OR_MORE
from megatron.early_exit.schedules.check import build_proved
from megatron.early_exit.schedules.schedule import Schedule

_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_flags(parser)
    add_request_flags(parser)
    add_profile_flags(parser)
    add_measured_step_flag(parser)
    add_fill_flags(parser)
    add_run_flags(parser)
    add_schedule_flags(parser)
    add_unmodelled_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--top", type=int, default=10, help="number of layouts to list (default: %(default)s)")
    every = "list all chunks, microbatches, orders and placements, not only each layout's best"
    add("--every-variant", action="store_true", help=every)
    add("--json", action="store_true", help="print JSON")
    add(
        "--timeline", type=Path, help="draw the first layout's schedule in this .png, .svg or .html"
    )
    drawn = "microbatches of the drawn step (default: up to 4 for each rank)"
    add("--timeline-microbatches", type=int, help=drawn)
    add("--schedule-csv", type=Path, help="write the first schedule's actions, a line per rank")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse invalid output flags before the work starts.

    Raises:
        ValueError: one of them is out of range, or names a file that cannot be written.
    """
    ONE_OR_MORE.check_flags(args, "top", "timeline_microbatches")
    if args.timeline is not None:
        check_timeline_file(args.timeline)
    elif args.timeline_microbatches is not None:
        raise ValueError("--timeline-microbatches has no effect without --timeline")
    if args.schedule_csv is not None and not args.schedule_csv.parent.is_dir():
        raise ValueError(
            f"--schedule-csv {args.schedule_csv}: there is no folder {args.schedule_csv.parent}"
        )


def time_schedule(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Time one schedule, print it and write the requested files.

    Raises:
        ValueError: a flag is missing or out of range.
    """
    one = read_schedule(args, parser.get_default)
    schedule = build_proved(one.generator())
    timeline = simulate(schedule, one.costs())
    if args.json:
        print(json.dumps(_timeline_json(timeline)))
    else:
        print(draw_text(timeline))
    title = f"{args.schedule}, {one.num_ranks} ranks, {one.num_microbatches} microbatches"
    if args.schedule_csv is not None:
        _write_actions(args, schedule)
    if args.timeline is not None:
        write_timeline(timeline, args.timeline, title, Extras.of(timeline, one.costs()))


def _timeline_json(timeline: Timeline) -> dict[str, object]:
    return {
        "step_s": timeline.step_s,
        "bubble_fraction": timeline.bubble_fraction,
        "busy_s": timeline.busy_s,
        "critical_path": [str(action) for action in timeline.critical_path],
    }


def plan(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Find the fastest layouts, print them and write the requested files.

    Raises:
        ValueError: a flag is missing or out of range, or no layout fits.
    """
    refuse_schedule_flags(args, parser.get_default)
    refuse_unmodelled(args)
    model = read_model(args)
    request = read_request(args, model)
    run = read_run(args, parser.get_default)
    calibration = read_measured_step(args, request)
    if calibration is not None:
        request = open_request(request, calibration)
    fills = read_fill_request(args, parser.get_default)
    progress = partial(tqdm, desc="timing layouts", unit=" layouts", leave=False, disable=None)
    plans = find_plans(request, args.top, args.every_variant, progress)
    best = plans.best
    if fills is not None:
        best = fill_bubbles(best, fills, request.memory_limit_bytes)
    if run is not None:
        # Refused as a whole only if not even the fastest plan ends.
        run.length(best[0], request)
    origin = None if request.profile is None else origin_of_times(best, request.profile)
    if args.json:
        answer: dict[str, object] = {
            "plans": [
                as_json(one, request)
                if run is None
                else {**as_json(one, request), "run": run_or_refusal(run, one, request)}
                for one in best
            ]
        }
        if origin is not None:
            answer["times"] = origin
        if calibration is not None:
            answer["measured_step"] = {
                "achieved_share": calibration.achieved_share,
                "uncalibrated_s": calibration.uncalibrated_s,
                "plan": as_json(calibration.measured, request),
            }
        print(json.dumps(answer))
    else:
        title = f"{model.name} on {args.gpus} x {args.gpu}"
        whole_run = "" if run is None else f"{run_text(run, best[0], request)}\n\n"
        print(f"{title}: {_summary(plans, request)}")
        if origin is not None:
            print(origin)
        if calibration is not None:
            print(origin_of_share(calibration, request, best[0]))
        print(f"\n{table(best, request)}\n\n{LEGEND}\n\n{_details(best[0], request)}\n")
        print(f"{whole_run}Flags of the first:\n")
        print(one_flag_a_line(flags(best[0], request)))
    _write_plan_files(args, best[0], f"{model.name} on {args.gpus} x {args.gpu}")


def _details(first: Plan, request: PlanRequest) -> str:
    return (
        "Time of a step of the first, mean of its ranks:\n\n"
        f"{time_table(first, request)}\n\n"
        f"Memory of its ranks when they take the most:\n\n{memory_table(first)}"
    )


def _summary(plans: Plans, request: PlanRequest) -> str:
    # What is never looked at counts once for all of its orders and placements.
    least = "at least " if request.shape.experts is not None else ""
    return (
        f"{request.global_batch_size} sequences of {request.shape.seq_length} tokens a step; "
        f"{least}{plans.num_candidates} layouts, {plans.num_fitting} may fit into "
        f"{request.memory_limit_bytes / 1e9:.0f} GB, {plans.num_simulated} simulated"
    )


def _write_plan_files(args: argparse.Namespace, best: Plan, title: str) -> None:
    if args.schedule_csv is not None:
        whole = best.costing.candidate.num_microbatches
        _write_actions(args, build_proved(best.costing.generator(whole, best.fills)))
    if args.timeline is not None:
        timeline, extras = draw_plan(best, args.timeline_microbatches)
        write_timeline(timeline, args.timeline, title, extras)


def _write_actions(args: argparse.Namespace, schedule: Schedule) -> None:
    args.schedule_csv.write_text(schedule.to_csv(), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check(args)
        if args.schedule is not None:
            time_schedule(args, parser)
        else:
            plan(args, parser)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has read enough, as `head` does; the interpreter would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
