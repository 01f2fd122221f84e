"""From JSON lines to Megatron's indexed datasets: worker processes tokenize batches of lines, which
are written in input order, so that the files do not depend on the number of workers. The files
appear under their names only when they are complete."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron.early_exit.data.jsonl import JsonLinesReader, LineBatch, parse_texts
from megatron.early_exit.data.tokenizer import TextTokenizer

OnMalformed = Literal["stop", "skip"]


@dataclass(frozen=True, slots=True)
class MalformedLine:
    """A line without a usable document."""

    path: str
    line_number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line_number}: {self.reason}"


@dataclass(slots=True)
class IndexingCounts:
    """What has been read and written so far. A line has one document for each key."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the documents written."""
    empty: int = 0
    """Documents skipped because they have no text."""
    malformed: int = 0
    """Lines skipped because they are malformed."""


@dataclass(slots=True)
class EncodedBatch:
    """The documents of a `LineBatch` as token ids."""

    documents: dict[str, list[NDArray[Any]]]
    """For each key, one array [tokens] per document."""
    text_bytes: int
    empty: int
    position: int
    malformed: list[MalformedLine] = field(default_factory=list[MalformedLine])


class DocumentEncoder(Dataset[EncodedBatch]):
    """Tokenizes batches of lines. Raises ValueError if the tokenizer has no token for
    `append_eod`."""

    def __init__(self, tokenizer: TextTokenizer, keys: Sequence[str], *, append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.keys = tuple(keys)
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self.suffix: list[int] = []
        if append_eod:
            eod = tokenizer.eod
            if eod is None or not 0 <= eod < tokenizer.vocab_size:
                raise ValueError("--append-eod: the tokenizer has no end-of-document token")
            self.suffix = [eod]

    def __getitem__(self, batch: LineBatch) -> EncodedBatch:
        encoded = EncodedBatch({key: [] for key in self.keys}, 0, 0, batch.position)
        for line_number, line in enumerate(batch.lines, batch.first_line):
            if not line.strip():
                continue
            try:
                texts = parse_texts(line, self.keys)
                documents = {key: self._encode(text) for key, text in texts.items()}
            except ValueError as error:
                encoded.malformed.append(MalformedLine(batch.path, line_number, str(error)))
                continue
            for key, document in documents.items():
                if document.size == 0:
                    encoded.empty += 1
                    continue
                encoded.documents[key].append(document)
                encoded.text_bytes += len(texts[key].encode("utf-8"))
        return encoded

    def _encode(self, text: str) -> NDArray[Any]:
        # A tokenizer that opens every text with a token would make a document of an empty one.
        ids = self.tokenizer.tokenize(text) if text else []
        if not ids:
            return np.empty(0, self.dtype)
        tokens = np.array(ids + self.suffix, dtype=np.int64)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.tokenizer.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the tokenizer's vocabulary, "
                f"0 to {self.tokenizer.vocab_size - 1}"
            )
        return tokens.astype(self.dtype)


def output_prefixes(output_prefix: str, keys: Sequence[str]) -> dict[str, str]:
    """For each key, the path of its .bin and .idx files without the ending, as Megatron names it.

    Raises ValueError for a key that is given twice or cannot be part of a file name."""
    for key in keys:
        if not key or "/" in key:
            raise ValueError(f'--json-keys "{key}": cannot be part of a file name')
        if list(keys).count(key) > 1:
            raise ValueError(f"--json-keys {key}: is given more than once")
    return {key: f"{output_prefix}_{key}_document" for key in keys}


def index_json_lines(
    reader: JsonLinesReader,
    encoder: DocumentEncoder,
    output_prefix: str,
    *,
    workers: int,
    on_malformed: OnMalformed,
    overwrite: bool,
    report_malformed: Callable[[MalformedLine], None],
    report_progress: Callable[[IndexingCounts, int], None],
) -> IndexingCounts:
    """Write one indexed dataset for each key of the encoder and return the totals.

    `report_progress` gets the counts and the bytes of input read, after each batch. Raises
    ValueError for output that exists (without `overwrite`), for a malformed line (with
    `on_malformed="stop"`), and for a key without a single document; nothing is written then."""
    prefixes = output_prefixes(output_prefix, encoder.keys)
    if not overwrite:
        _refuse_existing(prefixes.values())
    directory = Path(output_prefix).parent
    directory.mkdir(parents=True, exist_ok=True)
    counts = IndexingCounts()
    with tempfile.TemporaryDirectory(dir=directory, prefix=".indexing-") as scratch:
        drafts = {key: f"{scratch}/{number}" for number, key in enumerate(encoder.keys)}
        builders = {
            key: IndexedDatasetBuilder(get_bin_path(draft), dtype=encoder.dtype)
            for key, draft in drafts.items()
        }
        for batch in _encoded_batches(reader, encoder, workers):
            for malformed in batch.malformed:
                if on_malformed == "stop":
                    raise ValueError(str(malformed))
                report_malformed(malformed)
            _add(batch, builders, counts)
            report_progress(counts, batch.position)
        for key, builder in builders.items():
            if not builder.sequence_lengths:
                raise ValueError(f'--input: no document with a text under "{key}"')
            builder.finalize(get_idx_path(drafts[key]))
        for key, draft in drafts.items():
            _publish(draft, prefixes[key])
    return counts


def _encoded_batches(
    reader: JsonLinesReader, encoder: DocumentEncoder, workers: int
) -> Iterator[EncodedBatch]:
    """The encoded batches in input order. They come from a `DataLoader` whose samples are whole
    batches: a worker pool that keeps the order, reads ahead by a bounded amount, and notices when a
    worker dies."""
    in_processes = workers > 1
    loader: DataLoader[EncodedBatch] = DataLoader(
        encoder,
        batch_size=None,
        sampler=cast(Sampler[LineBatch], reader),
        collate_fn=_unchanged,
        worker_init_fn=_end_with_parent if in_processes else None,
        num_workers=workers if in_processes else 0,
        # Forked workers share the tokenizer that is built already.
        multiprocessing_context="fork" if in_processes else None,
    )
    return iter(cast(Any, loader))


def _end_with_parent(worker: int) -> None:
    """End this worker when its parent is killed; otherwise it would wait forever for a reader."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _unchanged(batch: Any) -> Any:
    return batch


def _add(
    batch: EncodedBatch, builders: Mapping[str, IndexedDatasetBuilder], counts: IndexingCounts
) -> None:
    for key, documents in batch.documents.items():
        for tokens in documents:
            builders[key].add_item(torch.from_numpy(tokens))
            builders[key].end_document()
            counts.tokens += tokens.size
        counts.documents += len(documents)
    counts.text_bytes += batch.text_bytes
    counts.empty += batch.empty
    counts.malformed += len(batch.malformed)


def _refuse_existing(prefixes: Iterable[str]) -> None:
    for prefix in prefixes:
        for path in (Path(get_bin_path(prefix)), Path(get_idx_path(prefix))):
            if path.exists():
                raise ValueError(
                    f"--output-prefix: {path} exists already (--overwrite replaces it)"
                )


def _publish(draft: str, prefix: str) -> None:
    """Move a finished dataset to its name, such that an .idx never lies beside the .bin of another
    dataset."""
    Path(get_idx_path(prefix)).unlink(missing_ok=True)
    Path(get_bin_path(draft)).replace(get_bin_path(prefix))
    Path(get_idx_path(draft)).replace(get_idx_path(prefix))
