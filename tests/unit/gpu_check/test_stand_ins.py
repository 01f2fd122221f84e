"""What tools/gpu_check.py does on a GPU only, with stand-ins for it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from tests.helpers.small_gpu_check import CPU, SMALL, by_name, result, run

# The tool has put the folder of these on the path.
from gpu_sections import (  # isort: skip
    decoding,
    two_gpus,
    versions,
    waits,
)
from gpu_sections.models import make_engine, random_weights  # isort: skip


GPU = replace(SMALL, device=torch.device("cuda", 0))


def test_versions_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(name="H1", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(versions, "driver_version", lambda: "570.1")
    found = by_name(run(versions.check_versions, GPU, on_gpu=True))
    assert found["device"].found == "H1, 80 GiB, compute capability 9.0, 2 of them"
    assert found["driver"].found == "570.1"


def test_a_driver_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert versions.driver_version().startswith("unknown: ")


def test_steps_without_any_wait_have_not_been_counted(monkeypatch):
    """The host has to read the tokens: on a CPU nothing is counted, and that is not taken for
    good."""
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    compiles = []

    def here(shape, early_exit, weights, batch, length, compile_rows):
        compiles.append(compile_rows)
        weights = random_weights(shape, early_exit, CPU, torch.float32)
        return make_engine(shape, early_exit, weights, batch, length)

    monkeypatch.setattr(waits, "random_weights", lambda *_: None)
    monkeypatch.setattr(waits, "make_engine", here)
    found = run(waits.check_waits, GPU, on_gpu=True).findings
    assert [one.verdict for one in found] == ["MISSED"] * 4
    assert [one.values["waits"] for one in found] == [0.0] * 4
    assert compiles == [False, True]


def test_two_ranks_are_tried_in_all_layouts(monkeypatch):
    right = [result("abcd"), result("efgh")]
    wrong = [result("abcd"), result("efgx")]
    for one in (*right, *wrong):
        one.exit_layers = [4] * 4
    asked = []

    def generate(layout, device_type, compiles):
        asked.append((layout, device_type, compiles))
        return wrong if (layout, compiles) == ("tensor", True) else right

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(two_gpus, "generate", generate)
    monkeypatch.setattr(two_gpus, "whole_engine", lambda device: None)
    monkeypatch.setattr(two_gpus, "texts", lambda engine, shape: right)
    monkeypatch.setattr(two_gpus, "train", lambda sizes: [5.0, 5.5])
    found = run(two_gpus.check_two_gpus, GPU, on_gpu=True).findings
    assert asked == [(one, "cuda", c) for one in ("pipeline", "tensor") for c in (False, True)]
    verdicts = ["holds", "holds", "holds", "MISSED"]
    # Nor did the loss fall.
    assert [one.verdict for one in found] == [*verdicts, "MISSED"]


def test_a_batch_that_does_not_fit_into_the_memory_is_told(monkeypatch):
    def smaller(shape, early_exit, weights, batch, length, **options):
        return make_engine(shape, early_exit, weights, 1, length, **options)

    monkeypatch.setattr(decoding, "make_engine", smaller)
    found = by_name(run(decoding.check_decoding))
    line = found["plain, batch 4, context 8"]
    assert (line.found, line.verdict) == ("1 sequences fit into the memory", "MISSED")
