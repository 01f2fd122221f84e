"""Find the fastest rule of early exit that keeps a wished quality, and store it with the model:

    python tools/choose_threshold.py --load checkpoint --output-dir calibration \\
        --tasks held_out.jsonl --agreement 0.99

With a confidence of 95 % (--confidence) the rule keeps 99 % agreement with the full model on texts
like the given ones. It is then how the engine, tools/generate.py and the server answer requests
that say nothing of exits. The same command goes on where a killed one has ended. Exit status 0: a
rule is stored, or no proven rule is certainly faster than the full model; 1: the texts do not prove
any rule; 2: an error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.early_exit.checkpoint.description import describe, read_saved_description
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.stored_rule import (
    StoredRule,
    described_without_rule,
    store_rule,
)
from megatron.early_exit.checkpoint.text_files import write_whole
from megatron.early_exit.errors import FieldError
from megatron.early_exit.evaluation.choosing.calibration import Calibration
from megatron.early_exit.evaluation.choosing.choice import Choice, speed_of, stored_rule
from megatron.early_exit.evaluation.choosing.fitted_thresholds import fitted_thresholds
from megatron.early_exit.evaluation.choosing.fixed_sequence import level_of_path
from megatron.early_exit.evaluation.choosing.needed import shortage, texts_short
from megatron.early_exit.evaluation.choosing.paths import (
    THRESHOLDS,
    exit_sets,
    fitted_paths_of,
    has_fitted_paths,
    num_paths,
    paths_of,
)
from megatron.early_exit.evaluation.choosing.texts import Texts, distinct
from megatron.early_exit.evaluation.choosing.wish import (
    ALL_SCORES,
    Requirement,
    Wish,
    requirements_of,
)
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
    quantize_heads_of,
    settings_of,
)
from megatron.early_exit.evaluation.evaluation import Evaluation
from megatron.early_exit.evaluation.items import read_tasks
from megatron.early_exit.evaluation.measurement import Measurement
from megatron.early_exit.evaluation.output import RECORDS
from megatron.early_exit.evaluation.provenance import software
from megatron.early_exit.evaluation.recording import Recording
from megatron.early_exit.evaluation.records import RecordFile
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.units import Unit
from megatron.early_exit.flags import refuse_given
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.process_family import end_with_parent
from megatron.early_exit.ranges import INDEX, Range

CHOICE = "choice.json"
_DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in (*fields(Settings), *fields(Wish))},
    "items": 1000,
    "max_tokens": 64,
    "thresholds": THRESHOLDS,
    "timed_texts": 8,
    "fitting_texts": 20,
}
NONE_IS_PROVEN = (
    "no rule is proven, and none is stored; a lesser promise or more texts may help, with new "
    "texts in another folder: those that were seen to fail do not prove what is promised after that"
)
NONE_IS_FASTER = "no proven rule is certainly faster than the full model: none is stored"
_KEPT_BY_CLEAR = ("load", "clear", "dry_run")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_measured_engine_flags(parser)
    add = parser.add_argument_group("quality").add_argument
    add(
        "--agreement",
        type=float,
        metavar="SHARE",
        help="expected share of an answer's tokens that the full model would choose, at least",
    )
    add(
        "--task-loss",
        type=float,
        metavar="POINTS",
        help="points of 100 of a score that may be expected to be lost to the full model, at most",
    )
    add(
        "--score",
        choices=ALL_SCORES,
        help="of --task-loss (default: accuracy of choices, f1 of answers)",
    )
    add(
        "--confidence",
        type=float,
        default=_DEFAULTS["confidence"],
        help="with which the promise holds (default: %(default)s)",
    )
    add = parser.add_argument_group("texts").add_argument
    add_task_flags(add, " of texts that the model was not trained on")
    add_numbers(
        add,
        {
            "--items": "most texts of each task",
            "--prompt-characters": "most characters of a prompt that is made, or cut from a text",
            "--max-tokens": "of an answer",
            "--timed-texts": "prompts on which proven rules are timed",
            "--repeats": "pairs of timed answers, of the full model and of a rule",
            "--seed": "of the choice of prompts and of resampling",
        },
        _DEFAULTS,
    )
    add(
        "--fitting-texts",
        type=int,
        help="texts to which thresholds of single exits are fitted, and which prove nothing; with "
        "0, exits that are asked together have one threshold (default: "
        f"{_DEFAULTS['fitting_texts']}, or a quarter of the texts where that is less; 0 where no "
        "exits are asked together)",
    )
    add = parser.add_argument_group("rules that are tried").add_argument
    thresholds = " ".join(map(str, THRESHOLDS))
    add_rule_flags(add, THRESHOLDS, thresholds, exits_shown="all together, and each alone")
    add(
        "--rank-by",
        choices=("time", "depth"),
        default="time",
        help="what is fastest: by measured times, or by layers that are run for a token, which "
        "is the same on every machine but leaves out what else costs time (default: %(default)s)",
    )
    add = parser.add_argument_group("result").add_argument
    add("--output-dir", type=Path, help=f"folder for {RECORDS} and {CHOICE}")
    add("--dry-run", action="store_true", help="say what would be stored, and store nothing")
    add("--clear", action="store_true", help="take the stored rule out of the model instead")
    return parser


def wish_of(args: argparse.Namespace) -> Wish:
    """What the command line wishes for.

    Raises:
        FieldError: a value is out of range, or nothing is wished for.
    """
    return Wish(
        agreement=args.agreement,
        task_loss=args.task_loss,
        score=args.score,
        confidence=args.confidence,
    )


def num_fitting(args: argparse.Namespace, settings: Settings, num_texts: int) -> int:
    """How many texts thresholds of single exits are fitted to.

    Raises:
        FieldError: the flag has no effect.
    """
    if not has_fitted_paths(settings):
        if args.fitting_texts:
            problem = "has no effect: no exits are asked together"
            raise FieldError("fitting_texts", problem, "0", value=args.fitting_texts)
        return 0
    if args.fitting_texts is not None:
        return int(args.fitting_texts)
    return min(_DEFAULTS["fitting_texts"], num_texts // 4)


def calibrate(
    args: argparse.Namespace,
    engine: EarlyExitEngine,
    texts: Texts,
    requirements: Sequence[Requirement],
    settings: Settings,
    model: dict[str, Any],
) -> Choice:
    """Test rules, and time those that are proven.

    Args:
        args: the command line.
        engine: of the model.
        texts: on which rules are tested, timed and fitted.
        requirements: what is to be proven.
        settings: what is tried.
        model: how the model was loaded.

    Raises:
        ValueError: a flag, or the folder, cannot be used.
        FloatingPointError: logits are not finite.
        OSError: a file cannot be written.
    """
    count, everything = len(texts.proving), texts.everything
    # What warms up one threshold warms up all of them.
    own = replace(settings, thresholds=settings.thresholds[-1:])
    measurement = checked(Measurement, engine, everything, own)
    wish = wish_of(args)
    wish.check_records(args.output_dir / RECORDS)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    header = {**Evaluation(engine, everything, settings, model).header(), "wish": asdict(wish)}
    recording = Recording(measurement, RecordFile(args.output_dir / RECORDS, header))
    rules = num_paths(settings, bool(texts.fitting)) * len(settings.thresholds)
    with tqdm(total=len(texts.fitting) + rules * count, unit=" texts", disable=None) as bar:
        answers = []
        for index in texts.fitting_indices:
            answers.append(recording.record(Unit("answer", index)))
            bar.update()
        paths = paths_of(settings)
        if texts.fitting:
            paths += fitted_paths_of(settings, partial(fitted_thresholds, answers))
        bar.total = bar.n + sum(len(path.rules) for path in paths) * count
        calibration = Calibration(recording, requirements, paths, args.confidence, count, bar)
        tested = {path: calibration.test(path) for path in paths}
        proven = [one.rule for own in tested.values() for one in own if one.is_proven]
        bar.total += len(proven) * len(texts.timed)
        by_time = args.rank_by == "time"
        gains = calibration.gains(proven, texts.timed_indices, by_time, args.seed)
    choice = Choice(
        level=calibration.level, tested=tested, gains=gains, num_layers=engine.num_layers
    )
    print("\n".join(choice.lines()))
    result = {**header, **choice.as_dict()}
    write_whole(args.output_dir / CHOICE, json.dumps(result, allow_nan=False) + "\n")
    return choice


def clear(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Take the rule out of the model.

    Raises:
        ValueError: another flag is given, which has no effect, or there is no model.
    """
    names = [name for name in vars(args) if name not in _KEPT_BY_CLEAR]
    refuse_given(args, names, "with --clear", parser.get_default)
    save_dir = locate(args.load).save_dir
    before, old = described_without_rule(save_dir), stored_in(save_dir)
    if not args.dry_run:
        store_rule(save_dir, None, before)
    if old is not None:
        print(f"{'Would be taken' if args.dry_run else 'Taken'} out: {old.sentence()}")
    if not args.dry_run:
        print(f"{save_dir}: no rule is stored")
    elif old is None:
        print(f"{save_dir}: no rule is stored that could be taken out")
    return 0


def stored_in(save_dir: Path) -> StoredRule | None:
    """The rule that is stored with a model, if there is one that can be read."""
    description = read_saved_description(save_dir)
    return None if description is None else description.rule


def say_kept(rule: StoredRule | None) -> None:
    """Say that the rule of before stays, if there is one."""
    if rule is not None:
        print(f"The rule that is stored stays in force: {rule.sentence()}, of {rule.iteration}")


def run(args: argparse.Namespace) -> int:
    """Find a rule and store it.

    Raises:
        ValueError: a flag, or a file that it names, cannot be used.
    """
    wish, settings = checked(wish_of, args), settings_of(args)
    # An interval is of several texts.
    least = 2 if args.rank_by == "time" else 1
    Range(least=least, is_integer=True).check_flags(args, "timed_texts")
    INDEX.check_flags(args, "fitting_texts")
    if args.rank_by == "depth":
        refuse_given(args, ["repeats"], "with --rank-by depth", _DEFAULTS.get)
    if args.output_dir is None:
        raise ValueError("--output-dir is not given, allowed: a folder for what is measured")
    location = locate(args.load)
    # What is evaluated is what is located now, whatever else is saved beside it meanwhile.
    args.load = location.iteration_dir
    before, old = described_without_rule(location.save_dir), stored_in(location.save_dir)
    if not describe(location).early_exit.positions:
        raise ValueError(f"--load {args.load}: the model has no exits, allowed: one that has")
    read = read_tasks(settings.tasks, settings.items, settings.prompt_characters, settings.seed)
    items = distinct(read)
    # What cannot be promised is refused before the model is loaded.
    requirements_of(wish, items)
    engine = load(args)
    if engine.is_worker:
        engine.work()
        return 0
    if len(items) < len(read):
        print(f"{len(read) - len(items)} texts are left out: their prompts were there before")
    try:
        settings = checked(
            replace,
            settings,
            measures=measures_of(args, engine),
            exit_layers=exit_sets(args.exit_layers or (), engine.exit_layers),
        )
        count = checked(num_fitting, args, settings, len(items))
        texts = checked(Texts.of, items, args.timed_texts, count)
        if texts.fitting:
            print(f"thresholds of single exits are fitted to {count} texts, which prove nothing")
        requirements = requirements_of(wish, texts.proving)
        level = level_of_path(wish.confidence, num_paths(settings, bool(texts.fitting)))
        short = texts_short(requirements, level)
        if short:
            print("\n".join(shortage(short, texts.proving)))
            say_kept(old)
            return 1
        model = about_model(args, engine)
        choice = calibrate(args, engine, texts, requirements, settings, model)
    finally:
        engine.close()
    rule = choice.fastest()
    if rule is None:
        print(NONE_IS_FASTER if choice.gains else NONE_IS_PROVEN)
        say_kept(old)
        return 0 if choice.gains else 1
    stored = stored_rule(
        rule,
        choice.gains[rule],
        wish=wish,
        requirements=requirements,
        items=texts.proving,
        max_tokens=settings.max_tokens,
        iteration=location.iteration_dir.name,
        model={**model, "quantize_heads": quantize_heads_of(args)},
        commit=software()["commit"],
    )
    if not args.dry_run:
        store_rule(location.save_dir, stored, before)
    report(stored, old, location.save_dir, args.dry_run)
    return 0


def report(rule: StoredRule, old: StoredRule | None, save_dir: Path, is_dry: bool) -> None:
    """Say what was chosen, where it is, and what was there before."""
    print(f"Chosen: {rule.sentence()}")
    print(f"Promise: {rule.promise.sentence()}")
    if rule.promise.speedup is not None:
        print(f"Speed-up: {speed_of(rule.promise)}, against mode full, on this machine")
    if is_dry:
        print("not stored: --dry-run")
        say_kept(old)
        return
    print(f"Stored with the model: {save_dir}")
    if old is not None:
        print(f"It replaces: {old.sentence()}, of {old.iteration}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(lambda: clear(args, parser) if args.clear else run(args))


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
