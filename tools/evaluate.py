"""Measure what a model's exits cost in quality and gain in speed, by threshold:

    python tools/evaluate.py --load checkpoint --output-dir evaluation \\
        --tasks next_line docstring texts.jsonl

writes everything as JSON, a curve as CSV, pictures, and a report as one HTML page. The same command
goes on where a killed one has ended. Tasks are next_line, docstring and manual, which are made of
Python's standard library, and files of JSON lines: {"prompt": "...", "reference": "..."},
{"prompt": "...", "choices": ["...", "..."], "gold": 0}, or whole texts as {"text": "..."}."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from megatron.early_exit.checkpoint.description import describe
from megatron.early_exit.checkpoint.location import DESCRIPTION_NAME, locate
from megatron.early_exit.config import ExitMeasure
from megatron.early_exit.errors import FieldError, as_flag, one_line
from megatron.early_exit.evaluation.evaluation import REPORT, Evaluation
from megatron.early_exit.evaluation.items import read_tasks
from megatron.early_exit.evaluation.library_items import MAKERS
from megatron.early_exit.evaluation.provenance import fingerprint
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.tradeoff import by_curve, table
from megatron.early_exit.flags import refuse_given
from megatron.early_exit.hardware.dtypes import NAMES
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.engine_flags import add_engine_flags, load_engine
from megatron.early_exit.inference.params import KVPolicy
from megatron.early_exit.process_family import end_with_parent

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Settings)}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_flags(parser)
    # A prompt that is found in a cache would flatter whatever comes second.
    parser.set_defaults(compile=None, max_batch_size=None, enable_prefix_caching=False)
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        default=None,
        help="measure plain layers (default: compiled ones where they can be)",
    )
    add = parser.add_argument_group("evaluation").add_argument
    add("--output-dir", type=Path, required=True, help="folder for all files")
    add(
        "--tasks",
        nargs="+",
        default=list(MAKERS),
        help=f"{', '.join(MAKERS)}, or .jsonl files (default: {' '.join(MAKERS)})",
    )
    add(
        "--items",
        type=int,
        default=_DEFAULTS["items"],
        help="most prompts of each task (default: %(default)s)",
    )
    add(
        "--prompt-characters",
        type=int,
        default=_DEFAULTS["prompt_characters"],
        help="most characters of a prompt that is made, or cut from a text (default: %(default)s)",
    )
    add(
        "--thresholds",
        nargs="+",
        type=float,
        default=list(_DEFAULTS["thresholds"]),
        help="(default: 1.0 down to 0.0 in steps of 0.05)",
    )
    add(
        "--measures",
        nargs="+",
        choices=get_args(ExitMeasure),
        help="measures of confidence (default: the model's)",
    )
    add(
        "--kv-policies",
        nargs="+",
        choices=get_args(KVPolicy),
        default=list(_DEFAULTS["kv_policies"]),
        help="(default: %(default)s)",
    )
    add(
        "--max-tokens",
        type=int,
        default=_DEFAULTS["max_tokens"],
        help="of every answer (default: %(default)s)",
    )
    add(
        "--repeats",
        type=int,
        default=_DEFAULTS["repeats"],
        help="pairs of timed answers, of the full model and of a rule (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=int,
        help="measure the speed of so many prompts together, too (default: single ones alone)",
    )
    add(
        "--seed",
        type=int,
        default=_DEFAULTS["seed"],
        help="of the choice of prompts and of resampling (default: %(default)s)",
    )
    return parser


def load(args: argparse.Namespace) -> EarlyExitEngine:
    """Load the engine, with compiled layers where they can be if nothing was said of that.

    Raises:
        ValueError: see `load_engine`; or a flag cannot be combined with a fair measurement.
    """
    if args.enable_prefix_caching:
        raise ValueError(
            "--enable-prefix-caching is refused: a prompt that is found in a cache would flatter "
            "whatever comes second, allowed: without it"
        )
    if args.max_batch_size is not None:
        raise ValueError(
            f"--max-batch-size {args.max_batch_size} is refused, allowed: --batch-size, by which "
            "it is chosen"
        )
    refuse_given(args, ["draft_vocab_size"], "where nothing is drafted")
    args.max_batch_size = args.batch_size or 1
    if args.compile is not None:
        return load_engine(args)
    args.compile = True
    try:
        return load_engine(args)
    except ValueError as error:
        args.compile = False
        engine = load_engine(args)
        print(f"plain layers are measured: {error}", file=sys.stderr)
        return engine


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the command line gives.

    Raises:
        ValueError: a value is out of range; the message names its flag.
    """
    try:
        return Settings(
            tasks=tuple(args.tasks),
            items=args.items,
            prompt_characters=args.prompt_characters,
            thresholds=tuple(args.thresholds),
            measures=tuple(args.measures or get_args(ExitMeasure)),
            kv_policies=tuple(args.kv_policies),
            max_tokens=args.max_tokens,
            repeats=args.repeats,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except FieldError as error:
        raise ValueError(error.named(as_flag(error.field))) from error


def measures_of(args: argparse.Namespace, engine: EarlyExitEngine) -> tuple[ExitMeasure, ...]:
    """The measures of confidence, by default what is stored with the model.

    Raises:
        ValueError: the model does not have one of them.
    """
    for measure in args.measures or ():
        if measure not in engine.exit_measures:
            allowed = " ".join(engine.exit_measures)
            raise ValueError(f"--measures {measure}: the exits have no gates, allowed: {allowed}")
    return tuple(args.measures or [engine.exit_measure])


def about_model(args: argparse.Namespace, engine: EarlyExitEngine) -> dict[str, Any]:
    """How the model was loaded, as JSON has it."""
    location = locate(args.load)
    stored = describe(location).quantization
    return {
        "checkpoint": str(location.iteration_dir),
        "fingerprint": fingerprint(
            (
                location.iteration_dir,
                location.save_dir / DESCRIPTION_NAME,
                location.tokenizer_dir,
            )
        ),
        "dtype": NAMES[engine.model.dtype],
        "weight_dtype": args.weight_dtype or (None if stored is None else stored.weight_dtype),
        "quantize_heads": args.quantize_heads,
        "compile": args.compile,
        "device": str(engine.model.device),
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
    }


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the curves.

    Raises:
        ValueError: a flag, or a file that it names, cannot be used.
    """
    settings = settings_of(args)
    items = read_tasks(settings.tasks, settings.items, settings.prompt_characters, settings.seed)
    engine = load(args)
    if engine.is_worker:
        engine.work()
        return 0
    try:
        settings = replace(settings, measures=measures_of(args, engine))
        evaluation = Evaluation(engine, items, settings, about_model(args, engine))
        summary = evaluation.run(args.output_dir, partial(tqdm, unit=" units", disable=None))
    finally:
        engine.close()
    for own in by_curve(summary.points()).values():
        print(f"{table(own)}\n")
    print(f"Report: {args.output_dir / REPORT}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
