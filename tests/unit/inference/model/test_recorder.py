"""The recorder of CUDA graphs, with PyTorch's calls replaced where there is no GPU."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from megatron.early_exit.inference.model import recorder as recorders
from megatron.early_exit.inference.model.recorder import (
    ROW_COUNTS,
    CudaGraphRecorder,
    captured_count,
)


def test_rows_are_rounded_up_to_what_is_captured():
    for count in range(1, ROW_COUNTS[-1] + 1):
        assert captured_count(count) == min(one for one in ROW_COUNTS if one >= count)


def test_work_is_captured_and_replayed_on_its_own_device(monkeypatch):
    """The current device may be another one, whose stream knows nothing of the work."""
    current, log = [0], []

    @contextmanager
    def device(other):
        before, current[0] = current[0], other.index
        yield
        current[0] = before

    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: log.append(("replay", current[0])))

    def captured(graph, pool, stream):
        log.append(("capture", current[0], pool))
        return nullcontext()

    for name, fake in {
        "device": device,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: ("pool", current[0]),
        "CUDAGraph": lambda: graph,
        "graph": captured,
    }.items():
        monkeypatch.setattr(recorders.torch.cuda, name, fake)
    recorder = CudaGraphRecorder(torch.device("cuda", 1))
    ran_on: list[int] = []

    def work() -> torch.Tensor:
        ran_on.append(current[0])
        return torch.ones(1)

    replay, result = recorder.record(work)
    recorder.record(work)
    replay()
    assert set(ran_on) == {1}
    assert log == [
        ("capture", 1, ("pool", 1)),
        ("capture", 1, ("pool", 1)),
        ("replay", 1),
    ]
    assert result.item() == 1
    assert current == [0]


@pytest.mark.gpu
def test_a_graph_does_its_work_again():
    recorder = CudaGraphRecorder(torch.device("cuda", torch.cuda.device_count() - 1))
    given = torch.ones(3, device=recorder._device)
    replay, result = recorder.record(lambda: given * 2)
    given.fill_(5.0)
    replay()
    assert result.tolist() == [10.0] * 3
