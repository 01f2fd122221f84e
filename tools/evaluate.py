"""Measure what a model's exits cost in quality and gain in speed, by threshold:

    python tools/evaluate.py --load checkpoint --output-dir evaluation \\
        --tasks next_line docstring texts.jsonl

writes everything as JSON, a curve as CSV, pictures, and a report as one HTML page. The same command
goes on where a killed one has ended, and

    python tools/evaluate.py report evaluation

writes these files again from the records, without a model. Tasks are next_line, docstring and
manual, which are made of Python's standard library, and files of JSON lines:
{"prompt": "...", "reference": "..."}, {"prompt": "...", "choices": ["...", "..."], "gold": 0}, or
whole texts as {"text": "..."}."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.early_exit.errors import one_line
from megatron.early_exit.evaluation.command_line import (
    about_model,
    add_measured_engine_flags,
    add_numbers,
    add_rule_flags,
    add_task_flags,
    checked,
    exit_status,
    load,
    measures_of,
    settings_of,
    weight_dtype_of,
)
from megatron.early_exit.evaluation.evaluation import Evaluation
from megatron.early_exit.evaluation.items import read_tasks
from megatron.early_exit.evaluation.output import RECORDS, REPORT, rebuild
from megatron.early_exit.evaluation.outside_baseline import LeftOut, OutsideBaseline, free_unused
from megatron.early_exit.evaluation.records import begun_records
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.summary import Summary
from megatron.early_exit.evaluation.tradeoff import by_curve, table
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.process_family import end_with_parent, run_program

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Settings)}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_measured_engine_flags(parser)
    add = parser.add_argument_group("evaluation").add_argument
    add("--output-dir", type=Path, required=True, help="folder for all files")
    add_task_flags(add, "")
    add_numbers(
        add,
        {
            "--items": "most prompts of each task",
            "--prompt-characters": "most characters of a prompt that is made, or cut from a text",
            "--max-tokens": "of every answer",
            "--repeats": "pairs of timed answers, of the full model and of a rule",
            "--seed": "of the choice of prompts and of resampling",
        },
        _DEFAULTS,
    )
    thresholds = "1.0 down to 0.0 in steps of 0.05"
    add_rule_flags(add, _DEFAULTS["thresholds"], thresholds, exits_shown="all")
    add(
        "--transformers",
        action="store_true",
        default=None,
        help="measure Hugging Face's transformers with the same weights, too, and compare its "
        "texts with the full model's (default: where it has such a model)",
    )
    add(
        "--no-transformers",
        dest="transformers",
        action="store_false",
        default=None,
        help="measure no other program",
    )
    add(
        "--batch-size",
        type=int,
        help="measure the speed of so many prompts together, too (default: single ones alone)",
    )
    return parser


def exit_sets_of(settings: Settings, engine: EarlyExitEngine) -> tuple[tuple[int, ...] | None, ...]:
    """The sets of exits; one that has all exits of the model is None, as the others call it."""
    every = tuple(engine.exit_layers)
    return tuple(None if one == every else one for one in settings.exit_layers)


def outside_of(
    args: argparse.Namespace, engine: EarlyExitEngine, stored: str | None
) -> OutsideBaseline | LeftOut | None:
    """The same weights in transformers, where it can compute them; else a line says why not.

    What has begun goes on as it has begun: without them, or with them, which are left out of the
    rest where they cannot be had any more.

    Args:
        args: the command line.
        engine: of the model.
        stored: the bits in which the engine keeps weights; None is its dtype.

    Raises:
        ValueError: they were asked for by `--transformers` and cannot be had, or the folder's
            records began without them or are damaged.
    """
    header, records = begun_records(args.output_dir / RECORDS)
    if header is not None and header.get("outside_baseline") is None:
        if args.transformers:
            raise ValueError(
                f"--transformers: {args.output_dir} has records of a measurement without it, "
                "allowed: another folder"
            )
        return None
    has_begun = header is not None
    reason = next((one["left_out"] for one in records if "left_out" in one), None)
    if args.transformers is False:
        return LeftOut("--no-transformers") if has_begun else None
    if reason is not None and not args.transformers:
        return LeftOut(reason)
    try:
        if args.tensor_model_parallel_size * args.pipeline_model_parallel_size > 1:
            raise ValueError("it would run in one process while several share our model")
        if stored is not None:
            raise ValueError(f"it does not compute our weights in {stored}")
        return OutsideBaseline.from_checkpoint(args.load, engine.model.dtype, engine.model.device)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = one_line(error)
        if args.transformers:
            raise ValueError(f"--transformers: transformers is not measured: {reason}") from error
    # Behind the handler: the error would keep what has been loaded.
    free_unused()
    print(f"transformers is not measured: {reason}", file=sys.stderr)
    return LeftOut(reason) if has_begun else None


def show(summary: Summary, folder: Path) -> None:
    """Print the curves, what transformers has shown, and where the report is."""
    for own in by_curve(summary.points()).values():
        print(f"{table(own)}\n")
    outside = summary.outside
    if outside is not None:
        print(f"{outside.sentence()}")
        if outside.tokens_per_second is not None:
            print(
                f"transformers: {outside.tokens_per_second.outside:.1f} tokens/s, "
                f"{outside.speedup:.2f}x of the full model\n"
            )
    print(f"Report: {folder / REPORT}")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the curves.

    Raises:
        ValueError: a flag, or a file that it names, cannot be used.
    """
    exits = {} if args.exit_layers is None else {"exit_layers": tuple(args.exit_layers)}
    settings = settings_of(args, batch_size=args.batch_size, **exits)
    items = read_tasks(settings.tasks, settings.items, settings.prompt_characters, settings.seed)
    engine = load(args, args.batch_size)
    if engine.is_worker:
        engine.work()
        return 0
    try:
        settings = checked(
            replace,
            settings,
            measures=measures_of(args, engine),
            exit_layers=exit_sets_of(settings, engine),
        )
        evaluation = Evaluation(engine, items, settings, about_model(args, engine))
        # What cannot be measured is refused before the baseline is loaded, which takes a while.
        checked(evaluation.measurement)
        evaluation = replace(
            evaluation,
            outside=outside_of(args, engine, weight_dtype_of(args)),
            needs_outside=bool(args.transformers),
        )
        progress = partial(tqdm, unit=" units", disable=None)
        summary = checked(evaluation.run, args.output_dir, progress)
    finally:
        engine.close()
    show(summary, args.output_dir)
    return 0


def run_report(words: Sequence[str]) -> int:
    """Write the files of an evaluation again, and print its curves.

    Raises:
        ValueError: the folder has no records of a whole evaluation.
    """
    parser = argparse.ArgumentParser(
        prog="evaluate.py report",
        description="Write the files of an evaluation again from its records, without a model.",
    )
    parser.add_argument("folder", type=Path, help="what --output-dir was")
    args = parser.parse_args(words)
    show(rebuild(args.folder), args.folder)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["report"]:
        return exit_status(lambda: run_report(words[1:]))
    return exit_status(lambda: run(build_parser().parse_args(words)))


if __name__ == "__main__":
    end_with_parent()
    # A rank of several is ended by torchrun, and has no folder of its own to remove.
    is_rank = "TORCHELASTIC_RUN_ID" in os.environ
    sys.exit(main() if is_rank else run_program(main, "the same command goes on"))
