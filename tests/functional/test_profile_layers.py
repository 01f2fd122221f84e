"""tools/profile_layers.py: measures a tiny model, and the planner takes what it wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.early_exit.planner.costs.layer_profile import LayerProfile
from tests.helpers.speed import patient
from tools import plan_pipeline, profile_layers

ROOT = Path(__file__).parents[2]
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --vocab-size 1024 --seq-length 32 "
    "--exit-layer-nums 2"
)


def run(words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/profile_layers.py", *words.split()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patient(120))


def test_a_plan_from_a_profile(tmp_path, capsys):
    path = tmp_path / "profile.json"
    done = run(f"{MODEL} --micro-batch-size 4 1 --repeats 7 --output {path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: ")
    assert "(platform: " in done.stdout
    note, *lines = done.stderr.splitlines()
    assert note.startswith("bf16 counts as slow on this CPU")
    parts = ("layer", "embedding", "head", "exit")
    assert lines == [f"measuring {p}, --micro-batch-size {n}" for p in parts for n in (1, 4)]
    assert [one.name for one in tmp_path.iterdir()] == ["profile.json"]

    profile = LayerProfile.read(path)
    assert (profile.sizes, profile.dtype) == ([1, 4], "bf16")
    assert all(profile.seconds("layer", "backward", size) > 0 for size in (1, 4))

    words = f"{MODEL} --gpus 4 --global-batch-size 16 --profile {path} --top 1 --json"
    assert plan_pipeline.main(words.split()) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["times"].startswith("times measured in bf16 with microbatches of 1, 4 on ")
    assert answer["plans"][0]["step_s"] > 0

    # A second run keeps the first one's file.
    assert profile_layers.main([*MODEL.split(), "--output", str(path)]) == 2
    assert "exists already (--overwrite replaces it)" in capsys.readouterr().err
    assert LayerProfile.read(path) == profile


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{MODEL} --micro-batch-size 1 0", "--micro-batch-size 0 is out of range, allowed: 1 or"),
        (f"{MODEL} --repeats 0", "--repeats 0 is out of range, allowed: 1 or more"),
        ("--config 8b", "--config 8b is neither a model nor a file, allowed: 1.3b"),
        (f"{MODEL} --exit-layer-nums 5", "--exit-layer-nums 5 is out of range, allowed: 1 to 4"),
        (f"{MODEL} --output {{folder}}", "is a folder, allowed: a file"),
        (f"{MODEL} --output {{folder}}/no/profile.json", "there is no folder"),
    ],
)
def test_refusals_are_one_sentence(tmp_path, capsys, words, message):
    given = words if "--output" in words else f"{words} --output {{folder}}/profile.json"
    assert profile_layers.main(given.format(folder=tmp_path).split()) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_too_small_is_said(tmp_path, capsys, monkeypatch):
    import torch

    from megatron.early_exit.training import part_profile

    def measure(self, sizes, repeats, progress):
        progress("head", 64)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(part_profile.PartProfiler, "measure", measure)
    words = f"{MODEL} --micro-batch-size 64 --output {tmp_path}/profile.json"
    assert profile_layers.main(words.split()) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error == (
        "error: head, --micro-batch-size 64 does not fit into memory, allowed: fewer sequences"
    )
