"""What a run starts from: which exits of a checkpoint it uses, which directories it may touch."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.checkpoint.description import describe, write_description  # noqa: E402
from megatron.early_exit.checkpoint.location import locate  # noqa: E402
from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.training.cli.command_line import restore_exits  # noqa: E402
from megatron.early_exit.training.loop import index_cache  # noqa: E402
from megatron.early_exit.training.resume.plan import (  # noqa: E402
    ResumePlan,
    check_save_directory,
    move_conflicting,
    plan_resume,
)
from megatron.early_exit.training.resume.stored_model import StoredModel  # noqa: E402
from tests.helpers.saved_checkpoint import ARGS, name, save  # noqa: E402

NORM = {"exits.1.norm.weight": torch.ones(8), "exits.3.norm.weight": torch.ones(8)}
WITH_EXITS = {"exit_layer_nums": [1, 3], "use_exit_norm": True}


def exits(*numbers: int, **options: object) -> EarlyExitConfig:
    return EarlyExitConfig(exit_layer_nums=numbers, **options)


def arguments(**changes: object) -> Namespace:
    """A run's arguments, as far as choosing its start goes."""
    others = {
        "rank": 0,
        "load": None,
        "save": None,
        "pretrained_checkpoint": None,
        "ckpt_step": None,
        "finetune": False,
        "verify_integrity": False,
        "exit_on_missing_checkpoint": False,
        "non_persistent_ckpt_type": None,
        "non_persistent_global_ckpt_dir": None,
        "no_load_optim": None,
        "skip_train": False,
        "ckpt_format": "torch_dist",
        "moe_use_upcycling": False,
        "tokenizer_type": "NullTokenizer",
    }
    return Namespace(**{**ARGS, **others, **changes})


def start(options: EarlyExitConfig = EarlyExitConfig(), **changes: object) -> ResumePlan:  # noqa: B008
    return plan_resume(arguments(**changes), options, vocab_size=16)


def test_the_exits_of_a_checkpoint_are_those_of_the_run(tmp_path):
    path = save(tmp_path, 2, NORM, **WITH_EXITS)
    for same in (exits(1, 3, use_exit_norm=True), exits(4, 2, pre_exit=True, use_exit_norm=True)):
        assert StoredModel(path).match(same).is_exact
        found = start(same, load=tmp_path)
        assert (found.iteration, found.weights_only, found.notes) == (2, False, ())


def test_fresh_and_unused_exits_are_told_apart(tmp_path):
    match = StoredModel(save(tmp_path, 2, NORM, **WITH_EXITS)).match(
        exits(2, 3, use_exit_norm=True)
    )
    assert (match.fresh, match.unused) == ((2,), (1,))
    found = start(exits(2, 3, use_exit_norm=True), load=tmp_path)
    assert (found.iteration, found.weights_only, found.fresh_exits) == (0, True, (2,))
    args = arguments()
    found.apply_to(args)
    assert args.finetune


def test_exits_without_weights_are_known_by_the_arguments(tmp_path):
    plain, tied = save(tmp_path / "a", 2), save(tmp_path / "b", 2, exit_layer_nums=[1, 3])
    assert StoredModel(plain).match(exits(1, 3)).fresh == (1, 3)
    assert StoredModel(tied).match(exits(1, 3)).is_exact
    assert StoredModel(tied).match(exits(1, 3, use_exit_norm=True)).fresh == (1, 3)
    shared = save(tmp_path / "c", 2, exit_layer_nums=[1, 3], share_final_head=True)
    assert StoredModel(shared).match(exits(1, 3, share_final_head=True)).is_exact
    for path, options, stored in (
        (tied, exits(1, share_final_head=True), "no flag of heads"),
        (shared, exits(1), "--share-final-head"),
    ):
        with pytest.raises(ValueError, match=rf"layer 1 has another head .*\({stored}\)"):
            StoredModel(path).match(options)


def test_gates_may_be_new_where_the_run_starts_them(tmp_path):
    path = save(tmp_path / "a", 2, NORM, **WITH_EXITS)
    wanted = exits(1, 3, use_exit_norm=True, use_exit_gate=True)
    assert StoredModel(path).match(wanted, adds_gates=True).is_exact
    with pytest.raises(ValueError, match=r"layer 1 has another head .*\(--use-exit-norm\)"):
        StoredModel(path).match(wanted)
    shared = save(tmp_path / "b", 2, exit_layer_nums=[1, 3], share_final_head=True)
    wanted = exits(1, 3, share_final_head=True, use_exit_gate=True)
    assert StoredModel(shared).match(wanted, adds_gates=True).is_exact
    # Exits that are new altogether.
    assert StoredModel(save(tmp_path / "c", 2)).match(wanted, adds_gates=True).fresh == (1, 3)
    tied = save(tmp_path / "d", 2, exit_layer_nums=[1, 3])
    with pytest.raises(ValueError, match=r"layer 1 has another head .*\(no flag of heads\)"):
        StoredModel(tied).match(wanted, adds_gates=True)


def test_exits_that_only_the_tensors_show_are_known(tmp_path):
    path = save(tmp_path, 2, NORM)
    assert StoredModel(path).match(exits(1, 3, use_exit_norm=True)).is_exact


@pytest.mark.parametrize("head", [{}, {"use_exit_block": True}, {"use_exit_norm": False}])
def test_an_exit_with_another_head_is_refused(tmp_path, head):
    path = save(tmp_path, 2, NORM, **WITH_EXITS)
    with pytest.raises(ValueError, match=r"layer 1 has another head .*\(--use-exit-norm\)"):
        StoredModel(path).match(exits(1, **head))


def test_another_backbone_or_vocabulary_is_refused(tmp_path):
    save(tmp_path, 2)
    with pytest.raises(ValueError, match=r"num_layers is 4 in checkpoint .* and 6 in this run"):
        start(load=tmp_path, num_layers=6)
    with pytest.raises(ValueError, match=r"tokenizer has 17 tokens .* only 16"):
        plan_resume(arguments(load=tmp_path), EarlyExitConfig(), vocab_size=17)
    # Longer sequences are the same model where positions are relative.
    assert start(load=tmp_path, max_position_embeddings=64).iteration == 2


def test_nothing_is_loaded_at_the_first_start(tmp_path):
    assert start().checkpoint is None
    assert start(load=tmp_path / "new", save=tmp_path / "new").checkpoint is None
    with pytest.raises(ValueError, match="there is no checkpoint"):
        start(load=tmp_path / "new", save=tmp_path / "other")


def test_a_pretrained_checkpoint_is_for_the_first_start_only(tmp_path):
    save(tmp_path / "old", 8)
    here = {"load": tmp_path / "new", "save": tmp_path / "new"}
    first = start(**here, pretrained_checkpoint=tmp_path / "old")
    assert (first.checkpoint, first.iteration) == (tmp_path / "old" / "iter_0000008", 0)
    save(tmp_path / "new", 2)
    second = start(**here, pretrained_checkpoint=tmp_path / "old")
    assert (second.checkpoint, second.iteration) == (tmp_path / "new" / "iter_0000002", 2)


@pytest.mark.parametrize("named", [None, "4"])
def test_only_the_own_directory_is_mended(tmp_path, named):
    save(tmp_path, 2)
    name(tmp_path, named or "")
    if named is None:
        (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert start(load=tmp_path).ckpt_step == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    start(load=tmp_path, save=tmp_path)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_a_damaged_name_in_another_directory_is_reported(tmp_path):
    save(tmp_path, 2)
    name(tmp_path, "")
    with pytest.raises(ValueError, match="write 2 into it"):
        start(load=tmp_path)


def test_other_ranks_write_nothing(tmp_path):
    save(tmp_path, 2)
    name(tmp_path, "4")
    start(load=tmp_path, save=tmp_path, rank=1)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_checkpoints_that_a_run_does_not_continue_are_not_written_over(tmp_path):
    save(tmp_path / "here", 4)
    save(tmp_path / "there", 4)
    for changes in (
        {},
        {"load": tmp_path / "there"},
        {"pretrained_checkpoint": tmp_path / "there"},
    ):
        with pytest.raises(ValueError, match="does not continue them"):
            start(save=tmp_path / "here", **changes)
    here = {"load": tmp_path / "here", "save": tmp_path / "here"}
    with pytest.raises(ValueError, match="save to another directory"):
        start(**here, finetune=True)
    with pytest.raises(ValueError, match="save to another directory"):
        start(exits(1), **here)
    assert start(**here).iteration == 4
    assert start(load=tmp_path / "here", save=tmp_path / "here", finetune=True, skip_train=True)


def test_training_that_is_taken_back_sets_later_checkpoints_aside(tmp_path):
    for iteration in (2, 4, 6):
        save(tmp_path, iteration)
    args = arguments(load=tmp_path, save=tmp_path, ckpt_step=2)
    lines = move_conflicting(args, plan_resume(args, EarlyExitConfig(), 16))
    assert len(lines) == 2
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"]
    assert len(list((tmp_path / "set-aside").iterdir())) == 2


def test_checkpoints_of_other_formats_are_left_to_megatron(tmp_path):
    (tmp_path / "iter_0000004" / "mp_rank_00").mkdir(parents=True)
    assert move_conflicting(arguments(save=tmp_path, ckpt_format="torch"), ResumePlan()) == []
    assert (tmp_path / "iter_0000004" / "mp_rank_00").is_dir()


def test_a_newer_non_persistent_checkpoint_is_the_start(tmp_path):
    save(tmp_path, 4)
    extra = tmp_path / "non_persistent"
    save(extra, 6)
    save(extra, 8, named=False)
    (extra / "iter_0000008" / "metadata.json").unlink()
    args = arguments(load=tmp_path, save=tmp_path, non_persistent_ckpt_type="global")
    found = plan_resume(args, EarlyExitConfig(), 16)
    assert (found.checkpoint, found.iteration) == (extra / "iter_0000006", 6)
    move_conflicting(args, found)
    assert [path.name for path in extra.glob("iter_*")] == ["iter_0000006"]


@pytest.mark.parametrize(
    ("given", "flags", "expected"),
    [
        ((), {}, exits(1, 3, exit_layer_weight=(0.1, 0.3), use_exit_norm=True)),
        (("exit_layer_nums",), {"exit_layer_nums": [2]}, exits(2, use_exit_norm=True)),
        (
            ("pre_exit",),
            {"pre_exit": True},
            exits(2, 4, pre_exit=True, exit_layer_weight=(0.1, 0.3), use_exit_norm=True),
        ),
        (
            ("exit_layer_weight",),
            {"exit_layer_weight": [0.5, 0.5]},
            exits(1, 3, exit_layer_weight=(0.5, 0.5), use_exit_norm=True),
        ),
    ],
)
def test_the_command_line_wins_over_restored_exits(given, flags, expected):
    stored = exits(1, 3, exit_layer_weight=(0.1, 0.3), use_exit_norm=True)
    assert restore_exits(Namespace(**flags), stored, frozenset(given)) == expected


def test_restored_flags_that_contradict_the_command_line_are_refused():
    stored = exits(1, 3, use_exit_mlp=True)
    with pytest.raises(ValueError, match="--use-exit-mlp cannot be combined with --pre-exit"):
        restore_exits(Namespace(pre_exit=True), stored, frozenset({"pre_exit"}))


def test_indices_that_were_cut_short_are_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache, "_STILL_WRITING_S", 0.0)
    whole, cut, empty = (tmp_path / f"{name}.npy" for name in ("whole", "cut", "empty"))
    np.save(whole, np.arange(1000))
    cut.write_bytes(whole.read_bytes()[:-1])
    empty.touch()
    removed = index_cache.remove_unfinished_indices([tmp_path, tmp_path / "absent"])
    assert sorted(removed) == sorted([cut, empty])
    assert [path.name for path in tmp_path.iterdir()] == ["whole.npy"]


def test_an_index_that_grows_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "growing.npy"
    np.save(tmp_path / "whole.npy", np.arange(1000))
    content = (tmp_path / "whole.npy").read_bytes()
    path.write_bytes(content[:500])
    monkeypatch.setattr(index_cache.time, "sleep", lambda _: path.write_bytes(content[:600]))
    assert index_cache.remove_unfinished_indices([tmp_path]) == []


def test_index_folders_are_those_of_megatron():
    names = ("train_data_path", "valid_data_path", "test_data_path", "data_args_path")
    paths = dict.fromkeys((*names, "per_split_data_args_path"))
    data = ["0.3", "/data/a", "0.7", "/data/b"]
    args = Namespace(data_cache_path=None, mock_data=False, data_path=data, **paths)
    folders = [Path(f"/data/{one}/cache/GPTDataset_indices") for one in "ab"]
    assert index_cache.cache_folders(args) == folders
    args.data_cache_path = "/cache"
    assert index_cache.cache_folders(args) == [Path("/cache")]


def test_a_stored_measure_is_not_replaced(tmp_path):
    path = save(tmp_path, 2, NORM, **WITH_EXITS)
    kept = exits(1, 3, use_exit_norm=True, exit_measure="margin")
    write_description(tmp_path, replace(describe(locate(path)), early_exit=kept))
    plan = start(kept, load=tmp_path)
    check_save_directory(arguments(load=tmp_path, save=tmp_path), kept, plan)
    other = exits(1, 3, use_exit_norm=True)
    with pytest.raises(ValueError, match="--exit-measure max_probability would replace margin"):
        check_save_directory(arguments(load=tmp_path, save=tmp_path), other, plan)
