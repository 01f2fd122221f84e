"""A summary of the contents of a checkpoint, for people.

Parameters are counted as they are stored, including rows that pad the vocabulary.
"""

import textwrap
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.architecture import UnsupportedArchitecture
from megatron.early_exit.checkpoint.base import is_of_exit, is_of_mtp
from megatron.early_exit.checkpoint.bridge import bridge_args
from megatron.early_exit.checkpoint.description import describe
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.quantization import SCALE_ENDING
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.checkpoint.source import is_state
from megatron.early_exit.checkpoint.stored_rule import StoredRule
from megatron.early_exit.config import EarlyExitConfig

_LAYOUT = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "expert": "expert_model_parallel_size",
}


MTP_PART = "multi-token prediction"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """The contents of one checkpoint. A field is None if the checkpoint does not say."""

    path: str
    """The folder of the iteration."""
    iteration: int | None
    """The iteration that it was saved at."""
    size_bytes: int
    """Size on the disk."""
    dtypes: tuple[str, ...]
    """The formats of the model's tensors."""
    layout: dict[str, int] | None
    """Sizes of tensor, pipeline and expert parallelism with which it was written."""
    architecture: dict[str, Any] | None
    """Sizes and kinds of the backbone's parts."""
    unsupported: str | None
    """The reason why inference cannot compute the model; None if it can."""
    exits: dict[int, str]
    """The flags of each exit's head, by the exit's position."""
    early_exit: dict[str, Any] | None
    """The fields of `EarlyExitConfig`."""
    parameters: dict[str, int]
    """Number of parameters of each part."""
    tokenizer: dict[str, Any] | None
    """The kind of the tokenizer, and where it is."""
    base: str | None
    """Path of the backbone, for a checkpoint with exits only."""
    quantization: dict[str, Any] | None
    """Which matrices are in 8 bits."""
    rule: StoredRule | None
    """How tokens leave where a request does not say it, and what is promised of it."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The fields as lines of text."""
        facts = {
            "checkpoint": self.path,
            "iteration": _or_unknown(self.iteration),
            "size": f"{self.size_bytes / 1e6:,.1f} MB, {', '.join(self.dtypes)}",
            "written at": _or_unknown(_joined(self.layout)),
        }
        if self.base is not None:
            facts["exits only"] = f"the backbone is {self.base}"
        if self.quantization is not None:
            heads = " and of heads" if self.quantization["heads"] else ""
            facts["quantized"] = (
                f"matrices of layers{heads} in {self.quantization['weight_dtype']}, with a scale "
                "for each output channel; for inference only"
            )
        facts |= self._about_rule()
        facts["tokenizer"] = _or_unknown(_joined(self.tokenizer))
        facts["model"] = self.unsupported or _or_unknown(_joined(self.architecture))
        lines = [_wrapped(name, str(value)) for name, value in facts.items()]
        lines += [f"{'exit':12}after layer {p}: {flags}" for p, flags in self.exits.items()]
        widest = max(map(len, self.parameters))
        lines += [
            f"{'parameters':12}{name:{widest}}  {count:>17,}"
            for name, count in self.parameters.items()
        ]
        return lines

    def _about_rule(self) -> dict[str, str]:
        if self.rule is None:
            return {}
        other = (
            ""
            if self.rule.iteration == Path(self.path).name
            else f" (of {self.rule.iteration} only)"
        )
        return {
            "default": self.rule.sentence() + other,
            "promise": self.rule.promise.sentence(),
        }


def inspect(path: str | Path) -> Inspection:
    """Summarise a checkpoint.

    Args:
        path: a save directory or one iteration in it.

    Raises:
        ValueError: there is no distributed checkpoint, or it is damaged.
    """
    location = locate(path)
    reader = CheckpointReader(location.iteration_dir)
    description, unsupported = None, None
    try:
        description = describe(location)
    except UnsupportedArchitecture as error:
        unsupported = str(error)
    state: dict[str, Any] = {}
    # The description may say enough; where it does not, `describe` has refused already.
    with suppress(ValueError):
        state = reader.common_state()
    args = state.get("args") or bridge_args(location.iteration_dir)
    layout = {name: getattr(args, flag, None) for name, flag in _LAYOUT.items()}
    entries = reader.tensors.items()
    dtypes = {entry.properties.dtype for name, entry in entries if not is_state(name)}
    early_exit = EarlyExitConfig() if description is None else description.early_exit
    base = None if description is None else description.base
    as_dict = {} if description is None else description.to_dict()
    return Inspection(
        path=str(location.iteration_dir),
        iteration=state.get("iteration"),
        size_bytes=sum(f.stat().st_size for f in location.iteration_dir.rglob("*") if f.is_file()),
        dtypes=tuple(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        layout={k: v for k, v in layout.items() if isinstance(v, int)} or None,
        architecture=as_dict.get("architecture"),
        unsupported=unsupported,
        exits=dict.fromkeys(early_exit.positions, early_exit.head_flags),
        early_exit=as_dict.get("early_exit"),
        parameters=count_parameters({name: tuple(entry.size) for name, entry in entries}),
        tokenizer=as_dict.get("tokenizer"),
        base=None if base is None else base.path,
        quantization=as_dict.get("quantization"),
        rule=None if description is None else description.rule,
    )


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The number of values in the parts of a model, including the state of its training but not
    scales of matrices, by the shapes of tensors under the names of `weight_shapes` or of a
    checkpoint."""
    counts = Counter[str]()
    for name, shape in shapes.items():
        if not name.endswith(f".weight{SCALE_ENDING}"):
            counts[_part(name)] += prod(shape)
    counts["model"] = counts.total() - counts["optimizer"]
    return {part: counts[part] for part in sorted(counts, key=_order)}


def _part(name: str) -> str:
    if is_state(name):
        return "optimizer"
    if is_of_exit(name):
        return f"exit after layer {name.split('.')[1]}"
    if is_of_mtp(name):
        return MTP_PART
    if name.startswith("embedding."):
        return "embedding"
    return "layers" if name.startswith("decoder.layers.") else "final head"


def _order(part: str) -> tuple[int, int]:
    words = part.split()
    if words[0] == "exit":
        return 3, int(words[-1])
    parts = ("embedding", "layers", "final head", "exit", MTP_PART, "model", "optimizer")
    return parts.index(part), 0


def _wrapped(name: str, value: str) -> str:
    return textwrap.fill(
        f"{name:12}{value}",
        width=100,
        subsequent_indent=" " * 12,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _joined(values: Mapping[str, Any] | None) -> str | None:
    if values is None:
        return None
    known = {name: value for name, value in values.items() if value not in (None, False, ())}
    return ", ".join(f"{name} {value}" for name, value in known.items())


def _or_unknown(value: object) -> str:
    return "not known" if value is None else str(value)
