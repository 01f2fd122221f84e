"""Measure the step time and peak memory of tuning exits, relative to training the whole model.

    python benchmarks/tuning_cost.py [--layers 8] [--exits 4] [--rounds 3] ...

Both run `pretrain_early_exit_gpt.py` in one process: one trains all parameters of the plain model,
the other uses `--tune-exit` on a checkpoint of it. They run alternately, a few steps each, so that
noise affects both. Peak memory is what a process uses beyond one that trains a minimal model. The
limit of the time is the ratio of floating-point operations.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from figures import FigureTable, add_json_flag

from megatron.early_exit.process_family import run_program, started

REPOSITORY = Path(__file__).resolve().parents[1]
TIME_BOUND, MEMORY_BOUND = 0.6, 0.5
WARM_UP_STEPS = 2
# See training_overhead.py: freed memory goes back.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "2000000", "OMP_NUM_THREADS": "2"}
_STEP = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
_GPU_PEAK = re.compile(r"max allocated: ([0-9.]+)")


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        steps: seconds of each step, without the first ones.
        peak_bytes: peak memory on the device.
    """

    steps: list[float]
    peak_bytes: int


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--exits", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=6, help="timed steps in each round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each run")
    add_json_flag(parser)
    parser.add_argument("extra", nargs="*", help="after --: more flags for both, e.g. --bf16")
    return parser.parse_args()


def flags(args: argparse.Namespace, hidden: int, layers: int) -> list[str]:
    """Megatron's flags of a model."""
    text = f"""
        --num-layers {layers} --hidden-size {hidden} --num-attention-heads {args.heads}
        --seq-length {args.seq_length} --max-position-embeddings {args.seq_length}
        --micro-batch-size {args.micro_batch_size}
        --global-batch-size {args.micro_batch_size * args.microbatches}
        --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
        --attention-dropout 0 --hidden-dropout 0
        --tokenizer-type NullTokenizer --vocab-size {args.vocab} --mock-data
        --lr 1e-4 --log-interval 1 --eval-iters 0
    """
    return [*text.split(), *args.extra]


def run(command_flags: list[str]) -> Measured:
    """Run the entry point.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "pretrain_early_exit_gpt.py", *command_flags]
    with started(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        reader = threading.Thread(target=lines.extend, args=(process.stdout,))
        reader.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        reader.join()
    output = "".join(lines)
    if process.returncode:
        raise SystemExit(f"{output[-6000:]}\nerror: {' '.join(command[1:])} failed")
    steps = [float(found) / 1000 for found in _STEP.findall(output)]
    peaks = [float(found) for found in _GPU_PEAK.findall(output)]
    on_gpu = "platform: cpu" not in output
    peak = max(peaks) * 2**20 if on_gpu else usage.ru_maxrss * 1024
    return Measured(steps[WARM_UP_STEPS:], int(peak))


def flop_ratio(args: argparse.Namespace) -> float:
    """Operations of a token in tuning, relative to training, counting only products with
    weights."""
    h = args.hidden
    mlp = 3 * h * int(4 * h * 2 / 3 // 64 * 64)
    layer, head = 4 * h * h + mlp, h * args.vocab
    # Forward, and backward to inputs and to weights; a tied projection has no gradient of its own.
    trained = 6 * (args.layers * layer + head)
    tuned = 2 * max(args.exits) * layer + len(args.exits) * (4 * head + 6 * mlp)
    return tuned / trained


def main() -> int:
    """Measure and print; returns the exit status."""
    args = parse()
    model = flags(args, args.hidden, args.layers)
    steps = ["--train-iters", str(WARM_UP_STEPS + args.steps)]
    with tempfile.TemporaryDirectory() as folder:
        base = f"{folder}/base"
        run([*model, "--train-iters", "1", "--save", base, "--save-interval", "1"])
        small = flags(args, args.heads * 8, 2)
        nothing = run([*small, "--vocab-size", "64", "--train-iters", "3"]).peak_bytes
        full = [*model, *steps, "--load", base, "--finetune", "--no-load-optim", "--no-load-rng"]
        tune = [*model, *steps, "--load", base, "--tune-exit", "--exit-layer-nums"]
        tune += [*map(str, args.exits), "--use-exit-mlp", "--use-exit-norm"]
        turns = [(run(full), run(tune)) for _ in range(args.rounds)]
    ratios = [median(tuned.steps) / median(trained.steps) for trained, tuned in turns]
    peaks = [max(turn[which].peak_bytes for turn in turns) - nothing for which in (0, 1)]
    print(
        f"{args.layers} layers of {args.hidden}, vocabulary {args.vocab}, exits {args.exits}\n"
        f"  step    {median(turns[0][0].steps):.3f} s trained, {median(turns[0][1].steps):.3f} s "
        f"tuned"
    )
    table = FigureTable()
    limit = flop_ratio(args)
    table.add("step of tuning over training", ratios, TIME_BOUND, limit, better="lower")
    table.add(
        "peak memory of tuning over training",
        peaks[1] / peaks[0],
        MEMORY_BOUND,
        note=f"{peaks[0] / 2**20:.0f} -> {peaks[1] / 2**20:.0f} MiB",
        better="lower",
    )
    return table.finish(args.json)


if __name__ == "__main__":
    sys.exit(run_program(main))
