"""JSON-lines input: finds the files, reads them in batches of raw lines, and extracts the texts of
a line. Lines stay bytes until they are parsed, so that an error message can name the file and
number of a malformed line, whatever is wrong with it."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron.early_exit.data.compression import ERRORS, decompressed

STDIN = "-"


@dataclass(frozen=True, slots=True)
class LineBatch:
    """Consecutive lines of one file."""

    path: str
    first_line: int
    """Number of the first line in its file, counted from 1."""
    lines: list[bytes]
    position: int
    """Bytes of all input files, as they are stored, read up to the end of this batch."""


@dataclass(frozen=True)
class JsonLinesReader:
    """Iterates over input files as `LineBatch`es of about `batch_bytes`, in the given order.

    `-` is the standard input; compressed files (gz, bz2, xz, zst) are decompressed. Iterating
    raises ValueError if a file cannot be read."""

    paths: Sequence[str]
    batch_bytes: int = 1 << 18

    def total_bytes(self) -> int | None:
        """Size of all files as they are stored; None if that is unknown."""
        if not all(Path(path).is_file() for path in self.paths):
            return None
        return sum(Path(path).stat().st_size for path in self.paths)

    def __iter__(self) -> Iterator[LineBatch]:
        finished = 0
        for path in self.paths:
            line_number = 1
            try:
                with _open_stored(path) as stored:
                    for lines in _batched(decompressed(path, stored), self.batch_bytes):
                        yield LineBatch(path, line_number, lines, finished + _position(stored))
                        line_number += len(lines)
                    finished += _position(stored)
            except (*ERRORS, ValueError) as error:
                raise ValueError(
                    f"--input {path}: cannot be read from line {line_number} on ({error})"
                ) from error


def _open_stored(path: str) -> IO[bytes]:
    if path == STDIN:
        return os.fdopen(sys.stdin.fileno(), "rb", closefd=False)
    return Path(path).open("rb")


def _position(stored: IO[bytes]) -> int:
    return stored.tell() if stored.seekable() else 0


def _batched(lines: Iterable[bytes], batch_bytes: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line)
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def find_inputs(patterns: Sequence[str]) -> list[str]:
    """The files that paths and glob patterns name, in the given order; the files of a pattern are
    sorted.

    Raises ValueError for a pattern without a file, a directory, and a file named twice."""
    paths: list[str] = []
    for pattern in patterns:
        if pattern == STDIN or Path(pattern).exists():
            found = [pattern]
        else:
            found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise ValueError(f"--input {pattern}: no such file")
        paths.extend(found)
    for path in paths:
        if Path(path).is_dir():
            raise ValueError(f"--input {path}: is a directory, not a file of JSON lines")
        if paths.count(path) > 1:
            raise ValueError(f"--input {path}: is named more than once")
    return paths


def parse_texts(line: bytes, keys: Sequence[str]) -> dict[str, str]:
    """The texts under `keys` in one line. Raises ValueError with the reason if it has none."""
    try:
        # A byte order mark is allowed: files made on Windows, or joined from such, carry them.
        document: Any = json.loads(line.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1}") from error
    except RecursionError as error:
        raise ValueError("invalid JSON: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise ValueError(f"invalid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"not a JSON object but {_json_kind(document)}")
    return {key: _text(cast(dict[str, Any], document), key) for key in keys}


def _text(document: Mapping[str, Any], key: str) -> str:
    if key not in document:
        raise ValueError(f'no key "{key}"')
    text = document[key]
    if not isinstance(text, str):
        raise ValueError(f'the value of "{key}" is not a string but {_json_kind(text)}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f'the value of "{key}" holds half of a surrogate pair') from error
    return text


def _json_kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
