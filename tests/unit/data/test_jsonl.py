"""Reading JSON lines: what is parsed, what is refused and how it is named, and where lines lie."""

import bz2
import gzip
import json
import lzma
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.data.jsonl import JsonLinesReader, find_inputs, parse_texts

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=TEXT, other=TEXT, ascii_only=st.booleans())
def test_a_text_survives_json(text: str, other: str, ascii_only: bool) -> None:
    line = json.dumps({"a": other, "text": text, "n": 1}, ensure_ascii=ascii_only) + "\r\n"
    assert parse_texts(line.encode(), ["text", "a"]) == {"text": text, "a": other}


def test_a_byte_order_mark_is_allowed() -> None:
    assert parse_texts(b'\xef\xbb\xbf{"text": "x"}', ["text"]) == {"text": "x"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "invalid JSON: Expecting ',' delimiter at column 13"),
        (b"text\n", "invalid JSON: Expecting value at column 1"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "invalid JSON: Exceeds the limit"),
        (b"[" * 200_000, "invalid JSON: nested too deeply"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 11"),
        (b'["x"]', "not a JSON object but an array"),
        (b'"x"', "not a JSON object but a string"),
        (b"null", "not a JSON object but null"),
        (b'{"Text": "x"}', 'no key "text"'),
        (b'{"text": null}', 'the value of "text" is not a string but null'),
        (b'{"text": 1.5}', 'the value of "text" is not a string but a number'),
        (b'{"text": true}', 'the value of "text" is not a string but a boolean'),
        (b'{"text": {"a": 1}}', 'the value of "text" is not a string but an object'),
        (b'{"text": "\\ud800"}', 'the value of "text" holds half of a surrogate pair'),
    ],
)
def test_a_malformed_line_is_refused_with_its_reason(line: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        parse_texts(line, ["text"])


@given(
    files=st.lists(st.lists(st.binary(max_size=30).map(lambda b: b"{" + b.replace(b"\n", b"")))),
    batch_bytes=st.integers(1, 100),
)
def test_batches_hold_every_line_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[bytes]], batch_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("lines")
    paths = [folder / str(number) for number in range(len(files))]
    for path, lines in zip(paths, files, strict=True):
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    reader = JsonLinesReader([str(path) for path in paths], batch_bytes)
    batches = list(reader)
    read = [
        (batch.path, number, line)
        for batch in batches
        for number, line in enumerate(batch.lines, batch.first_line)
    ]
    assert read == [
        (str(path), number, line + b"\n")
        for path, lines in zip(paths, files, strict=True)
        for number, line in enumerate(lines, 1)
    ]
    assert all(sum(map(len, batch.lines[:-1])) < batch_bytes for batch in batches)
    positions = [batch.position for batch in batches]
    assert positions == sorted(positions)
    if batches:
        assert positions[-1] == reader.total_bytes()


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".GZ", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.compress),
        # Two frames, as pzstd writes them.
        (".zst", lambda data: zstandard.compress(data[:9]) + zstandard.compress(data[9:])),
        # Names that say nothing, or another thing.
        ("", zstandard.compress),
        (".bz2", gzip.compress),
    ],
)
def test_compressed_files_are_read(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    lines = [b"%d\n" % number for number in range(20_000)]
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(compress(b"".join(lines)))
    batches = list(JsonLinesReader([str(path)], 10_000))
    assert [line for batch in batches for line in batch.lines] == lines
    assert batches[-1].position == path.stat().st_size

    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"lines\.jsonl.*: cannot be read from line"):
        list(JsonLinesReader([str(path)], 10_000))
    if suffix:
        path.write_bytes(b"not compressed\n")
        with pytest.raises(ValueError, match=r"lines\.jsonl.*: cannot be read from line 1 on"):
            list(JsonLinesReader([str(path)]))
    path.write_bytes(b'{"text": "plain, whatever its name"}')
    assert [batch.lines for batch in JsonLinesReader([str(path)])] == [[path.read_bytes()]]


@pytest.mark.parametrize("name", ["a.zip", "a.jsonl"])
def test_what_cannot_be_decompressed_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "{}")
    with pytest.raises(ValueError, match=r"files like \.zip are not supported, allowed: .*\.zst"):
        list(JsonLinesReader([str(path)]))


def test_inputs_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl"):
        (tmp_path / name).touch()
    found = find_inputs([f"{tmp_path}/c[1].jsonl", "-", f"{tmp_path}/[ab].jsonl"])
    assert [Path(path).name for path in found] == ["c[1].jsonl", "-", "a.jsonl", "b.jsonl"]


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match=r"--input .*/x\*: no such file"):
        find_inputs([f"{tmp_path}/x*"])
    with pytest.raises(ValueError, match="is a directory"):
        find_inputs([str(tmp_path)])
    with pytest.raises(ValueError, match=r"a\.jsonl: is named more than once"):
        find_inputs([f"{tmp_path}/a.jsonl", f"{tmp_path}/*"])
