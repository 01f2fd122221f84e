"""The sections of tools/gpu_check.py that start processes of their own, on a CPU."""

from __future__ import annotations

from tests.helpers.small_gpu_check import SIZES, by_name
from tests.helpers.small_gpu_check import run as run_section
from tools import gpu_check

# The tool has put the folder of these on the path.
from gpu_sections import ee_tuning, marked_tests, training, two_gpus  # isort: skip


def run(section) -> dict[str, object]:
    return by_name(run_section(section, SIZES))


def test_gradients_are_compared_and_steps_are_timed():
    gradients, time, waits = run(training.check_training).values()
    # Two processes on the same device.
    assert gradients.values["largest_error"] < 1e-6
    # Of four layers five matrices and norms each, two embeddings and the exits.
    assert gradients.values["parameters"] > 20
    assert gradients.verdict == waits.verdict == "not on a CPU"
    assert time.values["ratio"] > 0.5


def test_memory_of_frozen_and_tuned_parameters():
    found = run(ee_tuning.check_ee_tuning)
    for kind, each in (("frozen", 4), ("tuned", 16)):
        line = found[f"bytes per {kind} parameter, in fp32"]
        assert line.verdict == "holds"
        assert abs(line.values["bytes_of_each"] - each) < 0.01 * each
        assert line.values["parameters"] > 10_000


def test_two_stages_generate_what_one_process_does():
    found = run(two_gpus.check_two_gpus)
    line = found["pipeline over gloo, on a CPU"]
    assert line.verdict == "holds"
    assert line.values == {"num_equal": 96, "num_tokens": 96}
    assert [one.verdict for one in found.values()][1:] == ["needs two GPUs"] * 2


def test_a_layout_that_cannot_run_is_found(monkeypatch):
    monkeypatch.setattr(two_gpus, "PROGRAM", two_gpus.PROGRAM.with_name("none.py"))
    (line, *_) = run(two_gpus.check_two_gpus).values()
    assert line.verdict == "MISSED"
    assert "a process failed" in line.found


def test_training_by_a_list_of_actions():
    losses = two_gpus.train(SIZES)
    assert len(losses) == 8
    assert all(0 < loss < 100 for loss in losses)


def test_tests_that_need_a_gpu_are_not_passed_without_one():
    (line,) = run(marked_tests.check_marked_tests).values()
    assert line.verdict == "not on a CPU"
    assert line.values["tests"] == line.values["skipped"] > 5
    assert line.values["passed"] == 0


def test_every_section_is_there():
    for name in gpu_check.SECTIONS:
        assert callable(gpu_check._function(name))
