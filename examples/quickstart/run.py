"""From nothing to a model that answers faster with early exits, in ten minutes on two cores.

    make demo            (or: python examples/quickstart/run.py --help)

Text of this machine's Python -> SentencePiece tokenizer -> indexed data -> training with two
pipeline stages -> a sample coloured by exit -> speed and quality by threshold -> two pictures.
The number of training steps and the extent of the measurement follow from this machine's speed.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.budget import Budget, Measuring, guard_minutes
from examples.quickstart.pictures import loss_curves
from examples.quickstart.tradeoff import Curve, engines, measure, verdict
from examples.quickstart.training import (
    NUM_LAYERS,
    TRIAL_STEPS,
    TrainingRun,
    train,
    training_dtype,
    trial,
)
from examples.stages import run_command, stage
from megatron.early_exit.evaluation.figures import save, tradeoff_curve
from megatron.early_exit.evaluation.tradeoff import table
from megatron.early_exit.hardware.dtypes import NAMES
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.process_family import run_program

VOCAB_SIZE = 2048
LEAST_STEPS, MOST_STEPS = 2, 1200
MEASURED = Measuring(
    prompts=8, tokens=88, repeats=2, thresholds=(0.9, 0.7, 0.5, 0.3, 0.2, 0.15, 0.1, 0.05, 0.0)
)
PROMPT_CHARACTERS = 80
LEAST_AGREEMENT = 0.9
SAMPLE_THRESHOLD = 0.1
SAMPLE_PROMPT = 'def main():\n    """'
BACKGROUNDS = ("\x1b[42m\x1b[30m", "\x1b[46m\x1b[30m", "\x1b[43m\x1b[30m", "\x1b[45m\x1b[37m")
RESET = "\x1b[0m"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, default=Path("demo"), help="default: %(default)s")
    parser.add_argument(
        "--minutes",
        type=float,
        default=os.environ.get("DEMO_MINUTES", "10"),
        help="time limit of the whole demo; fast machines need less (default: $DEMO_MINUTES, else "
        "10)",
    )
    steps = os.environ.get("DEMO_STEPS")
    parser.add_argument(
        "--steps",
        type=int,
        default=steps,
        help="train for this many steps, however long that takes (default: $DEMO_STEPS, else as "
        f"many as --minutes allows, up to {MOST_STEPS})",
    )
    parser.add_argument("--global-batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=os.environ.get("DEMO_COMPILE", "1") != "0",
        help="also measure compiled layers, which takes a minute to compile (default: yes, unless "
        "$DEMO_COMPILE is 0)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="train again even if there is a finished run"
    )
    args = parser.parse_args()
    if not 1 <= args.minutes < math.inf:
        parser.error(f"--minutes {args.minutes} is out of range, allowed: 1 or more")
    if args.steps is not None and args.steps < LEAST_STEPS:
        parser.error(f"--steps {args.steps} is out of range, allowed: {LEAST_STEPS} or more")
    if args.global_batch_size < 4 or args.global_batch_size % 4:
        size = args.global_batch_size
        parser.error(f"--global-batch-size {size} is out of range, allowed: multiples of 4")
    try:
        args.dtype = training_dtype()
    except ValueError as error:
        parser.error(str(error))
    args.work_dir = args.work_dir.resolve()
    return args


def prepare_data(data: Path) -> None:
    """Text, tokenizer and indexed data sets in the directory `data`."""
    python = sys.executable
    here = "examples/quickstart/corpus.py"
    run_command(python, here, "--output-dir", str(data), "--vocab-size", str(VOCAB_SIZE))
    for split in ("train", "validation"):
        run_command(
            *(python, "tools/preprocess_data.py", "--overwrite", "--append-eod"),
            *("--input", str(data / f"{split}.jsonl"), "--output-prefix", str(data / split)),
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(data / "tokenizer.model"), "--workers", "2"),
        )


def show_sample(engine: EarlyExitEngine) -> None:
    """Print one continuation, each token on the colour of the exit that gave it."""
    colour = "NO_COLOR" not in os.environ and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)
    layers = [*engine.exit_layers, NUM_LAYERS]
    marks = dict(zip(layers, BACKGROUNDS, strict=False))
    params = SamplingParams(
        mode="early_exit", early_exit_threshold=SAMPLE_THRESHOLD, max_tokens=110
    )
    counts = dict.fromkeys(layers, 0)
    print(SAMPLE_PROMPT, end="")
    for token in engine.stream(SAMPLE_PROMPT, params):
        counts[token.exit_layer] += 1
        text = token.text or ""
        # A background must not run over the end of a line.
        pieces = text.split("\n")
        mark = marks[token.exit_layer] if colour else ""
        reset = RESET if colour else ""
        print("\n".join(f"{mark}{piece}{reset}" if piece else "" for piece in pieces), end="")
        sys.stdout.flush()
    print()
    names = (
        f"{marks[layer] if colour else ''}layer {layer}{RESET if colour else ''}: {count} tokens"
        for layer, count in counts.items()
    )
    print("   " + ", ".join(names))


def prompts(validation: Path) -> list[str]:
    """The beginnings of some texts that the model has not seen."""
    texts = [json.loads(line)["text"] for line in validation.open()]
    long = [text for text in texts if len(text) > 2 * PROMPT_CHARACTERS]
    step = max(1, len(long) // MEASURED.prompts)
    return [text[:PROMPT_CHARACTERS] for text in long[::step][: MEASURED.prompts]]


def train_within(run: TrainingRun, budget: Budget) -> None:
    """Time a few steps, and train for as many as the time allows."""
    print(f"   {TRIAL_STEPS} steps to time this machine:", flush=True)
    found = trial(run)
    seconds = budget.left_for_training()
    steps = found.steps_within(seconds, LEAST_STEPS, MOST_STEPS)
    print(
        f"   {steps} steps of {found.step_seconds:.2f} s in {NAMES[run.dtype]}: "
        f"{seconds / 60:.1f} minutes are left for training",
        flush=True,
    )
    train(run, steps, guard_minutes(seconds))


def main() -> None:
    """Run all stages."""
    args = parse()
    data, budget = args.work_dir / "data", Budget.of_minutes(args.minutes)
    run = TrainingRun(
        train_data=data / "train_text_document",
        validation_data=data / "validation_text_document",
        tokenizer_model=data / "tokenizer.model",
        directory=args.work_dir / "run",
        length=f"--minutes {args.minutes:g}" if args.steps is None else f"--steps {args.steps}",
        global_batch_size=args.global_batch_size,
        dtype=args.dtype,
    )

    def learn() -> None:
        if args.steps is None:
            train_within(run, budget)
        else:
            train(run, args.steps)

    if args.fresh or not run.is_finished:
        stage(
            "Text, tokenizer and data sets from Python's standard library",
            lambda: prepare_data(data),
        )
        stage("Training: two pipeline stages, exits after layers 2 and 4", learn)
    else:
        print(f"Using the model in {args.work_dir} (--fresh trains a new one).")
    models: dict[str, EarlyExitEngine] = {}
    loading = "Loading the model, and compiling it" if args.compile else "Loading the model"
    stage(loading, lambda: models.update(engines(run.checkpoint, args.compile)))
    stage(f"A sample, at threshold {SAMPLE_THRESHOLD}", lambda: show_sample(models["plain layers"]))

    def sweep() -> None:
        used = prompts(data / "validation.jsonl")
        curves = {name: Curve(engine) for name, engine in models.items()}
        points = measure(curves, used, MEASURED, budget.left_for_measuring())
        print(table(points))
        (args.work_dir / "tradeoff.json").write_text(
            json.dumps([asdict(point) for point in points], indent=1) + "\n"
        )
        (args.work_dir / "prompts.jsonl").write_text(
            "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in used)
        )
        loss_curves(run.tensorboard, args.work_dir / "losses.png")
        save(tradeoff_curve(points, LEAST_AGREEMENT), args.work_dir / "tradeoff.png")
        print(f"\n{verdict(points, LEAST_AGREEMENT)}")

    stage("Speed and quality by threshold", sweep)
    print(f"\nPictures: {args.work_dir}/losses.png and {args.work_dir}/tradeoff.png")
    print(f"Done in {(time.monotonic() - budget.start) / 60:.1f} minutes.")


if __name__ == "__main__":
    sys.exit(run_program(main, "the next run repeats what was not finished"))
