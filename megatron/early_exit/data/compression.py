"""Decompresses input files, whose compression is recognised by their first bytes, not their
names."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""The exceptions that decompressing damaged input raises."""
_CHUNK_BYTES = 1 << 13


@dataclass(frozen=True, slots=True)
class _Format:
    """A compression format: the first bytes of its files, their name endings, and the
    decompressor."""

    beginning: bytes
    endings: tuple[str, ...]
    decompress: Callable[[IO[bytes]], Any] | None = None
    """None if decompression is not supported."""


class _ZstdReader(io.RawIOBase):
    """Decompresses frame by frame, and detects a truncated frame.

    Raises:
        ValueError: the zstandard package is not installed.
    """

    def __init__(self, source: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError("a .zst file needs the zstandard package") from error
        self._error = zstandard.ZstdError
        # The largest window, which zstd makes with --long=31.
        self._make: Callable[[], Any] = zstandard.ZstdDecompressor(
            max_window_size=1 << 31
        ).decompressobj
        self._source, self._frame = source, self._make()
        self._is_inside = False
        self._ready = b""
        self._unread = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._unread or self._source.read(_CHUNK_BYTES)
            if not data:
                if self._is_inside:
                    raise EOFError("it ends before the compressed data do")
                return 0
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise OSError(str(error)) from error
            self._unread = self._frame.unused_data
            self._is_inside = not self._frame.eof
            if self._frame.eof:
                self._frame = self._make()
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


_FORMATS = (
    _Format(b"\x1f\x8b", (".gz", ".gzip"), gzip.open),
    _Format(b"BZh", (".bz2",), bz2.open),
    _Format(b"\xfd7zXZ\x00", (".xz",), lzma.open),
    _Format(
        b"\x28\xb5\x2f\xfd", (".zst", ".zstd"), lambda file: io.BufferedReader(_ZstdReader(file))
    ),
    _Format(b"PK\x03\x04", (".zip",)),
    _Format(b"7z\xbc\xaf\x27\x1c", (".7z",)),
    _Format(b"\x04\x22\x4d\x18", (".lz4",)),
    _Format(b"\x1f\x9d", (".z",)),
    _Format(b"PAR1", (".parquet",)),
)
_SUPPORTED = ", ".join(one.endings[0] for one in _FORMATS if one.decompress is not None)


def decompressed(path: str, stored: IO[bytes]) -> IO[bytes]:
    """The content of a file, whether it is compressed or not.

    Args:
        path: its name, which counts if its first bytes are those of no known format.
        stored: the open file, at its beginning.

    Raises:
        ValueError: its format is not supported.
    """
    beginning = cast(io.BufferedReader, stored).peek(8)[:8]
    ending = Path(path).suffix.lower()
    found = next((one for one in _FORMATS if beginning.startswith(one.beginning)), None)
    if found is None and not beginning.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        found = next((one for one in _FORMATS if ending in one.endings), None)
    if found is None:
        return stored
    if found.decompress is None:
        raise ValueError(
            f"files like {found.endings[0]} are not supported, allowed: JSON lines, plain or as "
            f"{_SUPPORTED}"
        )
    return cast(IO[bytes], found.decompress(stored))
