"""What a run that tunes heads starts from: a model, or the heads that an earlier run has saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.early_exit.checkpoint.base import BaseReference
from megatron.early_exit.checkpoint.description import read_saved_description
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.training.resume.plan import (
    ResolvedCheckpoint,
    ResumePlan,
    check_save_directory,
    find_checkpoint,
    start_from,
)
from megatron.early_exit.training.resume.stored_model import StoredModel
from megatron.early_exit.training.tuning.base_model import describe_base
from megatron.early_exit.training.tuning.options import TuningOptions, looks_ahead


def decide_tuning(
    args: Any, options: TuningOptions, exits: EarlyExitConfig, vocab_size: int
) -> ResumePlan:
    """Choose the start of a run that tunes exits; for rank 0.

    `--load` may name the model itself, or exits that were saved; `--pretrained-checkpoint` is the
    model, for runs whose `--load` is still empty, or whose model has been moved.

    Args:
        args: the run's validated arguments.
        options: of the tuning.
        exits: the exits that the run is to have.
        vocab_size: size of its vocabulary, without padding.

    Raises:
        ValueError: there is no model, it does not fit the run, or what the run saves would destroy
            checkpoints that are there.
    """
    source = find_checkpoint(args)
    if source is None:
        raise ValueError("--tune-exit needs a model, give --load or --pretrained-checkpoint")
    saved = read_saved_description(source.directory)
    if saved is None or saved.base is None:
        start = _from_model(source, args, options, exits, vocab_size)
    elif source.weights_only:
        raise ValueError(
            f"--pretrained-checkpoint {args.pretrained_checkpoint}: holds exits only, allowed: the "
            "model that they were tuned on"
        )
    else:
        start = start_from(source, args, exits, vocab_size)
        base = _where_it_is(saved.base, source.directory, args.pretrained_checkpoint)
        start = replace(start, base=base)
    check_save_directory(args, exits, start)
    return start


def _from_model(
    source: ResolvedCheckpoint,
    args: Any,
    options: TuningOptions,
    exits: EarlyExitConfig,
    vocab_size: int,
) -> ResumePlan:
    path = source.checkpoint.path
    stored = StoredModel(path)
    stored.check_backbone(args, vocab_size, any_mtp=True)
    fresh = stored.match(exits, adds_gates=True).fresh
    base = describe_base(path, looks_ahead(args))
    heads = ["the exits"] if exits.positions else []
    heads += ["a look-ahead head"] if looks_ahead(args) else []
    notes = [
        f"tuning {' and '.join(heads)} of {path}, with {args.num_layers} of "
        f"{args.full_num_layers} layers"
    ]
    how = "random weights" if options.random_init else "copies of its own modules"
    if fresh:
        numbers = ", ".join(map(str, fresh))
        notes.append(f"the exits after layers {numbers} are not in it and start with {how}")
    kept = sorted(set(stored.exits.positions) - set(exits.positions))
    if kept:
        numbers = ", ".join(map(str, kept))
        notes.append(
            f"its exits after layers {numbers} are no part of this run"
            + ("; tools/checkpoint.py merge-exits keeps them" if not exits.positions else "")
        )
    lacks_layers = looks_ahead(args) and stored.mtp_layers < (
        1 if args.mtp_use_repeated_layer else args.mtp_num_layers
    )
    if lacks_layers:
        notes.append(f"a layer or more of the look-ahead head are not in it and start with {how}")
    if options.random_init and not (fresh or lacks_layers):
        raise ValueError(f"--random-init has no effect: {path} has all heads of this run")
    return ResumePlan(fresh_exits=fresh, base=base, notes=tuple(notes))


def _where_it_is(base: BaseReference, directory: Path, given: str | None) -> BaseReference:
    if given is None:
        base.find(directory)
        return base
    return replace(base, path=str(locate(given).iteration_dir.resolve()))
