"""Megatron's distributed checkpoints as sources of conversions."""

from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatron.early_exit.checkpoint.conversion import Conversion
from megatron.early_exit.checkpoint.description import ModelDescription, describe
from megatron.early_exit.checkpoint.location import CheckpointLocation, locate
from megatron.early_exit.checkpoint.megatron_args import plain_args, with_description
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.checkpoint.stored_rule import StoredRule
from megatron.early_exit.checkpoint.tokenizer import TokenizerDescription
from megatron.early_exit.checkpoint.weights import LAYERS, model_weights, weight_shapes

_STATE_PREFIXES = (
    *("optimizer.", "chained_", "opt_param_", "tuning_"),
    *("rng_state", "rerun_state_machine"),
)
_STATE_ENDING = "_extra_state"
_WRITTEN_ANEW = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "use_distributed_optimizer": False,
    "ckpt_format": "torch_dist",
    # Training that starts with the model begins with the first sample.
    "iteration": 0,
    "consumed_train_samples": 0,
    "skipped_train_samples": 0,
    "consumed_valid_samples": 0,
}
"""The arguments that no longer apply to a checkpoint that a conversion has written."""


def open_checkpoint(path: str | Path) -> Conversion:
    """The model in a checkpoint, without the state of its training.

    Args:
        path: a save directory or one iteration in it, plain, with exits, or with exits only.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or it holds more than its model.
        UnsupportedArchitecture: the architecture of the model is not supported.
    """
    location = locate(path)
    description = describe(location)
    weights = model_weights(location, description)
    reader = CheckpointReader(location.iteration_dir)
    sources = {name: stored_names(reader, name) for name in weights}
    _refuse_left_over(reader, {name for names in sources.values() for name in names})
    rule = _usable_rule(description, location)
    tokenizer = _located(description, location)
    whole = replace(description, tokenizer=tokenizer, base=None, rule=rule)
    args = _stored_args(reader)
    if description.base is not None:
        # Those of the run that tuned the exits are of a part of the model.
        base = CheckpointReader(description.base.find(location.save_dir).iteration_dir)
        args = with_description(_stored_args(base), description)
    return Conversion(whole, weights, sources, args)


def open_parts(base: str | Path, exits: str | Path) -> Conversion:
    """The whole model of an exits-only checkpoint and its base.

    Args:
        base: a checkpoint of the model that the exits were tuned on, wherever it is now. Of its own
            exits and multi-token-prediction module it keeps what was not tuned.
        exits: the exits-only checkpoint; a module may be all that it holds.

    Raises:
        ValueError: one of them cannot be read, or `exits` is not an exits-only checkpoint. Reading
            a tensor raises it where the base is another model.
    """
    location = locate(exits)
    description = describe(location)
    reference = description.base
    if reference is None:
        raise ValueError(f"checkpoint {exits}: holds a whole model, there is nothing to merge")
    backbone = open_checkpoint(base)
    moved = replace(reference, path=str(locate(base).iteration_dir.resolve()))
    weights = dict(model_weights(location, replace(description, base=moved)))
    reader = CheckpointReader(location.iteration_dir)
    sources = {
        name: stored_names(reader, name) if reference.lacks(name) else backbone.sources[name]
        for name in weights
    }
    has_own_exits = bool(description.early_exit.positions)
    description = _with_heads_of(backbone.description, description)
    assert description.architecture is not None
    for name in weight_shapes(description.architecture, description.early_exit):
        if name not in weights:
            weights[name] = reference.checked_if_known(name, backbone.weights[name])
            sources[name] = backbone.sources[name]
    tokenizer = _located(description, location) or backbone.description.tokenizer
    rule = _usable_rule(description, location)
    if not has_own_exits:
        rule = rule or backbone.description.rule
    whole = replace(description, tokenizer=tokenizer, base=None, rule=rule)
    args = with_description(backbone.args, description)
    return Conversion(whole, weights, sources, args)


def _usable_rule(description: ModelDescription, location: CheckpointLocation) -> StoredRule | None:
    """The stored rule, if it was found of the weights that are read."""
    return description.rule and description.rule.of(location.iteration_dir.name)


def _with_heads_of(base: ModelDescription, tuned: ModelDescription) -> ModelDescription:
    """The description of what was tuned, with the base's exits where none of them were, and its
    multi-token-prediction module where that was not."""
    own, of_base = tuned.architecture, base.architecture
    assert own is not None
    assert of_base is not None
    if not tuned.early_exit.positions:
        tuned = replace(tuned, early_exit=base.early_exit)
    if own.mtp_num_layers:
        return tuned
    mtp = {name: getattr(of_base, name) for name in ("mtp_num_layers", "mtp_use_repeated_layer")}
    return replace(tuned, architecture=replace(own, **mtp))


def stored_names(reader: CheckpointReader, name: str) -> tuple[str, ...]:
    """The entries of a checkpoint that hold the tensor `name` of `weight_shapes`; none if it is in
    another checkpoint."""
    layer, _, rest = name.removeprefix(LAYERS).partition(".")
    stacked = f"{LAYERS}{rest}" if name.startswith(LAYERS) and layer.isdigit() else name
    for entry in (name, stacked):
        for entries in ((entry,), (f"{entry}_w", f"{entry}_v")):
            if all(one in reader.tensors for one in entries):
                return entries
    return ()


def is_state(name: str) -> bool:
    """Whether a tensor in a checkpoint belongs to training and not to the model."""
    return name.startswith(_STATE_PREFIXES) or name.endswith(_STATE_ENDING)


def _refuse_left_over(reader: CheckpointReader, used: set[str]) -> None:
    left = sorted(name for name in reader.tensors if name not in used and not is_state(name))
    if left:
        others = f" and {len(left) - 1} more tensors" if len(left) > 1 else ""
        raise ValueError(
            f"checkpoint {reader.path}: holds {left[0]}{others}, which the model that it "
            "describes does not have"
        )


def _located(
    description: ModelDescription, location: CheckpointLocation
) -> TokenizerDescription | None:
    tokenizer = description.tokenizer
    if tokenizer is None or tokenizer.model is None:
        return tokenizer
    return replace(tokenizer, model=str(location.tokenizer_dir / tokenizer.model))


def _stored_args(reader: CheckpointReader) -> Namespace | None:
    """The arguments that are stored, or None: the description says as much of the model."""
    state = {}
    with suppress(ValueError):
        state = reader.common_state()
    if "args" not in state:
        return None
    return Namespace(**{**vars(plain_args(state["args"])), **_WRITTEN_ANEW})
