"""The file that makes a saved model self-contained, and the tokenizer's files beside it.

`early_exit_model.json` in the save directory holds the backbone's shape, the exits, and how text
becomes tokens; `tokenizer/` holds what the tokenizer was loaded from. Inference reads these two and
never needs the command line that trained the model.
"""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.architecture import Architecture, UnsupportedArchitecture
from megatron.early_exit.checkpoint.base import BaseReference
from megatron.early_exit.checkpoint.bridge import bridge_args
from megatron.early_exit.checkpoint.location import (
    DESCRIPTION_NAME,
    TOKENIZER_NAME,
    CheckpointLocation,
    locate,
)
from megatron.early_exit.checkpoint.quantization import Quantization
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.checkpoint.stored_rule import KEY, StoredRule
from megatron.early_exit.checkpoint.text_files import read_json, write_whole
from megatron.early_exit.checkpoint.tokenizer import (
    TokenizerDescription,
    install_tokenizer,
    load_tokenizer,
)
from megatron.early_exit.config import EarlyExitConfig

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_QUANTIZED_FORMAT = 2
"""Of models in 8 bits: programs that do not know them must not take their matrices for others."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Everything about a saved model except its weights."""

    architecture: Architecture | None
    """None for a model that inference cannot compute (yet)."""
    early_exit: EarlyExitConfig
    """Where exits are, and what their heads are made of."""
    tokenizer: TokenizerDescription | None
    """The tokenizer; None where the arguments of training name none."""
    base: BaseReference | None = None
    """The model that has the backbone, if only the exits are saved."""
    quantization: Quantization | None = None
    """Which matrices are stored in 8 bits; None for a model without any."""
    rule: StoredRule | None = None
    """How tokens leave where a request does not say it; None where nothing is stored."""

    @classmethod
    def from_args(
        cls,
        args: object,
        early_exit: EarlyExitConfig,
        vocab_size: int | None = None,
        eod_id: int | None = None,
    ) -> "ModelDescription":
        """Describe the model that Megatron's validated arguments build.

        Args:
            args: a namespace with Megatron's argument names.
            early_exit: the model's exits.
            vocab_size: size of the tokenizer's vocabulary.
            eod_id: the token that ends a document.
        """
        try:
            architecture = Architecture.from_args(args, vocab_size)
        except UnsupportedArchitecture:
            architecture = None
        return cls(architecture, early_exit, TokenizerDescription.from_args(args, eod_id))

    def to_dict(self) -> dict[str, Any]:
        """The description as JSON values."""
        quantized = self.quantization
        return {
            "format": _FORMAT if quantized is None else _QUANTIZED_FORMAT,
            "architecture": None if self.architecture is None else self.architecture.to_dict(),
            "early_exit": self.early_exit.to_dict(),
            "tokenizer": None if self.tokenizer is None else asdict(self.tokenizer),
            "base": None if self.base is None else asdict(self.base),
            **({} if quantized is None else {"quantization": asdict(quantized)}),
            **({} if self.rule is None else {KEY: self.rule.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelDescription":
        """The inverse of `to_dict`.

        Raises:
            ValueError: the values are not a description, or of a newer format.
        """
        if values.get("format") not in (_FORMAT, _QUANTIZED_FORMAT):
            raise ValueError(
                f"format {values.get('format')!r} is unknown, allowed: {_FORMAT} or "
                f"{_QUANTIZED_FORMAT}"
            )
        try:
            architecture, tokenizer = values["architecture"], values["tokenizer"]
            base = values.get("base")
            quantization = values.get("quantization")
            rule = values.get(KEY)
            return cls(
                None if architecture is None else Architecture(**architecture),
                EarlyExitConfig(**values["early_exit"]),
                None if tokenizer is None else TokenizerDescription(**tokenizer),
                None if base is None else BaseReference(**base),
                None if quantization is None else Quantization(**quantization),
                None if rule is None else StoredRule.from_dict(rule),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"does not fit this version: {error}") from error


def write_description(save_dir: str | Path, description: ModelDescription) -> None:
    """Write the description and copy the tokenizer's files beside the checkpoints.

    One process calls it, once, before the first checkpoint. A reader at any moment sees the old
    description or the new one.

    Args:
        save_dir: where training saves; created if missing.
        description: what to write; its tokenizer's path is where the files are now.

    Raises:
        ValueError: the tokenizer's files are not where the description says.
    """
    save_dir = Path(save_dir)
    save_dir.mkdir(parents=True, exist_ok=True)
    if description.tokenizer is not None:
        installed = install_tokenizer(description.tokenizer, save_dir / TOKENIZER_NAME)
        description = replace(description, tokenizer=installed)
    text = json.dumps(description.to_dict(), indent=2) + "\n"
    write_whole(save_dir / DESCRIPTION_NAME, text)


def read_description(path: str | Path) -> ModelDescription:
    """Read the description of a saved model.

    Args:
        path: a save directory or one iteration in it. Without a description in the save directory
            (a plain Megatron checkpoint) the arguments stored inside the checkpoint are used, or
            Megatron Bridge's file beside its weights.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
        UnsupportedArchitecture: inference cannot compute the model; the message names the feature.
    """
    return describe(locate(path))


def describe(location: CheckpointLocation) -> ModelDescription:
    """`read_description` for a checkpoint that is located already.

    Raises:
        ValueError: see `read_description`.
    """
    description = read_saved_description(location.save_dir)
    if description is None or description.architecture is None:
        return _describe_from_args(location)
    description.early_exit.validate(description.architecture.num_layers)
    return description


def read_saved_description(save_dir: Path) -> ModelDescription | None:
    """The description that `write_description` wrote, or None.

    Raises:
        ValueError: it is damaged.
    """
    path = save_dir / DESCRIPTION_NAME
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        description = ModelDescription.from_dict({**values, KEY: None})
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"model description {path}: {error}") from error
    return replace(description, rule=_usable_rule(path, values.get(KEY), description.early_exit))


def _usable_rule(path: Path, values: Any, early_exit: EarlyExitConfig) -> StoredRule | None:
    """The stored rule; None where there is none, or where it does not fit the model."""
    if values is None:
        return None
    try:
        rule = StoredRule.from_dict(values)
        rule.check(early_exit)
    except ValueError as error:
        # The model can be used without it.
        _LOG.warning("model description %s: the stored rule is ignored: %s", path, error)
        return None
    return rule


def _describe_from_args(location: CheckpointLocation) -> ModelDescription:
    state = CheckpointReader(location.iteration_dir).common_state()
    args = state["args"] if "args" in state else bridge_args(location.iteration_dir)
    if args is None:
        raise ValueError(
            f"checkpoint {location.iteration_dir}: contains no arguments of its training"
        )
    kind = TokenizerDescription.from_args(args)
    if kind is not None and kind.model is not None:
        # The file may well be on the machine that trained the model only.
        path = Path(kind.model).resolve()
        kind = replace(kind, model=str(path)) if path.exists() else None
    tokenizer = None if kind is None else load_tokenizer(kind, location.tokenizer_dir)
    vocab_size = None if tokenizer is None else tokenizer.vocab_size
    early_exit = EarlyExitConfig.from_attributes(args)
    architecture = Architecture.from_args(args, vocab_size)
    early_exit.validate(architecture.num_layers)
    return ModelDescription(architecture, early_exit, kind)
