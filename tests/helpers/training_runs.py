"""Tiny training runs of the entry point, and the figures that they log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.warm_ranks import ENTRY, WarmRanks, tails

LAYERS, MICROBATCH, GLOBAL_BATCH, SEQUENCE, VOCAB = 4, 2, 8, 32, 64

BACKBONE = [
    *("--num-layers", LAYERS, "--hidden-size", 32, "--num-attention-heads", 4),
    *("--seq-length", SEQUENCE, "--max-position-embeddings", SEQUENCE),
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"),
    *("--position-embedding-type", "rope", "--hidden-dropout", 0, "--attention-dropout", 0),
    *("--init-method-std", 0.05),
]
# The end-of-document token is one more; every tensor-parallel size pads to the same vocabulary.
TOKENIZER = [
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB - 1),
    *("--make-vocab-size-divisible-by", VOCAB // 4),
]
SCHEDULE = [
    *("--micro-batch-size", MICROBATCH, "--global-batch-size", GLOBAL_BATCH),
    *("--lr", 5e-3, "--lr-decay-style", "constant", "--clip-grad", 1.0),
    *("--num-workers", 0, "--log-interval", 1, "--tensorboard-log-interval", 1),
    *("--eval-interval", 1000, "--eval-iters", 0),
]


@dataclass
class Run:
    """The output of a training run.

    Attributes:
        scalars: values of each TensorBoard tag in the order of their steps.
        steps: the steps themselves.
        output: of all ranks.
        folder: the folder of its files.
    """

    output: str
    folder: Path
    scalars: dict[str, list[float]] = field(default_factory=dict)
    steps: dict[str, list[int]] = field(default_factory=dict)


def write_documents(folder: Path) -> list[object]:
    """Write indexed data: short documents whose tokens count up in steps of one to three.

    Returns the flags for training on them; the ends of documents are masked in the loss."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = numpy.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{folder}/documents.bin", dtype=numpy.int32)
    for _ in range(3000):
        length, start, step = random.integers((4, 0, 1), (24, VOCAB - 1, 4))
        tokens = (start + step * numpy.arange(length)) % (VOCAB - 1)
        builder.add_document(torch.tensor([*tokens, VOCAB - 1]), [length + 1])
    builder.finalize(f"{folder}/documents.idx")
    return [
        *("--data-path", folder / "documents", "--split", "90,10,0"),
        *("--data-cache-path", folder / "cache", "--eod-mask-loss"),
    ]


def train(
    ranks: WarmRanks,
    folder: Path,
    nproc: int,
    flags: Sequence[object],
    script: Path = ENTRY,
    env: Mapping[str, str] | None = None,
) -> Run:
    """Run `script` on `nproc` processes with `flags` added to a tiny model's; it must succeed.

    Args:
        folder: empty or new; gets logs and TensorBoard events.
    """
    events = folder / "events"
    command = [script, *BACKBONE, *TOKENIZER, *SCHEDULE, "--tensorboard-dir", events, *flags]
    done = ranks.run(list(map(str, command)), nproc, folder, env)
    assert done.returncode == 0, f"status {done.returncode}\n{tails(done.stdout)}"
    run = Run(done.stdout, folder)
    read_events(events, run)
    return run


def read_events(folder: Path, run: Run) -> None:
    """Fill in the figures that TensorBoard's events in `folder` hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for tag in log.Tags()["scalars"]:
        run.scalars[tag] = [event.value for event in log.Scalars(tag)]
        run.steps[tag] = [event.step for event in log.Scalars(tag)]
