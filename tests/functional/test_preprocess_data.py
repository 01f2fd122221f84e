"""The command line `tools/preprocess_data.py`, as a user starts it."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Protocol

import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset

from examples.quickstart.corpus import EOS, train_tokenizer
from tools.preprocess_data import main

ROOT = Path(__file__).parents[2]
TEXTS = [text for _, text in sorted(topics.items())]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXTS[:100], 600))
    return path


class Start(Protocol):
    """Starts the command line with flags."""

    def __call__(self, *flags: object) -> subprocess.Popen[str]: ...


@pytest.fixture
def start(model_file: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []
    # Where a shell has started this in the background, SIGINT is ignored, and that is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start_one(*flags: object) -> subprocess.Popen[str]:
        tokenizer = ("--tokenizer-type=SentencePieceTokenizer", f"--tokenizer-model={model_file}")
        process = subprocess.Popen(
            [sys.executable, "tools/preprocess_data.py", *tokenizer, *map(str, flags)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()
    signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen[str], stdin: str = "") -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    out, err = process.communicate(stdin)
    return process.returncode, out, err


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_output_does_not_depend_on_the_workers(
    tmp_path: Path, model_file: Path, start: Start
) -> None:
    half = len(TEXTS) // 2
    first = write_lines(tmp_path / "1.jsonl", TEXTS[:half])
    second = write_lines(tmp_path / "2.jsonl", ["", *TEXTS[half:]])
    compressed = tmp_path / "2.jsonl.gz"
    compressed.write_bytes(gzip.compress(second.read_bytes()))
    runs = {1: (f"{tmp_path}/[12].jsonl",), 3: (first, compressed)}
    processes = {
        workers: start(
            *("--input", *inputs, "--output-prefix", tmp_path / f"w{workers}", "--append-eod"),
            *("--workers", workers, "--log-interval", 20),
        )
        for workers, inputs in runs.items()
    }
    for workers, process in processes.items():
        status, out, err = finish(process)
        assert status == 0
        progress = err.splitlines()
        assert all("documents/s" in line and line.endswith(" left") for line in progress)
        assert len(progress) >= 2
        assert f"documents  {len(TEXTS)}\n" in out
        assert "empty      1 documents skipped\n" in out
        assert "malformed  0 lines skipped\n" in out
        assert f"wrote {tmp_path}/w{workers}_text_document.bin and .idx\n" in out
    for suffix in ("bin", "idx"):
        one, three = (tmp_path / f"w{workers}_text_document.{suffix}" for workers in (1, 3))
        assert one.read_bytes() == three.read_bytes()

    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    dataset = IndexedDataset(f"{tmp_path}/w3_text_document")
    assert len(dataset) == len(TEXTS)
    for document, text in zip(dataset, TEXTS, strict=True):
        assert document.tolist() == [*library.encode(text), EOS]


def test_malformed_lines_stop_without_output_or_are_skipped(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": 1}\n{"text": "b"}\n{"text": "\xff"}\n')
    flags = ("--input", path, "--workers", 2, "--output-prefix")
    stopping = start(*flags, tmp_path / "stop" / "x")
    skipping = start(*flags, tmp_path / "skip" / "x", "--on-malformed", "skip")
    status, out, err = finish(stopping)
    assert (status, out) == (2, "")
    assert err == f'error: {path}:3: the value of "text" is not a string but a number\n'
    assert not list((tmp_path / "stop").iterdir())

    status, out, err = finish(skipping)
    assert status == 0
    assert err.splitlines() == [
        f'skipped {path}:3: the value of "text" is not a string but a number',
        f"skipped {path}:5: invalid UTF-8 at byte 11",
    ]
    assert "documents  2\n" in out
    assert "malformed  2 lines skipped\n" in out
    assert len(IndexedDataset(f"{tmp_path}/skip/x_text_document")) == 2


def test_standard_input(tmp_path: Path, start: Start) -> None:
    process = start("--input", "-", "--output-prefix", tmp_path / "x")
    status, _, err = finish(process, json.dumps({"text": "a"}) + "\n")
    assert (status, err) == (0, "")
    assert len(IndexedDataset(f"{tmp_path}/x_text_document")) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--input", "*.nothing"), "error: --input *.nothing: no such file"),
        (("--vocab-size", "7"), "error: --vocab-size 7: the tokenizer has 600 tokens"),
        (("--json-keys", "a", "a"), "error: --json-keys a: is given more than once"),
        (("--output-prefix", "old"), "old_text_document.idx exists already"),
        (("--split-sentences",), "error: --split-sentences is not supported: documents"),
        (("--partitions", "4"), "error: --partitions is not supported: --workers"),
        (("--workers", "0"), "error: argument --workers: 0 is not at least 1"),
        (("--work", "2"), "error: unrecognized arguments: --work 2"),
    ],
)
def test_mistakes_end_with_one_line(
    tmp_path: Path,
    model_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    write_lines(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "old_text_document.idx").touch()
    tokenizer = ("--tokenizer-type=SentencePieceTokenizer", f"--tokenizer-model={model_file}")
    try:
        status = main(["--input", "in.jsonl", "--output-prefix", "x", *tokenizer, *flags])
    except SystemExit as end:  # argparse ends by itself
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert {file.name for file in tmp_path.iterdir()} == {"in.jsonl", "old_text_document.idx"}


def test_a_signal_leaves_nothing_behind(tmp_path: Path, start: Start) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    processes = {
        number: start(
            *("--input", "-", "--output-prefix", tmp_path / number.name / "x", "--workers", 2),
            *("--log-interval", 1),
        )
        for number in numbers
    }
    for number, process in processes.items():
        folder = tmp_path / number.name
        assert process.stdin is not None
        assert process.stderr is not None
        # The input stays open, so that the run cannot end by itself.
        process.stdin.write((json.dumps({"text": "a" * 1000}) + "\n") * 2000)
        process.stdin.flush()
        assert "documents" in process.stderr.readline()
        assert len(list(folder.iterdir())) == 1
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert "Traceback" not in process.stderr.read()
        assert not list(folder.iterdir())
