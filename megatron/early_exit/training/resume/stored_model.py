"""The model inside a checkpoint, compared with the one that a run is about to build.

What a checkpoint holds is known before any process group exists: its index lists every tensor, and
the arguments of the run that wrote it are stored with them.
"""

import re
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.early_exit.checkpoint.architecture import Architecture, UnsupportedArchitecture
from megatron.early_exit.checkpoint.quantization import SCALE_ENDING
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.checkpoint.weights import quantized_refusal
from megatron.early_exit.config import HEAD_PARTS, EarlyExitConfig

_WORD_EMBEDDING = "embedding.word_embeddings.weight"
_EXITS_PREFIX = "exits."
_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")
_BESIDE = frozenset(part.module for part in HEAD_PARTS if part.is_beside)
_OF_MTP = frozenset({"mtp_num_layers", "mtp_use_repeated_layer"})
_MAY_CHANGE = frozenset({"vocab_size", "params_dtype"})
"""Fields of an architecture in which runs of one model may differ; the vocabulary is compared with
what the checkpoint has rows for."""
_SAME_BUT_FOR_FUSION = {"gelu_tanh": "gelu"}


def _flags(modules: frozenset[str]) -> str:
    """The flags that ask for these modules of a head."""
    heads: dict[str, Any] = {part.field: part.module in modules for part in HEAD_PARTS}
    return EarlyExitConfig(exit_layer_nums=(1,), **heads).head_flags


def describe_exits(options: EarlyExitConfig) -> str:
    """What the exits of a model are, whatever their placement and training, for messages."""
    if not options.positions:
        return "no exits"
    layers = " ".join(map(str, options.positions))
    return f"exits after layers {layers} ({options.head_flags})"


@dataclass(frozen=True, slots=True)
class ExitMatch:
    """Exits by whether a run and a checkpoint have them."""

    fresh: tuple[int, ...]
    """Exits of the run that the checkpoint lacks."""
    unused: tuple[int, ...]
    """Exits of the checkpoint that the run lacks."""

    @property
    def is_exact(self) -> bool:
        """The checkpoint has the run's exits and no others."""
        return not (self.fresh or self.unused)


class StoredModel:
    """What is in one checkpoint.

    Args:
        path: directory of the iteration.

    Raises:
        ValueError: it cannot be read, or its matrices are in 8 bits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = CheckpointReader(path)
        if any(name.endswith(f".weight{SCALE_ENDING}") for name in self._reader.tensors):
            raise quantized_refusal(path)

    @cached_property
    def state(self) -> dict[str, Any]:
        """What all ranks of the run that wrote the checkpoint had in common."""
        return self._reader.common_state()

    @property
    def args(self) -> Any:
        """Megatron's arguments of that run; without attributes where they were not stored."""
        return self.state.get("args") or SimpleNamespace()

    @cached_property
    def exits(self) -> EarlyExitConfig:
        """The exits as that run configured them; none in a plain Megatron checkpoint."""
        return EarlyExitConfig.from_attributes(self.args)

    @cached_property
    def parts(self) -> dict[int, frozenset[str]]:
        """For each exit, the modules of its head that have weights in the checkpoint."""
        parts: dict[int, set[str]] = {position: set() for position in self.exits.positions}
        for name in self._reader.tensors:
            if name.startswith(_EXITS_PREFIX):
                _, position, part, _ = name.split(".", 3)
                parts.setdefault(int(position), set()).add(part.removeprefix("pre_mlp_layernorm"))
        return {position: frozenset(found - {""}) for position, found in parts.items()}

    @property
    def mtp_layers(self) -> int:
        """Layers of the look-ahead head that have weights in the checkpoint."""
        return len({one[1] for name in self._reader.tensors if (one := _MTP_LAYER.match(name))})

    def match(self, options: EarlyExitConfig, adds_gates: bool = False) -> ExitMatch:
        """Which of a run's exits are in the checkpoint.

        Args:
            options: the run's exits.
            adds_gates: the run starts parts beside the branches where the checkpoint lacks them.

        Raises:
            ValueError: an exit of both has another kind of head.
        """
        wanted = frozenset(part.module for part in options.head_parts)
        heads = wanted - _BESIDE
        for position in options.positions:
            found = self.parts.get(position, wanted)
            if found not in (wanted, frozenset()) and not (adds_gates and found == heads):
                is_described = position in self.exits.positions
                stored = self.exits.head_flags if is_described else _flags(found)
                raise self._other_head(position, stored, options)
            # Of heads without weights only the arguments say which they are.
            is_known = position in self.exits.positions
            shares = self.exits.share_final_head
            if is_known and not (found - _BESIDE or heads) and shares != options.share_final_head:
                raise self._other_head(position, self.exits.head_flags, options)
        known = {wanted, heads} if adds_gates else {wanted}
        same = {p for p, found in self.parts.items() if found in known}
        return ExitMatch(
            fresh=tuple(p for p in options.positions if p not in same),
            unused=tuple(p for p in sorted(self.parts) if p not in options.positions),
        )

    def _other_head(self, position: int, stored: str, options: EarlyExitConfig) -> ValueError:
        return ValueError(
            f"the exit after layer {position} has another head in checkpoint {self.path} "
            f"({stored}) than in this run ({options.head_flags}): give the flags of the "
            "checkpoint, or load a checkpoint without this exit"
        )

    def check_backbone(self, args: object, vocab_size: int, any_mtp: bool = False) -> None:
        """Compare the backbone with that of a run.

        Args:
            args: the run's validated arguments.
            vocab_size: size of the run's vocabulary, without padding.
            any_mtp: the two may have different look-ahead heads, or none.

        Raises:
            ValueError: they differ in a way that changes the model.
        """
        # Kinds of models that only Megatron knows have no description: it compares shapes.
        with suppress(UnsupportedArchitecture, TypeError):
            stored, wanted = Architecture.from_args(self.args), Architecture.from_args(args)
            but = _OF_MTP if any_mtp else frozenset()
            check_same_architecture(stored, wanted, f"checkpoint {self.path}", but)
        rows = self._reader.shape(_WORD_EMBEDDING)[0] if self._has_embedding else vocab_size
        if rows < vocab_size:
            raise ValueError(
                f"the tokenizer has {vocab_size} tokens and checkpoint {self.path} only "
                f"{rows}: use the tokenizer that it was trained with"
            )

    @property
    def _has_embedding(self) -> bool:
        return _WORD_EMBEDDING in self._reader.tensors


def check_same_architecture(
    stored: Architecture, wanted: Architecture, owner: str, but: frozenset[str] = frozenset()
) -> None:
    """Compare two backbones.

    Args:
        owner: what has the stored one, for the message.
        but: fields that may differ.

    Raises:
        ValueError: they differ in a way that changes the model.
    """
    may_change = {*_MAY_CHANGE, *but}
    if wanted.position_embedding_type != "learned_absolute":
        may_change.add("max_position_embeddings")
    for name in (f.name for f in fields(Architecture) if f.name not in may_change):
        old, new = getattr(stored, name), getattr(wanted, name)
        if _SAME_BUT_FOR_FUSION.get(old, old) != _SAME_BUT_FOR_FUSION.get(new, new):
            raise ValueError(
                f"{name} is {old} in {owner} and {new} in this run, it must be the same"
            )
