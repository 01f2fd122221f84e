"""What is in memory already moves to huge pages, and nothing else changes."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from megatron.early_exit.hardware import huge_pages
from megatron.early_exit.hardware.huge_pages import stretches, use_huge_pages

MIB = 2**20
MAPPINGS = """\
00400000-00800000 rw-p 00000000 fe:00 1234                     /usr/lib/a.so
Size:               4096 kB
Rss:                4096 kB
AnonHugePages:         0 kB
7f0000100000-7f0000900000 rw-p 00000000 00:00 0
Size:               8192 kB
Rss:                8000 kB
Anonymous:          8000 kB
AnonHugePages:      2048 kB
VmFlags: rd wr mr mw me ac sd
7f0001000000-7f0001800000 rw-p 00000000 00:00 0                [anon: caches]
Size:               8192 kB
Rss:                   8 kB
AnonHugePages:         0 kB
7f0002000000-7f0002800000 r--p 00000000 00:00 0
Size:               8192 kB
Rss:                8192 kB
AnonHugePages:         0 kB
"""


def test_what_is_worth_it():
    used, unused = stretches(MAPPINGS)
    assert (used.used, used.huge) == (8000 * 1024, 2 * MIB)
    assert used.is_worth_it
    # Whole pages only: what lies in front of the first one and behind the last one stays.
    assert list(used.pages(2 * MIB)) == [0x7F0000200000, 0x7F0000400000, 0x7F0000600000]
    assert not unused.is_worth_it


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are those of Linux")
def test_numbers_stay_what_they_are_and_unused_memory_unused():
    numbers = torch.randn(16 * MIB)
    before = numbers.clone()
    with mmap.mmap(-1, 256 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as sparse:
        sparse[0] = 1
        resident = used_memory()
        assert use_huge_pages() >= 0
        assert used_memory() < resident + 64 * MIB
        assert sparse[0] == 1
    assert torch.equal(numbers, before)


def used_memory() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


class Library:
    """What the kernel is asked for, with the answers that it shall give."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.asked: list[int] = []

    def __call__(self, *_, **__) -> "Library":
        return self

    def madvise(self, address, size, advice) -> int:
        assert (size.value, advice) == (2 * MIB, 25)
        self.asked.append(address.value)
        return self.answer


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """Makes a process have some memory, and its kernel answer."""

    def make(mappings: str, answer: int) -> Library:
        library = Library(answer)
        for name, text in (("_MAPPINGS_FILE", mappings), ("_SIZE_FILE", "2097152\n")):
            (tmp_path / name).write_text(text)
            monkeypatch.setattr(huge_pages, name, tmp_path / name)
        monkeypatch.setattr(huge_pages.ctypes, "CDLL", library)
        return library

    return make


def test_whole_pages_of_memory_in_use_are_asked_for(kernel):
    library = kernel(MAPPINGS, answer=0)
    assert use_huge_pages() == 6 * MIB
    assert library.asked == [0x7F0000200000, 0x7F0000400000, 0x7F0000600000]


def test_a_kernel_that_has_none_is_not_asked_for_ever(kernel):
    library = kernel("7f0000000000-7f0040000000 rw-p 0 0 0\nRss: 1048576 kB\n", answer=-1)
    assert use_huge_pages() == 0
    assert len(library.asked) == 8


def test_other_systems_have_none(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "_SIZE_FILE", tmp_path / "none")
    assert use_huge_pages() == 0
