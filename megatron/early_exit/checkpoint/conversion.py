"""The conversion of a model from one format to another, and the checkpoint that it writes."""

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from torch import Tensor

from megatron.early_exit.checkpoint.description import ModelDescription
from megatron.early_exit.checkpoint.lazy import LazyTensor, LazyWeights, content_hash
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.megatron_args import described_args, with_description
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.checkpoint.weights import stored_weights
from megatron.early_exit.checkpoint.writer import (
    Report,
    check_written,
    new_directory,
    write_checkpoint,
)

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""Matches the number of a layer or an exit, but not the digits inside `linear_fc1`."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A model that has been opened for conversion, under this package's names.

    Attributes:
        description: of the model; its tokenizer's path is where the files are now.
        weights: its tensors, those of `weight_shapes`.
        sources: for each tensor, the names of those of the source that it is made of.
        args: Megatron's arguments, if the source has them.
    """

    description: ModelDescription
    weights: LazyWeights
    sources: Mapping[str, tuple[str, ...]]
    args: Namespace | None = None

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.num_bytes for tensor in self.weights.values())

    def remade(
        self,
        description: ModelDescription,
        weights: LazyWeights,
        sources: Mapping[str, tuple[str, ...]],
    ) -> "Conversion":
        """Another model made of this one, whose arguments say what its description does."""
        return Conversion(description, weights, sources, with_description(self.args, description))

    def write(self, target: Path, report: Report = lambda name, num_bytes: None) -> None:
        """Write the checkpoint and read it again.

        Args:
            target: a directory that is empty or does not exist.
            report: called twice for each tensor, when it is written and when it has been verified.

        Raises:
            ValueError: a tensor or file cannot be read or written, or differs when it is read
                again; nothing is left at `target`.
        """
        hashes: dict[str, str] = {}

        def noted(name: str, tensor: LazyTensor) -> LazyTensor:
            def read() -> Tensor:
                found = tensor.read()
                hashes[name] = content_hash(found)
                return found

            return replace(tensor, read=read)

        watched = {name: noted(name, tensor) for name, tensor in self.weights.items()}
        args = self.args or described_args(self.description)
        with new_directory(target) as partial:
            write_checkpoint(partial, watched, self.description, args, report)
            _check(partial, self.description, hashes, report)


def _check(
    directory: Path, description: ModelDescription, hashes: Mapping[str, str], report: Report
) -> None:
    assert description.architecture is not None
    reader = CheckpointReader(locate(directory).iteration_dir)
    stored = stored_weights(
        reader,
        description.architecture,
        description.early_exit,
        quantization=description.quantization,
    )
    check_written(stored, hashes, report)


def match_table(sources: Mapping[str, tuple[str, ...]], weights: LazyWeights) -> list[str]:
    """One line for each kind of tensor: their number, what they are made of, and their shape.

    Tensors of one kind differ only in the number of their layer or exit.
    """
    rows = [
        (_pattern(name), " + ".join(map(_pattern, sources[name])), str(list(weights[name].shape)))
        for name in weights
    ]
    kinds = [(row, len(list(same))) for row, same in groupby(sorted(rows))]
    widths = [max(len(row[column]) for row, _ in kinds) for column in (0, 1)]
    return [
        f"{count:5} x  {target:{widths[0]}}  <-  {source:{widths[1]}}  {shape}"
        for (target, source, shape), count in kinds
    ]


def _pattern(name: str) -> str:
    return _NUMBER.sub("N", name)
