"""What the sections of tools/gpu_check.py find on a CPU, and that they find what is wrong."""

from __future__ import annotations

import itertools
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from megatron.early_exit.config import EarlyExitConfig
from tests.helpers.compiler import needs_compiler
from tests.helpers.small_gpu_check import CPU, SMALL, by_name, run

# The tool has put the folder of these on the path.
from gpu_sections import (  # isort: skip
    attention,
    caches,
    decoding,
    graphs,
    marked_tests,
    out_of_memory,
    training,
    two_gpus,
    versions,
    waits,
)
from gpu_sections.models import make_engine, random_weights  # isort: skip
from gpu_sections.parameter_memory import parameter_memory  # isort: skip
from gpu_sections.sizes import LLAMA_7B  # isort: skip
from gpu_sections.step_limits import copy_bandwidth, step_bytes  # isort: skip


def test_versions():
    found = by_name(run(versions.check_versions))
    assert found["PyTorch"].found == torch.__version__
    assert found["megatron-core"].found.startswith("0.19")
    backends = found["attention backends, first choice first"].found
    assert {"FLASH_ATTENTION", "MATH"} <= set(backends.split(", "))
    assert found["driver and device"].verdict == "not on a CPU"


def test_order_of_attention_backends_is_pytorch_s_without_those_that_are_off(monkeypatch):
    order = versions.attention_order()
    monkeypatch.setattr(torch.backends.cuda, "math_sdp_enabled", lambda: False)
    assert versions.attention_order() == [one for one in order if one != "MATH"]


def test_attention_without_cudnn_is_no_comparison():
    found = by_name(run(attention.check_attention))
    counts = found["attention operators with cuDNN"].values["counts"]
    # Three steps after the prompt, and the prompt, through four layers.
    assert counts == {"flash_attention_for_cpu": 16}
    assert "no cuDNN here" in found["time with cuDNN over without"].found
    tokens = found["12 greedy tokens"]
    assert tokens.verdict == "not on a CPU"
    assert tokens.values == {"num_equal": 12, "num_tokens": 12}


def test_attention_that_computes_something_else_is_found_on_a_cpu_too(monkeypatch):
    @contextmanager
    def other_weights():
        scaled = torch.nn.functional.scaled_dot_product_attention
        wrong = lambda *tensors, **options: 1.5 * scaled(*tensors, **options)  # noqa: E731
        with patch.object(torch.nn.functional, "scaled_dot_product_attention", wrong):
            yield

    monkeypatch.setattr(attention, "with_cudnn", other_weights)
    found = by_name(run(attention.check_attention))
    assert found["12 greedy tokens"].verdict == "MISSED"


def test_cudnn_is_put_in_front_for_the_layers(monkeypatch):
    asked = []
    given = lambda backends, set_priority=False: asked.append(backends) or nullcontext()  # noqa: E731
    monkeypatch.setattr(attention, "sdpa_kernel", given)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attention.with_cudnn():
        attention.segment.sdpa_kernel([])
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert asked[0][0].name == "CUDNN_ATTENTION"
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    assert attention.segment.sdpa_kernel is not given


@needs_compiler
def test_compiled_layers_agree_with_plain_ones():
    found = by_name(run(graphs.check_graphs))
    for length in (7, 9):
        line = found[f"compiled against plain, 1 to 3 rows, prompts of {length}"]
        assert line.verdict == "holds"
        # Four rows in all, four tokens each.
        assert (line.values["num_equal"], line.values["num_tokens"]) == (16, 16)
        assert 0 < line.values["largest_difference"] < 1e-4
    assert found["graphs captured"].verdict == "not on a CPU"
    assert found["memory after the same requests 1 times more"].values["new_graphs"] == 0


def test_compiled_layers_that_compute_something_else_are_found(monkeypatch):
    def wrong(shape, early_exit, weights, batch, length, compile_rows, prefix_caching):
        factor = 1.05 if compile_rows else 1.0
        name = "decoder.layers.0.mlp.linear_fc1.weight"
        weights = {**weights, name: weights[name] * factor}
        return make_engine(shape, early_exit, weights, batch, length)

    monkeypatch.setattr(graphs, "make_engine", wrong)
    # As on a GPU, where graphs have to be captured.
    report = run(graphs.check_graphs, on_gpu=True)
    found = by_name(report)
    assert found["compiled against plain, 1 to 3 rows, prompts of 7"].verdict == "MISSED"
    assert found["graphs captured"].verdict == "MISSED"
    assert report.has_failed


def test_graphs_are_counted():
    class Graph:
        def capture_begin(self, pool=None):
            return pool

    with graphs.counted_graphs(Graph) as counter:
        assert [Graph().capture_begin(), Graph().capture_begin(pool=3)] == [None, 3]
    Graph().capture_begin()
    assert counter.count == 2


def test_a_step_waits_once_on_a_pretended_gpu():
    found = by_name(run(waits.check_waits))
    for layers, name in itertools.product(("plain", "captured"), ("greedy", "sampled")):
        line = found[f"waits per step, {name}, {layers} layers, on a pretended GPU"]
        assert (line.values["waits"], line.verdict) == (1.0, "holds")


def test_warnings_of_waits_are_counted(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits.counted_waits() as counts:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["default", "warn", "default"]
    assert counts.total() == 3
    (place,) = counts
    assert Path(__file__).name in place


def test_decoding():
    found = by_name(run(decoding.check_decoding))
    shape = SMALL.large_model
    assert found["bandwidth of the memory, by a copy"].values["bytes_per_second"] > 1e8
    for batch in SMALL.batches:
        full = found[f"plain, batch {batch}, context 8"].values
        exits = [found[f"plain, batch {batch}, context 8, exit {layer}"].values for layer in (1, 2)]
        assert full["bytes"] > step_bytes(shape, shape.num_layers, 4, batch, 8)
        assert exits[0]["ideal_gain"] > exits[1]["ideal_gain"] > 1
        assert all(one["gain"] == full["seconds"] / one["seconds"] for one in exits)
    assert found["plain, batch 1, context 8"].verdict == "not on a CPU"


def test_decoding_below_its_goals_is_found():
    report = run(decoding.check_decoding, replace(SMALL, batches=(1,)), on_gpu=True)
    # A tiny model's steps take Python's time, so they cannot be near the memory's.
    assert by_name(report)["plain, batch 1, context 8"].verdict == "MISSED"
    assert report.has_failed


def test_steps_that_are_timed_leave_where_they_should():
    shape = SMALL.large_model
    exits = EarlyExitConfig(exit_layer_nums=(1, 2))
    weights = random_weights(shape, exits, CPU, torch.float32)
    engine = make_engine(shape, exits, weights, 2, 64, prefix_caching=True)
    for layer in (1, 2, None):
        time = decoding.step_time(engine, SMALL, 2, 8, layer)
        assert time.exit_layers == {layer or shape.num_layers}
        assert 8 < time.context < 8 + decoding.most_tokens(SMALL, 2)
        assert time.seconds > 0


def test_bytes_of_a_step():
    """Mistral 7B by hand: its layers and one projection, and 128 KiB for each position."""
    layer = 4096 * 128 * (32 + 32 + 8 + 8) + 3 * 4096 * 14336
    assert step_bytes(LLAMA_7B, 32, 2, 0, 0) == 2 * (32 * layer + 32000 * 4096)
    cache = step_bytes(LLAMA_7B, 32, 2, 64, 4096) - step_bytes(LLAMA_7B, 32, 2, 0, 0)
    assert cache == 64 * 4096 * 2**17
    assert copy_bandwidth(CPU, 2**20) > 1e8


def test_memory_of_caches():
    found = run(caches.check_caches).findings
    assert [one.verdict for one in found] == ["not on a CPU", "not on a CPU", "holds"]
    assert found[2].found.startswith("the same tokens as before")


def test_an_engine_goes_on_after_it_has_run_out_of_memory():
    found = run(out_of_memory.check_out_of_memory).findings
    assert [one.verdict for one in found] == ["holds", "holds"]
    # The pass that fails scores the prompt of one of four requests.
    assert found[0].values["num_failed"] == 1
    assert "the engine has run out of memory" in found[0].found


def test_an_engine_that_never_runs_out_of_memory_shows_nothing(monkeypatch):
    monkeypatch.setattr(out_of_memory, "one_failing_pass", nullcontext)
    first, second = run(out_of_memory.check_out_of_memory).findings
    assert (first.verdict, second.verdict) == ("MISSED", "holds")


def test_the_memory_of_a_gpu_is_limited_to_what_is_held(monkeypatch):
    limits = []
    properties = SimpleNamespace(total_memory=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share)
    )
    with out_of_memory.memory_limit(torch.device("cuda", 0)):
        assert limits == [0.25]
    assert limits == [0.25, 1.0]


def test_marked_tests_are_counted(tmp_path):
    mark = "import pytest\npytestmark = pytest.mark.gpu\n"
    tests = "def test_a(): pass\ndef test_b(): assert False\ndef test_c(): pytest.skip('no')\n"
    (tmp_path / "test_marked.py").write_text(mark + tests)
    (tmp_path / "test_other.py").write_text("def test_d(): pass\n")
    files = marked_tests.marked_files(tmp_path)
    assert [file.name for file in files] == ["test_marked.py"]
    counts, bad = marked_tests.run_tests(files)
    assert counts == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1}
    assert bad == "test_b"


def test_marked_tests_that_fail_are_found_on_a_cpu_too(monkeypatch):
    counts = {"tests": 3, "failures": 0, "errors": 0, "skipped": 3}
    monkeypatch.setattr(marked_tests, "run_tests", lambda files: (counts, "test_x"))
    (line,) = run(marked_tests.check_marked_tests).findings
    assert line.verdict == "not on a CPU"
    counts |= {"errors": 1, "skipped": 2}
    (line,) = run(marked_tests.check_marked_tests).findings
    assert (line.verdict, line.found.endswith("2 skipped: test_x")) == ("MISSED", True)
    # On a GPU a skipped test has not passed.
    counts |= {"errors": 0, "skipped": 1}
    (line,) = run(marked_tests.check_marked_tests, on_gpu=True).findings
    assert line.verdict == "MISSED"
    counts |= {"skipped": 0}
    (line,) = run(marked_tests.check_marked_tests, on_gpu=True).findings
    assert (line.verdict, line.values["passed"]) == ("holds", 3)


def test_the_files_with_marked_tests_are_found():
    names = {file.name for file in marked_tests.marked_files(marked_tests.REPOSITORY / "tests")}
    assert {"test_devices.py", "test_head_loss.py", "test_recorder.py"} <= names
    # It has such tests in the text that it writes.
    assert "test_sections.py" not in names


def test_gradients_that_differ_are_found():
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(4)}
    found = {"a": torch.tensor([3.0, 4.5]), "b": torch.ones(4)}
    assert training.largest_error(expected, found) == ("a", pytest.approx(0.1))
    with pytest.raises(RuntimeError, match="one model only"):
        training.largest_error(expected, {"a": found["a"]})
    with pytest.raises(RuntimeError, match="gradient of a is 0"):
        training.largest_error({"a": torch.zeros(2)}, {"a": torch.zeros(2)})


def test_memory_of_parameters_is_counted_tensor_by_tensor():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(5, 7))
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(model[1].parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    found = parameter_memory([model], SimpleNamespace(optimizer=optimizer))
    # Each tensor of a torch optimizer's states also has a step of four bytes.
    assert found == {
        "frozen": {"parameters": 15, "bytes": 60},
        "tuned": {"parameters": 42, "bytes": 42 * 16 + 2 * 4},
    }


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="a process failed: ValueError: too large"):
        training.run_program(["python3", "-c", "raise ValueError('too large')"], {"PATH": "/bin"})


def test_two_gpus_are_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    sizes = replace(SMALL, device=torch.device("cuda", 0))
    (line,) = run(two_gpus.check_two_gpus, sizes, on_gpu=True).findings
    assert (line.found, line.verdict) == ("found 1", "needs two GPUs")
