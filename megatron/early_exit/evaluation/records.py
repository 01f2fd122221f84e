"""A file of records that grows while a measurement runs, from which a killed one goes on."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class RecordFile:
    """The records of one measurement, as JSON lines behind a header.

    A last line that a kill has cut is dropped.

    Args:
        path: of the file, which is made where it is missing.
        header: what all records have in common: settings, machine, versions.

    Attributes:
        records: all that the file has.

    Raises:
        ValueError: the file belongs to a measurement with another header, or is damaged; the
            message names the first difference, or the line.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[Record] = []
        found, cut = _lines(path) if path.exists() else ([], 0)
        if cut:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - cut)
        if not found:
            self._write(dict(header))
            return
        # As JSON has it: a tuple is a list, and every key is a text.
        for name, before, now in differences(found[0], json.loads(json.dumps(header))):
            raise ValueError(
                f"{path} has records of another measurement: {name} was {_short(before)} there and "
                f"is {_short(now)} now, allowed: the same settings, or another folder"
            )
        self.records = found[1:]

    def append(self, record: Record) -> None:
        """Add a record, which is in the file when this returns."""
        self._write(record)
        self.records.append(record)

    def _write(self, line: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def read_records(path: Path) -> tuple[Record, list[Record]]:
    """The header and the records of a file, which is left as it is.

    Raises:
        ValueError: there is no such file, or it is empty or damaged; the message names the line.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file, allowed: the folder of an evaluation")
    found, _ = _lines(path)
    if not found:
        raise ValueError(f"{path} is empty, allowed: the records of an evaluation")
    return found[0], found[1:]


def begun_records(path: Path) -> tuple[Record | None, list[Record]]:
    """The header and the records of a measurement that may have begun; None and nothing where it
    has not, also where a kill has cut the first line.

    Raises:
        ValueError: the file is damaged; the message names the line.
    """
    found, _ = _lines(path) if path.is_file() else ([], 0)
    return (found[0], found[1:]) if found else (None, [])


def _lines(path: Path) -> tuple[list[Record], int]:
    """The whole lines of a file, and the bytes of a last one that a kill has cut."""
    lines = path.read_bytes().split(b"\n")
    # Behind the last newline is nothing, or a line that was being written.
    cut = lines.pop()
    return [_parsed(path, line, number) for number, line in enumerate(lines, start=1)], len(cut)


def _parsed(path: Path, line: bytes, number: int) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number}: is damaged ({error}), allowed: another folder"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: is no object, allowed: another folder")
    return record


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: the path of names to it, and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(before.get(key), now.get(key), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for place, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{name}[{place}]")
    elif before != now:
        yield name, before, now


def _short(value: Any, most: int = 120) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}..."
