"""That figures of another model, or of other code, are known as such."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron.early_exit.evaluation import provenance
from megatron.early_exit.evaluation.provenance import fingerprint, software


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (folder / ".metadata").write_text("metadata")
    (folder / "__0_0.distcp").write_bytes(b"weights")
    return folder


def test_a_fingerprint_is_that_of_contents(model, tmp_path):
    before = fingerprint([model])
    assert fingerprint([model]) == before
    os.utime(model / "__0_0.distcp", (0, 0))
    assert fingerprint([model]) == before
    (model / "__0_0.distcp").write_bytes(b"Weights")
    after = fingerprint([model])
    assert after != before
    (model / "__0_0.distcp").rename(model / "__1_0.distcp")
    assert fingerprint([model]) not in (before, after)
    (tmp_path / "described.json").write_text("{}")
    described = fingerprint([model, tmp_path / "described.json"])
    (tmp_path / "described.json").write_text("[]")
    assert fingerprint([model, tmp_path / "described.json"]) != described


def test_large_files_are_known_by_their_size_and_date(model, monkeypatch):
    monkeypatch.setattr(provenance, "_LARGE_BYTES", 3)
    before = fingerprint([model])
    os.utime(model / "__0_0.distcp", (0, 0))
    assert fingerprint([model]) != before


def test_changes_that_are_not_committed_are_known(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    code = tmp_path / "pyproject.toml"
    code.write_text("a = 1\n")
    git("init", "--quiet")
    git("add", "pyproject.toml")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    clean = software()["commit"]
    assert len(clean) == 40
    found = set()
    for text in ("a = 2\n", "a = 3\n"):
        code.write_text(text)
        found.add(software()["commit"])
    assert len(found) == 2
    assert all(one.startswith(f"{clean}-dirty-") for one in found)
    code.unlink()
    assert software()["commit"] is None
