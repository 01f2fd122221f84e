"""What a few layers of a model took on a machine, and its file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from megatron.early_exit.checkpoint.text_files import read_json, write_whole
from megatron.early_exit.ranges import ABOVE_ZERO, ZERO_OR_MORE

Part = Literal["layer", "embedding", "head", "exit"]
"""A part of a model: one backbone layer, the word embedding, the final head with its loss, or one
exit with its own."""

Pass = Literal["forward", "backward"]
"""The direction in which a microbatch goes through a part."""

MEASURED_SIZES = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "seq_length"),
)
"""The fields of a `ModelShape` that the time of a part depends on."""

Seconds = Mapping[Part, Mapping[Pass, float]]


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """Measured times of a model's parts on one accelerator.

    Attributes:
        machine: what it was measured on, for people.
        dtype: of weights and activations, bf16 or fp32.
        shape: the sizes of `MEASURED_SIZES`.
        exit_heads: the flags of the exits' heads (`EarlyExitConfig.head_flags`); None without
            exits.
        seconds_by_size: of each pass through each part, for each number of sequences of a
            microbatch.

    Raises:
        ValueError: sizes or parts are missing or more than these, or a time is out of range.
    """

    machine: str
    dtype: str
    shape: Mapping[str, int]
    exit_heads: str | None
    seconds_by_size: Mapping[int, Seconds]

    def __post_init__(self) -> None:
        _check_names("shape", self.shape, MEASURED_SIZES)
        if not self.seconds_by_size or min(self.seconds_by_size) < 1:
            raise ValueError("it has no times, or of microbatches below 1")
        for size, seconds in self.seconds_by_size.items():
            _check_names(f"microbatches of {size}", seconds, self.parts)
            for part, passes in seconds.items():
                _check_names(f"{part} with microbatches of {size}", passes, get_args(Pass))
                for name, value in passes.items():
                    allowed = ABOVE_ZERO if part == "layer" else ZERO_OR_MORE
                    if value not in allowed:
                        raise ValueError(
                            f"the {name} of {part} with microbatches of {size} takes {value} s, "
                            f"allowed: {allowed}"
                        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """What was measured."""
        every: tuple[Part, ...] = get_args(Part)
        return every if self.exit_heads is not None else every[:-1]

    @property
    def sizes(self) -> list[int]:
        """The measured numbers of sequences, ascending."""
        return sorted(self.seconds_by_size)

    def has_measured(self, num_sequences: int) -> bool:
        """Whether so many sequences are within what was measured."""
        return self.sizes[0] <= num_sequences <= self.sizes[-1]

    def seconds(self, part: Part, name: Pass, num_sequences: int) -> float:
        """Seconds of one pass: linear between measured sizes, proportional beyond them. So no size
        looks better for not having been measured."""
        known = {n: self.seconds_by_size[n][part][name] for n in self.sizes}
        nearest = min(max(num_sequences, self.sizes[0]), self.sizes[-1])
        low = max(size for size in self.sizes if size <= nearest)
        high = min(size for size in self.sizes if size >= nearest)
        share = (nearest - low) / (high - low) if high > low else 0.0
        return (known[low] + share * (known[high] - known[low])) * num_sequences / nearest

    def write(self, path: Path) -> None:
        """Write it as JSON; the file is whole or not there.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "LayerProfile":
        """Read what was written.

        Raises:
            ValueError: there is no such file, or it is something else.
        """
        content = read_json(path)
        try:
            _check_names("it", content, tuple(field.name for field in fields(cls)))
            by_size = {int(size): times for size, times in content["seconds_by_size"].items()}
            return cls(**{**content, "seconds_by_size": by_size})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a profile of layers: {error}") from None


def _check_names(where: str, found: Mapping[Any, Any], wanted: tuple[str, ...]) -> None:
    if set(found) != set(wanted):
        raise ValueError(
            f"{where} has {', '.join(found) or 'nothing'}, allowed: {', '.join(wanted)}"
        )
