"""What a run starts from: the checkpoint that it loads, and what of it.

Rank 0 decides before any process group exists, where a mistake still ends in one sentence. The
other ranks learn of it when the groups are there, just before Megatron loads; only then are files
moved. Everything is said to Megatron in its own options, nothing of it is replaced.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.early_exit.checkpoint.base import BaseReference
from megatron.early_exit.checkpoint.description import ModelDescription, read_saved_description
from megatron.early_exit.checkpoint.location import TRACKER_NAME
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.training.loop.filling_options import MEASURED_RATIO
from megatron.early_exit.training.resume.checkpoint_directory import Checkpoint, CheckpointDirectory
from megatron.early_exit.training.resume.stored_model import (
    StoredModel,
    check_same_architecture,
    describe_exits,
)

_NON_PERSISTENT = "non_persistent"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePlan:
    """Where a run begins, the same on every rank."""

    checkpoint: Path | None = None
    """What is loaded; None starts from random weights."""
    directory: Path | None = None
    """The directory of the run that saved it."""
    iteration: int = 0
    """Iterations completed at the start."""
    weights_only: bool = False
    """Load as with `--finetune`: optimizer, learning rate and data begin anew."""
    fresh_exits: tuple[int, ...] = ()
    """Exits that are not in the checkpoint."""
    ckpt_step: int | None = None
    """Names the checkpoint to Megatron where the text file does not."""
    base: BaseReference | None = None
    """The model whose exits are tuned, which is not what Megatron loads."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""
    measured_ratio: float | None = None
    """What the run that saved it has measured for `--backward-forward-ratio auto`."""

    def apply_to(self, args: Any) -> None:
        """Tell Megatron, through its own options."""
        if self.base is not None:
            args.pretrained_checkpoint = None
            args.load = args.load if self.checkpoint is not None else None
        if self.ckpt_step is not None:
            args.ckpt_step = self.ckpt_step
        if self.weights_only:
            args.finetune = True
        if self.measured_ratio is not None:
            setattr(args, MEASURED_RATIO, self.measured_ratio)


@dataclass(frozen=True, slots=True)
class ResolvedCheckpoint:
    """The checkpoint that a run loads."""

    checkpoint: Checkpoint
    directory: Path
    """The one given on the command line."""
    ckpt_step: int | None
    """Names it to Megatron where the text file does not."""
    weights_only: bool
    """It is the `--pretrained-checkpoint`: training begins anew."""
    is_named: bool
    """The text file in its directory is in order."""


def is_torch_dist(args: Any) -> bool:
    """Whether checkpoints are of the torch_dist format, which this module is about."""
    return bool(args.ckpt_format == "torch_dist" and not args.moe_use_upcycling)


def find_checkpoint(args: Any) -> ResolvedCheckpoint | None:
    """The checkpoint that Megatron is to load; None to start from random weights.

    On rank 0 this mends the text file that names the checkpoint, where the run saves to the same
    directory.

    Raises:
        ValueError: there is none where one should be, or it is damaged.
    """
    for flag, path in (
        ("--load", args.load),
        ("--pretrained-checkpoint", args.pretrained_checkpoint),
    ):
        if path is None:
            continue
        directory = CheckpointDirectory(path, args.verify_integrity)
        found = directory.find(args.ckpt_step) if directory.path.is_dir() else None
        if found is not None:
            ckpt_step = _name_to_megatron(directory, found, args)
            recent = _non_persistent(args, directory, found) if flag == "--load" else None
            return ResolvedCheckpoint(
                recent or found,
                directory.path,
                ckpt_step,
                weights_only=flag != "--load",
                is_named=directory.tracker != "",
            )
        is_first_start = _is_same(path, args.save) and not args.exit_on_missing_checkpoint
        if not is_first_start and (flag != "--load" or args.pretrained_checkpoint is None):
            raise ValueError(f"{flag} {path}: there is no checkpoint")
    return None


def _name_to_megatron(directory: CheckpointDirectory, found: Checkpoint, args: Any) -> int | None:
    """Make Megatron load `found`; returns the `--ckpt-step` that this takes, if any."""
    named = directory.tracker
    is_release = found.path.name == "release"
    if is_release or named == str(found.iteration):
        return None
    if _is_same(directory.path, args.save):
        if args.rank == 0 and (not args.ckpt_step or not named):
            directory.set_tracker(found.iteration)
    elif named == "":
        raise ValueError(
            f"{directory.path / TRACKER_NAME} is damaged: write {found.iteration} into it to load "
            "the newest whole checkpoint"
        )
    return found.iteration


def _non_persistent(
    args: Any, directory: CheckpointDirectory, found: Checkpoint
) -> Checkpoint | None:
    """The checkpoint of `--non-persistent-save-interval` that Megatron prefers to `found`."""
    if args.non_persistent_ckpt_type != "global":
        return None
    extra = _non_persistent_directory(args, directory.path)
    try:
        recent = extra.find()
    except ValueError:
        recent = None
    if args.rank == 0 and _is_same(directory.path, args.save):
        if recent is None:
            extra.drop_tracker()
        elif extra.tracker != str(recent.iteration):
            extra.set_tracker(recent.iteration)
    return recent if recent is not None and recent.iteration >= found.iteration else None


def _non_persistent_directory(args: Any, beside: str | Path) -> CheckpointDirectory:
    path = args.non_persistent_global_ckpt_dir or Path(beside) / _NON_PERSISTENT
    return CheckpointDirectory(path, args.verify_integrity)


def plan_resume(args: Any, exits: EarlyExitConfig, vocab_size: int) -> ResumePlan:
    """Choose the start of a run; for rank 0.

    Args:
        args: the run's validated arguments.
        exits: the exits it is to have.
        vocab_size: size of its vocabulary, without padding.

    Raises:
        ValueError: the checkpoint does not fit the run, or what the run saves would destroy
            checkpoints that are there.
    """
    source = find_checkpoint(args)
    start = ResumePlan()
    if source is not None:
        saved = read_saved_description(source.directory)
        if saved is not None and saved.base is not None:
            raise ValueError(
                f"checkpoint {source.directory}: holds exits only: give --tune-exit to go on "
                "tuning them, or join them with their base (tools/checkpoint.py merge-exits)"
            )
        start = start_from(source, args, exits, vocab_size)
    check_save_directory(args, exits, start)
    return start


def start_from(
    source: ResolvedCheckpoint, args: Any, exits: EarlyExitConfig, vocab_size: int
) -> ResumePlan:
    """The start that a checkpoint gives; see `plan_resume`."""
    found = source.checkpoint
    stored = StoredModel(found.path)
    stored.check_backbone(args, vocab_size)
    match = stored.match(exits)
    anew = bool(args.finetune) or source.weights_only or found.path.name == "release"
    weights_only = anew or not match.is_exact
    if not weights_only:
        _check_optimizer_layout(stored, args)
    notes = []
    if not match.is_exact:
        parts = [_exits(match.fresh, "not in it and start fresh")]
        parts.append(_exits(match.unused, "in it but not in this run and are left out"))
        notes.append(
            f"checkpoint {found.path}: {', '.join(filter(None, parts))}; the rest is loaded, "
            "optimizer, learning rate and data start anew at iteration 0 (as with --finetune)"
        )
    return ResumePlan(
        checkpoint=found.path,
        directory=source.directory,
        iteration=0 if weights_only else found.iteration,
        weights_only=weights_only,
        fresh_exits=match.fresh,
        ckpt_step=source.ckpt_step,
        notes=tuple(notes),
        measured_ratio=None if weights_only else getattr(stored.args, MEASURED_RATIO, None),
    )


def _exits(positions: tuple[int, ...], what: str) -> str:
    if not positions:
        return ""
    numbers = ", ".join(map(str, positions))
    return f"the exits after layers {numbers} are {what}"


def _check_optimizer_layout(stored: StoredModel, args: Any) -> None:
    if args.no_load_optim or getattr(stored.args, "no_save_optim", False):
        return
    metadata = stored.state.get("content_metadata") or {}
    sharding = metadata.get("distrib_optim_sharding_type")
    if args.use_distributed_optimizer != (sharding is not None):
        had = "with" if sharding else "without"
        raise ValueError(
            f"checkpoint {stored.path} was saved {had} --use-distributed-optimizer: continue "
            f"{had} it, or give --no-load-optim to start the optimizer anew"
        )
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    old = [getattr(stored.args, name, 1) for name in names]
    if sharding == "dp_reshardable" and old != [getattr(args, name) for name in names]:
        raise ValueError(
            f"the optimizer state in checkpoint {stored.path} was saved with "
            "--no-dist-ckpt-optim-fully-reshardable and only fits "
            f"--tensor-model-parallel-size {old[0]} --pipeline-model-parallel-size {old[1]}: use "
            "these, or give --no-load-optim to start the optimizer anew"
        )


def check_save_directory(args: Any, exits: EarlyExitConfig, start: ResumePlan) -> None:
    """Refuse to write into a directory whose checkpoints this run does not continue.

    Raises:
        ValueError: it would.
    """
    if args.save is None or args.skip_train:
        return
    save = CheckpointDirectory(args.save, args.verify_integrity)
    has_progress = save.has_progress()
    if not (has_progress or save.has_release()):
        return
    stored = read_saved_description(save.path)
    if not _is_same(start.directory, args.save):
        has_exits_only = stored is not None and stored.base is not None
        could_go_on = has_exits_only == (start.base is not None)
        is_loaded = _is_same(args.load, args.save)
        hint = f"give --load {args.save}, or " if could_go_on and not is_loaded else ""
        raise ValueError(
            f"--save {args.save} holds checkpoints, and this run does not continue them but would "
            f"write over them: {hint}save to another directory"
        )
    if stored is not None:
        _check_description(stored, args, exits)
    if start.weights_only and has_progress:
        what = start.notes[0] if start.notes else "--finetune starts at iteration 0"
        raise ValueError(
            f"--save {args.save} holds the checkpoints that this run starts from and it would "
            f"write over them ({what}): save to another directory"
        )


def _check_description(stored: ModelDescription, args: Any, exits: EarlyExitConfig) -> None:
    wanted = ModelDescription.from_args(args, exits)
    if stored.architecture is not None and wanted.architecture is not None:
        check_same_architecture(stored.architecture, wanted.architecture, f"--save {args.save}")
    measure = stored.early_exit.exit_measure
    if exits.positions and stored.early_exit.positions and measure != exits.exit_measure:
        raise ValueError(
            f"--exit-measure {exits.exit_measure} would replace {measure}, which --save "
            f"{args.save} stores: give --exit-measure {measure}, or save to another directory"
        )
    old, new = describe_exits(stored.early_exit), describe_exits(exits)
    if old != new:
        raise ValueError(
            f"--save {args.save} holds a model with {old}, and this run asks for {new}: give the "
            "same, or save to another directory"
        )


def _is_same(path: str | Path | None, other: str | Path | None) -> bool:
    if path is None or other is None:
        return False
    return Path(path).resolve() == Path(other).resolve()


def share_plan(plan: ResumePlan | None) -> ResumePlan:
    """Hand rank 0's decision to every rank; a collective call over all of them."""
    box = [plan]
    torch.distributed.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def move_conflicting(args: Any, start: ResumePlan) -> list[str]:
    """Move what the run would write over; called on one rank, while no other loads or saves.

    Returns:
        A line for each thing done.
    """
    if args.save is None or args.skip_train or not is_torch_dist(args):
        return []
    save = CheckpointDirectory(args.save, args.verify_integrity)
    lines = save.clear_after(start.iteration)
    if args.non_persistent_ckpt_type == "global":
        lines += _non_persistent_directory(args, args.save).clear_after(start.iteration)
    if start.iteration and save.tracker != str(start.iteration):
        save.set_tracker(start.iteration)
    return lines
