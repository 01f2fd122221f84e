"""Training of a small model with exits: the same gradients as on a CPU, its time and its waits."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gpu_sections.findings import SectionReport
from gpu_sections.sizes import Sizes

_EXCEPTION = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b")
PROGRAM = Path(__file__).with_name("training_rank.py")
EXITS = (1, 2)
TOLERANCE = 1e-4
"""Of the difference of a parameter's gradient, relative to the gradient's length."""


def check_training(report: SectionReport, sizes: Sizes) -> None:
    """Compare gradients with those of a CPU, and time steps with and without exits."""
    with tempfile.TemporaryDirectory() as name:
        own, other = Path(name) / "device", Path(name) / "cpu"
        figures = run_rank(sizes, own, "times", on_gpu=sizes.on_gpu)
        run_rank(sizes, other, "gradients", on_gpu=False)
        found, expected = (
            torch.load(folder / f"{device}.pt", weights_only=True)
            for folder, device in ((own, figures["device"]), (other, "cpu"))
        )
    worst, error = largest_error(expected, found)
    report.check(
        f"gradients in fp32 against a CPU's, {len(expected)} parameters",
        f"{error:.1e} off at most, in {worst}",
        f"{TOLERANCE:g} or less",
        error <= TOLERANCE,
        # On one device even rounding is the same.
        gpu_only="the same device twice" if error <= TOLERANCE else "",
        largest_error=error,
        parameters=len(expected),
    )
    seconds = figures["seconds"]
    ratio = median(a / b for a, b in zip(seconds["early_exit"], seconds["standard"], strict=True))
    report.measure(
        f"step with exits after layers {EXITS[0]} and {EXITS[1]} over one without",
        f"{ratio:.2f} ({median(seconds['early_exit']) * 1e3:.1f} ms)",
        ratio=ratio,
    )
    if waits := figures["waits"]:
        report.measure(
            "waits per step, with and without exits",
            f"{waits['early_exit']} and {waits['standard']}",
            **waits,
        )
    else:
        report.skip("waits per step", "the host is the device")


def run_rank(sizes: Sizes, folder: Path, part: str, on_gpu: bool, steps: int = 5) -> dict[str, Any]:
    """Run the program of one rank; returns its figures.

    Args:
        folder: gets its files.
        part: what it measures.
        on_gpu: whether it may see the GPUs.

    Raises:
        RuntimeError: it failed.
    """
    folder.mkdir()
    environment = {
        **os.environ,
        "GPU_CHECK_PARTS": part,
        "GPU_CHECK_FOLDER": str(folder),
        "GPU_CHECK_STEPS": str(steps),
    }
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    run_program([sys.executable, str(PROGRAM), *megatron_flags(sizes.training)], environment)
    (file,) = folder.glob("*.json")
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def megatron_flags(shape: Mapping[str, int]) -> list[str]:
    """Megatron's flags of the model, with layers that a CPU can compute as well as a GPU.

    Args:
        shape: flags with numbers, without their dashes; they override what is usual here.
    """
    sizes = {**shape, "max-position-embeddings": shape["seq-length"]}
    text = f"""
        --micro-batch-size 2 --global-batch-size 4
        --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
        --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights
        --tokenizer-type NullTokenizer --mock-data --train-iters 1000 --lr 1e-4
        --exit-layer-nums {EXITS[0]} {EXITS[1]}
        --transformer-impl local --no-persist-layer-norm --no-rope-fusion
        --no-masked-softmax-fusion
    """
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    # Where a flag is given twice the last one counts.
    return [*text.split(), *words]


def run_program(command: list[str], environment: Mapping[str, str]) -> str:
    """Run a command to its end; returns what it prints.

    Raises:
        RuntimeError: it failed; with the exception that it ended with, or its last words.
    """
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        # torchrun's own exception says nothing of the one that a rank has ended with.
        lines = [line for line in done.stderr.splitlines() if "ChildFailedError" not in line]
        reasons = [line for line in lines if _EXCEPTION.match(line)]
        reason = (reasons or lines or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"a process failed: {reason}")
    return done.stdout


def largest_error(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[str, float]:
    """The parameter whose gradient differs most, and by how much relative to its length.

    Raises:
        RuntimeError: they are not of the same parameters, or there is no gradient at all.
    """
    if set(expected) != set(found):
        raise RuntimeError(f"parameters of one model only: {set(expected) ^ set(found)}")
    errors = {}
    for name, gradient in expected.items():
        length = float(gradient.norm())
        if length == 0:
            raise RuntimeError(f"the gradient of {name} is 0")
        errors[name] = float((found[name] - gradient).norm()) / length
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst]
