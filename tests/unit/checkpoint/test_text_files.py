"""Small files of text: what is read of them, and what is there when one cannot be written."""

import os

import pytest

from megatron.early_exit.checkpoint.text_files import read_json, write_whole


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read: No such file"), ("{", "is not a JSON file"), ("[]", "holds a list")],
)
def test_only_json_objects_are_read(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path} {message}"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}


def test_a_file_keeps_its_content_where_another_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "tracker.txt"
    write_whole(path, "1")

    def full(descriptor: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_whole(path, "2")
    assert path.read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]
