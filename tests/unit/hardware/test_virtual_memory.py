"""Memory behind the addresses of a GPU comes and goes; on a stand-in, and on a GPU."""

import gc
import mmap

import pytest
import torch

from megatron.early_exit.hardware import virtual_memory
from megatron.early_exit.hardware.virtual_memory import VirtualMemory, smallest_piece
from tests.helpers.pretended_gpu_memory import pretended_gpu_memory

GPU = torch.device("cuda", 0)
PIECE = mmap.PAGESIZE


@pytest.fixture
def driver():
    with pretended_gpu_memory() as driver:
        yield driver
        # Exceptions hold what they are about.
        gc.collect()
    assert (driver.taken, driver.reserved) == (0, 0)


def check_that_memory_comes_and_goes(piece: int) -> None:
    memory = VirtualMemory(6, piece, GPU)
    pieces = memory.bytes.view(6, piece)
    assert not memory.bytes.any()
    memory.fill(range(1, 3))
    memory.fill(range(3, 4))
    assert not memory.bytes.any()
    pieces[1:4] = 7
    assert pieces.sum(dim=1).tolist() == [0, 7 * piece, 7 * piece, 7 * piece, 0, 0]
    memory.empty(range(1, 3))
    assert pieces.sum(dim=1).tolist() == [0, 0, 0, 7 * piece, 0, 0]
    memory.fill(range(3))
    assert pieces.sum(dim=1).tolist() == [0, 0, 0, 7 * piece, 0, 0]


def test_memory_comes_and_goes(driver):
    check_that_memory_comes_and_goes(PIECE)
    # Four pieces, and the zeros that all others show.
    assert driver.most_taken == 5 * PIECE


def test_memory_lives_as_long_as_a_tensor_over_it(driver):
    memory = VirtualMemory(3, PIECE, GPU)
    memory.fill(range(1))
    tensor = memory.bytes[:8].view(torch.float32)
    del memory
    gc.collect()
    assert tensor.add_(1).tolist() == [1, 1]
    del tensor
    gc.collect()
    assert driver.taken == 0


def test_nothing_changes_where_there_is_no_memory_left(driver, monkeypatch):
    memory = VirtualMemory(8, PIECE, GPU)
    memory.fill(range(2))
    memory.bytes[: 2 * PIECE] = 3
    driver.limit = driver.taken + PIECE
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(driver.taken))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        memory.fill(range(2, 4))
    assert len(emptied) == 1
    assert memory.bytes.sum() == 6 * PIECE
    memory.fill(range(2, 3))
    # What PyTorch keeps for itself is had in the end.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(driver, "limit", 2**30))
    memory.fill(range(3, 5))
    assert not memory.bytes[2 * PIECE :].any()


def test_what_runs_has_ended_before_memory_changes(driver):
    memory = VirtualMemory(2, PIECE, GPU)
    driver.queue()
    memory.fill(range(1))
    driver.queue()
    memory.empty(range(1))
    # And one at the beginning.
    assert driver.num_waits == 3


def test_nothing_stays_where_there_is_no_memory_at_all(driver):
    driver.limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        VirtualMemory(2, PIECE, GPU)


def test_other_failures_are_told(driver):
    with pytest.raises(RuntimeError, match="CUDA says CUDA_ERROR_INVALID_VALUE"):
        VirtualMemory(2, PIECE - 1, GPU)


@pytest.fixture
def told(monkeypatch):
    """What goes to the log, which other tests may have turned off in this process."""
    lines: list[str] = []
    log = virtual_memory._LOG
    monkeypatch.setattr(log, "info", lambda text, *values: lines.append(text % values))
    return lines


def test_the_smallest_piece_is_tried(driver, told, monkeypatch):
    assert smallest_piece(GPU) == PIECE
    gc.collect()
    assert driver.taken == 0
    # A driver whose pieces do not keep what is written to them is of no use.
    monkeypatch.setattr(VirtualMemory, "fill", lambda self, pieces: None)
    assert smallest_piece(GPU) is None
    assert len(told) == 1
    assert told[0].startswith("memory of caches is taken whole: RuntimeError: pieces have the sums")


def test_without_a_driver_there_are_no_pieces(told, monkeypatch):
    def fail():
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(virtual_memory, "_cuda", fail)
    assert smallest_piece(GPU) is None
    assert told == ["memory of caches is taken whole: ImportError: No module named 'cuda'"]


@pytest.mark.gpu
def test_memory_of_a_gpu_comes_and_goes():
    piece = smallest_piece(GPU)
    assert piece is not None
    free, _ = torch.cuda.mem_get_info(GPU)
    check_that_memory_comes_and_goes(piece)
    memory = VirtualMemory(2**30 // piece, piece, GPU)
    memory.fill(range(64))
    torch.cuda.synchronize()
    assert 64 * piece <= free - torch.cuda.mem_get_info(GPU)[0] < 128 * piece
    del memory
    gc.collect()
    assert free - torch.cuda.mem_get_info(GPU)[0] < 64 * piece
