"""Which checkpoint is loaded after a run was killed, and what becomes of the others."""

import os
import shutil
from pathlib import Path

import pytest

from megatron.early_exit.training.resume.checkpoint_directory import CheckpointDirectory
from tests.helpers.saved_checkpoint import name, save


def test_an_empty_or_absent_directory_has_no_checkpoint(tmp_path):
    assert CheckpointDirectory(tmp_path).find() is None
    assert CheckpointDirectory(tmp_path / "absent").find() is None


def test_the_named_checkpoint_is_found(tmp_path):
    save(tmp_path, 2)
    path = save(tmp_path, 4)
    found = CheckpointDirectory(tmp_path).find()
    assert (found.path, found.iteration) == (path, 4)


def _interrupt_before_data(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def _interrupt_before_index(path: Path) -> None:
    (path / ".metadata").unlink()
    (path / "metadata.json").unlink()


def _interrupt_before_config(path: Path) -> None:
    (path / "metadata.json").unlink()


def _interrupt_within_config(path: Path) -> None:
    (path / "metadata.json").write_text("")


def _cut_the_index(path: Path) -> None:
    index = path / ".metadata"
    index.write_bytes(index.read_bytes()[:-20])


def _cut_the_data(path: Path) -> None:
    data = next(path.glob("*.distcp"))
    os.truncate(data, data.stat().st_size - 1)


def _lose_the_data(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


_DAMAGE = [
    _interrupt_before_data,
    _interrupt_before_index,
    _interrupt_before_config,
    _interrupt_within_config,
    _cut_the_index,
    _cut_the_data,
    _lose_the_data,
]


@pytest.mark.parametrize("damage", _DAMAGE)
@pytest.mark.parametrize("named", ["2", "4", "", "garbage", None])
def test_an_incomplete_checkpoint_is_passed_over(tmp_path, damage, named):
    save(tmp_path, 2)
    damage(save(tmp_path, 4))
    name(tmp_path, named or "")
    if named is None:
        (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    directory = CheckpointDirectory(tmp_path)
    assert directory.find().iteration == 2
    assert directory.defect(directory.path_of(4))


@pytest.mark.parametrize("damage", _DAMAGE)
def test_without_a_whole_checkpoint_there_is_nothing_to_start_from(tmp_path, damage):
    damage(save(tmp_path, 4, named=False))
    assert CheckpointDirectory(tmp_path).find() is None
    name(tmp_path, "4")
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*iter_0000004: "):
        CheckpointDirectory(tmp_path).find()


def test_a_whole_checkpoint_that_was_not_named_in_time_is_preferred(tmp_path):
    save(tmp_path, 2)
    path = save(tmp_path, 4, named=False)
    _set_time(path / "metadata.json", after=tmp_path / "latest_checkpointed_iteration.txt")
    assert CheckpointDirectory(tmp_path).find().iteration == 4


def test_a_user_who_takes_training_back_is_believed(tmp_path):
    save(tmp_path, 2)
    path = save(tmp_path, 4)
    name(tmp_path, "2")
    _set_time(tmp_path / "latest_checkpointed_iteration.txt", after=path / "metadata.json")
    assert CheckpointDirectory(tmp_path).find().iteration == 2


def _set_time(path: Path, after: Path) -> None:
    then = after.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(then, then))


def test_a_chosen_checkpoint_must_be_whole(tmp_path):
    save(tmp_path, 2)
    _cut_the_data(save(tmp_path, 4))
    directory = CheckpointDirectory(tmp_path)
    assert directory.find(2).iteration == 2
    with pytest.raises(ValueError, match=r"iter_0000004 cannot be loaded: .*is cut short"):
        directory.find(4)
    with pytest.raises(ValueError, match=r"iter_0000006 cannot be loaded: there is no such"):
        directory.find(6)


def test_a_released_model_is_found(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "release")
    name(tmp_path, "release")
    found = CheckpointDirectory(tmp_path).find()
    assert (found.path.name, found.iteration) == ("release", 0)
    _lose_the_data(tmp_path / "release")
    with pytest.raises(ValueError, match=r"release cannot be loaded"):
        CheckpointDirectory(tmp_path).find()


def test_the_legacy_format_is_refused(tmp_path):
    (tmp_path / "iter_0000004" / "mp_rank_00").mkdir(parents=True)
    name(tmp_path, "4")
    with pytest.raises(ValueError, match="legacy format"):
        CheckpointDirectory(tmp_path).find()


def test_hashes_are_needed_where_they_will_be_read(tmp_path):
    path = save(tmp_path, 2)
    assert CheckpointDirectory(tmp_path, needs_hashes=True).defect(path)
    (path / "integrity.json").write_text('{"files": {}}')
    assert CheckpointDirectory(tmp_path, needs_hashes=True).defect(path) is None


def test_what_would_be_written_over_is_cleared_away(tmp_path):
    save(tmp_path, 2)
    _interrupt_before_index(save(tmp_path, 4))
    _interrupt_before_config(save(tmp_path, 6))
    save(tmp_path, 8)
    lines = CheckpointDirectory(tmp_path).clear_after(2)
    assert len(lines) == 3
    assert CheckpointDirectory(tmp_path).iterations() == [2]
    assert sorted(p.name for p in (tmp_path / "set-aside").iterdir()) == [
        "iter_0000006",
        "iter_0000008",
    ]
    save(tmp_path, 8)
    CheckpointDirectory(tmp_path).clear_after(2)
    assert (tmp_path / "set-aside" / "iter_0000008.2" / "metadata.json").is_file()


def test_nothing_up_to_the_start_is_touched(tmp_path):
    for iteration in (2, 4, 6):
        save(tmp_path, iteration)
    _cut_the_data(tmp_path / "iter_0000002")
    _interrupt_before_index(tmp_path / "iter_0000004")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert CheckpointDirectory(tmp_path).clear_after(6) == []
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_legacy_checkpoint_is_moved_but_never_removed(tmp_path):
    (tmp_path / "iter_0000004" / "mp_rank_00").mkdir(parents=True)
    CheckpointDirectory(tmp_path).clear_after(0)
    assert (tmp_path / "set-aside" / "iter_0000004" / "mp_rank_00").is_dir()


def test_the_text_file_is_replaced_at_once(tmp_path):
    save(tmp_path, 2)
    directory = CheckpointDirectory(tmp_path)
    directory.set_tracker(4)
    assert directory.tracker == "4"
    assert {p.name for p in tmp_path.iterdir()} == {
        "iter_0000002",
        "latest_checkpointed_iteration.txt",
    }
    directory.drop_tracker()
    assert directory.tracker is None


def test_progress_is_a_whole_checkpoint_of_a_run(tmp_path):
    directory = CheckpointDirectory(tmp_path)
    assert not directory.has_progress()
    _lose_the_data(save(tmp_path, 2))
    assert not directory.has_progress()
    save(tmp_path, 4)
    assert directory.has_progress()
    shutil.rmtree(tmp_path / "iter_0000004")
    assert not directory.has_progress()
