"""What a process keeps in memory, in huge pages.

Decoding reads all weights for every token, and the processor looks up where each page of them is:
with pages of 4 KiB it spends a tenth of the time or more on that. The kernel of Linux can put what
is in memory already into pages of 2 MiB (`MADV_COLLAPSE`, since 6.1), wherever it has been
allocated: by PyTorch, or by a library that packs weights.
"""

import ctypes
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COLLAPSE = 25
_SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAPPINGS_FILE = Path("/proc/self/smaps")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+)")
_KIB = re.compile(r"(Rss|AnonHugePages): +(\d+) kB")
_MOSTLY = 0.9
"""The share of a stretch of memory that has to be in use: what is not would be taken, too."""
_MOST_FAILURES = 8
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of memory that belongs to no file, and that this process alone writes to.

    Attributes:
        start: address.
        end: address behind it.
        used: bytes that are in use.
        huge: bytes of those that are in huge pages.
    """

    start: int
    end: int
    used: int
    huge: int

    @property
    def is_worth_it(self) -> bool:
        """Whether nearly all of it is in use, and not in huge pages yet."""
        return self.used >= _MOSTLY * (self.end - self.start) and self.huge < _MOSTLY * self.used

    def pages(self, size: int) -> range:
        """The addresses of the whole huge pages in it."""
        return range(-(-self.start // size) * size, self.end - size + 1, size)


def use_huge_pages() -> int:
    """Put what this process keeps in memory into huge pages, as far as the kernel does so. What is
    hardly in use, such as caches that have just been made, is left alone.

    Returns:
        Bytes that are in huge pages for which they were asked; 0 where there are none, as on
        systems other than Linux.
    """
    start = time.perf_counter()
    try:
        size, mappings = int(_SIZE_FILE.read_text()), _MAPPINGS_FILE.read_text()
    except OSError as error:
        _LOG.debug("no huge pages: %s", error)
        return 0
    advise = ctypes.CDLL(None, use_errno=True).madvise
    count = failures = 0
    for stretch in stretches(mappings):
        for address in stretch.pages(size) if stretch.is_worth_it else ():
            if advise(ctypes.c_void_p(address), ctypes.c_size_t(size), _COLLAPSE) == 0:
                count += 1
            elif (failures := failures + 1) == _MOST_FAILURES:
                # An older kernel, or one that has no free huge pages.
                _LOG.info("no more huge pages: %s", os.strerror(ctypes.get_errno()))
                return count * size
    seconds = time.perf_counter() - start
    _LOG.info("%d MiB are in huge pages, after %.1f s", count * size // 2**20, seconds)
    return count * size


def stretches(mappings: str) -> Iterator[Stretch]:
    """The memory of a process that belongs to no file, as `/proc/PID/smaps` describes it."""
    found: re.Match[str] | None = None
    kib: dict[str, int] = {}
    for line in [*mappings.splitlines(), "0-0 ---p 0 0 0"]:
        if (start := _MAPPING.match(line)) is None:
            if (number := _KIB.match(line)) is not None:
                kib[number[1]] = int(number[2])
            continue
        if found is not None and found[3] == "rw-p" and found[4] == "0":
            used, huge = (1024 * kib.get(name, 0) for name in ("Rss", "AnonHugePages"))
            yield Stretch(int(found[1], 16), int(found[2], 16), used, huge)
        found, kib = start, {}
