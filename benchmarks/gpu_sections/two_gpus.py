"""What needs two GPUs: inference over two ranks, and training by lists of actions.

On a CPU the pipeline runs over gloo, so that this code is tested there.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gpu_sections.agreement import TOLERANCES, agreement_of
from gpu_sections.findings import SectionReport
from gpu_sections.inference_rank import RANKS, divided_model, texts, whole_engine
from gpu_sections.sizes import Sizes
from gpu_sections.training import megatron_flags, run_program

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("inference_rank.py")
_LOSS = re.compile(r"lm loss: ([0-9.E+-]+|nan|inf)")


def check_two_gpus(report: SectionReport, sizes: Sizes) -> None:
    """Run each layout in two processes, and compare its texts with those of one."""
    if not sizes.on_gpu:
        _check_inference(report, sizes, "pipeline over gloo, on a CPU", "pipeline", False)
        for name in ("tensor parallelism with graphs over NCCL", "training by a list of actions"):
            report.skip(name, "it is NCCL that is to be tried", "needs two GPUs")
        return
    if (found := torch.cuda.device_count()) < RANKS:
        report.skip("inference and training on two ranks", f"found {found}", "needs two GPUs")
        return
    for layout in ("pipeline", "tensor"):
        for compiles in (False, True):
            layers = "graphs" if compiles else "plain layers"
            _check_inference(report, sizes, f"{layout}, {layers} over NCCL", layout, compiles)
    losses = train(sizes)
    report.check(
        "training by a list of actions, over NCCL",
        f"losses {', '.join(f'{loss:.3f}' for loss in losses)}",
        "finite, and falling",
        len(losses) > 1 and losses[-1] < losses[0] < float("inf"),
        losses=losses,
    )


def _check_inference(
    report: SectionReport, sizes: Sizes, name: str, layout: str, compiles: bool
) -> None:
    goal = "those of one process"
    try:
        found = generate(layout, sizes.device.type, compiles)
    except RuntimeError as error:
        # The other layouts can work all the same.
        report.check(name, str(error), goal, False)
        return
    expected = texts(whole_engine(sizes.device), divided_model(sizes.device))
    agreement = agreement_of(expected, found)
    layers = [one.exit_layers for one in expected] == [one.exit_layers for one in found]
    holds = agreement.within(TOLERANCES[torch.float32]) and (layers or not agreement.is_exact)
    report.check(
        name,
        str(agreement),
        goal,
        holds,
        num_equal=agreement.num_equal,
        num_tokens=agreement.num_tokens,
    )


def generate(layout: str, device_type: str, compiles: bool) -> Sequence[Any]:
    """What the two ranks of a layout generate.

    Raises:
        RuntimeError: they could not.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        program = [str(PROGRAM), "--layout", layout, "--device", device_type]
        program += ["--output", str(file), *(["--compile"] if compiles else [])]
        run_program([*_torchrun(), *program], os.environ)
        return [SimpleNamespace(**row) for row in json.loads(file.read_text())]


def train(sizes: Sizes) -> list[float]:
    """The losses of some iterations on two pipeline stages, with filled bubbles.

    Raises:
        RuntimeError: training failed.
    """
    flags = [
        *megatron_flags(
            {**sizes.training, "train-iters": 8, "pipeline-model-parallel-size": RANKS}
        ),
        *("--global-batch-size", "16", "--fill-explicit-bubbles", "--log-interval", "1"),
        *("--eval-iters", "0"),
    ]
    command = [*_torchrun(), str(REPOSITORY / "pretrain_early_exit_gpt.py"), *flags]
    output = run_program(command, os.environ)
    return [float(loss) for loss in _LOSS.findall(output)]


def _torchrun() -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(RANKS)]
