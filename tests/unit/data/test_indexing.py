"""Indexing: what is written can be read back, and a failure leaves nothing behind."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron.early_exit.data.indexing import (
    DocumentEncoder,
    IndexingCounts,
    MalformedLine,
    OnMalformed,
    index_json_lines,
)
from megatron.early_exit.data.jsonl import JsonLinesReader


class CharacterTokenizer:
    """A token is a code point; as some tokenizers do, it opens each text with a token."""

    def __init__(self, vocab_size: int = 1000, eod: int | None = 1) -> None:
        self.vocab_size = vocab_size
        self.eod = eod

    def tokenize(self, text: str) -> list[int]:
        return [0, *map(ord, text)]


def write_lines(folder: Path, documents: Sequence[object]) -> str:
    path = folder / "input.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


def index(
    path: str,
    output_prefix: Path,
    *,
    keys: Sequence[str] = ("text",),
    tokenizer: CharacterTokenizer | None = None,
    append_eod: bool = True,
    on_malformed: OnMalformed = "stop",
    overwrite: bool = False,
    batch_bytes: int = 64,
) -> tuple[IndexingCounts, list[MalformedLine], list[int]]:
    encoder = DocumentEncoder(tokenizer or CharacterTokenizer(), keys, append_eod=append_eod)
    malformed: list[MalformedLine] = []
    positions: list[int] = []
    counts = index_json_lines(
        JsonLinesReader([path], batch_bytes),
        encoder,
        str(output_prefix),
        workers=1,
        on_malformed=on_malformed,
        overwrite=overwrite,
        report_malformed=malformed.append,
        report_progress=lambda _, position: positions.append(position),
    )
    return counts, malformed, positions


def read_back(prefix: str) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(prefix)]


def test_documents_come_back_with_their_end(tmp_path: Path) -> None:
    texts = [f"text {number} é" for number in range(30)]
    path = write_lines(tmp_path, [{"text": text} for text in texts])
    counts, _, positions = index(path, tmp_path / "new" / "out")
    expected = [[0, *map(ord, text), 1] for text in texts]
    assert read_back(f"{tmp_path}/new/out_text_document") == expected
    assert counts.documents == 30
    assert counts.tokens == sum(map(len, expected))
    assert counts.text_bytes == sum(len(text.encode()) for text in texts)
    assert len(positions) > 1
    assert positions[-1] == Path(path).stat().st_size
    dataset = IndexedDataset(f"{tmp_path}/new/out_text_document")
    assert dataset.document_indices.tolist() == list(range(31))
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        "out_text_document.bin",
        "out_text_document.idx",
    }


def test_without_an_end_token(tmp_path: Path) -> None:
    path = write_lines(tmp_path, [{"text": "ab"}])
    index(path, tmp_path / "out", append_eod=False, tokenizer=CharacterTokenizer(eod=None))
    assert read_back(f"{tmp_path}/out_text_document") == [[0, 97, 98]]
    with pytest.raises(ValueError, match="--append-eod: the tokenizer has no end-of-document"):
        index(path, tmp_path / "other", tokenizer=CharacterTokenizer(eod=None))
    with pytest.raises(ValueError, match="--append-eod"):
        index(path, tmp_path / "other", tokenizer=CharacterTokenizer(eod=-1))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_the_type_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    path = write_lines(tmp_path, [{"text": chr(65_498)}])
    index(path, tmp_path / "out", tokenizer=CharacterTokenizer(vocab_size))
    # A document is a view into the dataset, which unmaps its file when it goes.
    dataset = IndexedDataset(f"{tmp_path}/out_text_document")
    assert dataset[0].dtype == dtype
    assert dataset[0].tolist() == [0, 65_498, 1]


def test_keys_get_a_dataset_each_and_empty_documents_are_skipped(tmp_path: Path) -> None:
    lines = [{"a": "x", "b": "y", "c": 0}, {"a": "", "b": "z"}]
    counts, _, _ = index(write_lines(tmp_path, lines), tmp_path / "out", keys=("a", "b"))
    assert read_back(f"{tmp_path}/out_a_document") == [[0, 120, 1]]
    assert read_back(f"{tmp_path}/out_b_document") == [[0, 121, 1], [0, 122, 1]]
    assert (counts.documents, counts.empty, counts.malformed) == (3, 1, 0)


def test_malformed_lines_stop_or_are_skipped(tmp_path: Path) -> None:
    lines = [{"text": "a"}, {"text": 1}, {"text": "b"}, {}, {"text": "\u4e00"}]
    path = write_lines(tmp_path, lines)
    with pytest.raises(ValueError, match=rf'{path}:2: the value of "text" is not a string'):
        index(path, tmp_path / "out" / "x")
    assert not list((tmp_path / "out").iterdir())
    counts, malformed, _ = index(path, tmp_path / "out" / "x", on_malformed="skip")
    assert [line.line_number for line in malformed] == [2, 4, 5]
    assert malformed[-1].reason == "token id 19968 is outside the tokenizer's vocabulary, 0 to 999"
    assert (counts.documents, counts.malformed) == (2, 3)
    assert read_back(f"{tmp_path}/out/x_text_document") == [[0, 97, 1], [0, 98, 1]]


def test_existing_output_is_kept_unless_asked(tmp_path: Path) -> None:
    path = write_lines(tmp_path, [{"text": "a"}])
    index(path, tmp_path / "out")
    write_lines(tmp_path, [{"text": "b"}])
    with pytest.raises(ValueError, match=r"out_text_document\.bin exists already"):
        index(path, tmp_path / "out")
    assert read_back(f"{tmp_path}/out_text_document") == [[0, 97, 1]]
    index(path, tmp_path / "out", overwrite=True)
    assert read_back(f"{tmp_path}/out_text_document") == [[0, 98, 1]]


def test_a_failed_replacement_keeps_the_old_output(tmp_path: Path) -> None:
    path = write_lines(tmp_path, [{"text": "a"}])
    index(path, tmp_path / "out")
    write_lines(tmp_path, [{"text": "b"}, []])
    with pytest.raises(ValueError, match=":2: not a JSON object"):
        index(path, tmp_path / "out", overwrite=True)
    assert read_back(f"{tmp_path}/out_text_document") == [[0, 97, 1]]


def test_input_without_documents_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path, [{"text": "a", "other": ""}])
    with pytest.raises(ValueError, match='no document with a text under "other"'):
        index(path, tmp_path / "out" / "x", keys=("text", "other"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("a/b",), 'json-keys "a/b": cannot be part of a file name'),
        (("",), 'json-keys "": cannot be part of a file name'),
        (("a", "a"), "json-keys a: is given more than once"),
    ],
)
def test_keys_that_name_no_file_are_refused(
    tmp_path: Path, keys: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        index(write_lines(tmp_path, [{}]), tmp_path / "out", keys=keys)
