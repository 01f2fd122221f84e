"""Measure what exits cost in training: step time, compared with floating-point operations, and peak
memory.

    python benchmarks/training_overhead.py [--stages 2] [--exits 2 4] [--steps 12] ...

The standard and the early-exit model are built in the same processes, in the same layout, and run
alternately step by step, so that noise affects both. Peak memory is measured in separate processes
with one model each, without the memory that was in use before the model was built. The theoretical
limit of the time is the ratio of floating-point operations. With exits only on the first stage of a
pipeline whose last stage has the final head, less time is possible, because the exits are computed
in the first stage's idle time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from figures import FigureTable, add_json_flag

from megatron.early_exit.process_family import run_program

REPOSITORY = Path(__file__).resolve().parents[1]
# glibc keeps freed blocks below its threshold, and raises the threshold by itself: what a process
# holds would be what it once needed. With this, large tensors go back when they are freed.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "2000000"}
# What exits may cost, the memory with a vocabulary of 32,000 or more.
TIME_BOUND, MEMORY_BOUND = 1.05, 1.02
WORKER = REPOSITORY / "benchmarks" / "training_worker.py"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, default=2, help="pipeline stages (processes)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--exits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each model")
    add_json_flag(parser)
    parser.add_argument(
        "extra", nargs="*", help="after --: more flags for both models, e.g. --bf16"
    )
    return parser.parse_args()


def flags(args: argparse.Namespace) -> list[str]:
    """Megatron's flags of both models."""
    text = f"""
        --num-layers {args.layers} --hidden-size {args.hidden} --num-attention-heads {args.heads}
        --seq-length {args.seq_length} --max-position-embeddings {args.seq_length}
        --micro-batch-size {args.micro_batch_size}
        --global-batch-size {args.micro_batch_size * args.microbatches}
        --pipeline-model-parallel-size {args.stages}
        --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
        --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights
        --tokenizer-type NullTokenizer --vocab-size {args.vocab} --mock-data
        --train-iters 1000 --lr 1e-4 --exit-layer-nums {" ".join(map(str, args.exits))}
    """
    return [*text.split(), *args.extra]


def run_worker(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Run the worker on every stage; returns what each rank measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(args.stages), str(WORKER), *flags(args)),
        ]
        environment = {
            **os.environ,
            "OVERHEAD_MODEL": model,
            "OVERHEAD_STEPS": str(args.steps),
            "OVERHEAD_OUTPUT": folder,
            **(RETURN_FREED_MEMORY if model != "both" else {}),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1" if args.stages > 1 else "2"),
        }
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"{done.stderr[-9000:]}\nerror: the benchmark's worker failed")
        files = sorted(Path(folder).glob("rank*.json"))
        return [json.loads(file.read_text()) for file in files]


def main() -> int:
    """Measure and print; returns the exit status."""
    args = parse()
    timed = run_worker(args, "both")
    times = {
        name: [max(step) for step in zip(*(rank[name] for rank in timed), strict=True)]
        for name in ("standard", "early_exit")
    }
    ratios = [b / a for a, b in zip(times["standard"], times["early_exit"], strict=True)]
    flops = timed[0]["flops"]
    peaks = {
        name: [rank["peak_bytes"] for rank in run_worker(args, name)]
        for name in ("standard", "early_exit")
    }
    flop_ratio = flops["early_exit"] / flops["standard"]
    memory_ratio = max(peaks["early_exit"]) / max(peaks["standard"])
    by_rank = [round(b / a, 3) for a, b in zip(peaks["standard"], peaks["early_exit"], strict=True)]
    device = timed[0]["device"]
    print(
        f"{args.stages} stage(s), {args.layers} layers of {args.hidden}, vocabulary {args.vocab}, "
        f"exits after {args.exits}, on {device}\n"
        f"  step       standard {median(times['standard']):.3f} s, "
        f"early exit {median(times['early_exit']):.3f} s"
    )
    table = FigureTable(stages=args.stages)
    table.add("step with exits over standard", ratios, limit=flop_ratio, better="lower")
    of_limit = [ratio / flop_ratio for ratio in ratios]
    table.add("the same over the ratio of FLOPs", of_limit, TIME_BOUND, better="lower")
    table.add(
        "peak memory of the fullest rank, with exits over standard",
        memory_ratio,
        MEMORY_BOUND,
        1.0,
        f"{max(peaks['standard']) / 2**20:.0f} -> {max(peaks['early_exit']) / 2**20:.0f} MiB; "
        f"by rank {by_rank}",
        better="lower",
    )
    details = {
        "device": device,
        "exits": args.exits,
        "step_seconds": {name: median(values) for name, values in times.items()},
        "flop_ratio": flop_ratio,
        "peak_bytes": peaks,
    }
    return table.finish(args.json, details)


if __name__ == "__main__":
    sys.exit(run_program(main))
