"""Turn JSON lines into Megatron's indexed datasets, with Megatron's flags and tokenizers:

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --append-eod

writes data/corpus_text_document.bin and .idx; training takes data/corpus_text_document as its
--data-path, and the same two tokenizer flags."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from tqdm import tqdm

from megatron.early_exit.patches.messages import silence

silence()

from megatron.early_exit.data.indexing import (  # noqa: E402
    DocumentEncoder,
    IndexingCounts,
    MalformedLine,
    index_json_lines,
    output_prefixes,
)
from megatron.early_exit.data.jsonl import JsonLinesReader, find_inputs  # noqa: E402
from megatron.early_exit.data.tokenizer import (  # noqa: E402
    add_tokenizer_arguments,
    build_text_tokenizer,
)

REFUSED = {
    "--split-sentences": "documents are kept whole, as GPT training needs them",
    "--keep-newlines": "it belongs to --split-sentences; newlines are kept as they are",
    "--lang": "it belongs to --split-sentences",
    "--partitions": "--workers share the work on any number of files without partitions",
}


class Refuse(argparse.Action):
    """A flag of Megatron's own tool that has no meaning here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        flag = self.option_strings[0]
        parser.error(f"{flag} is not supported: {REFUSED[flag]}")


class IndexingProgress:
    """Shows the progress: a bar on a terminal, elsewhere a line every `interval` documents."""

    def __init__(self, total_bytes: int | None, interval: int) -> None:
        self.total_bytes = total_bytes
        self.interval = interval
        self.started = time.monotonic()
        self.reported = 0
        self.bar: tqdm[NoReturn] | None = None

    def __call__(self, counts: IndexingCounts, position: int) -> None:
        if sys.stderr.isatty():
            # Made late: the bar's thread must not be there when the workers are forked.
            self.bar = self.bar or tqdm(total=self.total_bytes, unit="B", unit_scale=True)
            self.bar.set_postfix_str(self.documents(counts), refresh=False)
            self.bar.update(position - self.bar.n)
        elif counts.documents - self.reported >= self.interval:
            self.reported = counts.documents
            speed = counts.text_bytes / self.seconds() / 1e6
            print(
                f"{self.documents(counts)}, {speed:.2f} MB/s, {self.remaining(position)} left",
                file=sys.stderr,
            )

    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def documents(self, counts: IndexingCounts) -> str:
        return (
            f"{counts.documents:,} documents, {counts.tokens:,} tokens, "
            f"{counts.documents / self.seconds():,.0f} documents/s"
        )

    def remaining(self, position: int) -> str:
        if not self.total_bytes or not position:
            return "unknown time"
        return tqdm.format_interval(self.seconds() * max(self.total_bytes / position - 1, 0))

    def warn(self, line: MalformedLine) -> None:
        tqdm.write(f"skipped {line}", file=sys.stderr)

    def close(self) -> None:
        if self.bar:
            self.bar.close()


def positive(text: str) -> int:
    """An argument type: an integer that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command line."""
    parser = argparse.ArgumentParser(
        description="Turn JSON lines into Megatron's indexed datasets (.bin and .idx).",
        allow_abbrev=False,
    )
    source = parser.add_argument_group("input")
    source.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="JSON-lines files or quoted glob patterns, read in this order; compressed files "
        "(.gz, .bz2, .xz, .zst) are decompressed, - is the standard input",
    )
    source.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys to tokenize, one dataset each (default: text)",
    )
    source.add_argument(
        "--on-malformed",
        choices=("stop", "skip"),
        default="stop",
        help="what to do at a line that has no usable document: stop and write nothing (the "
        "default), or skip the line with a warning",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-prefix",
        required=True,
        metavar="PATH",
        help="the datasets are written to PATH_KEY_document.bin and .idx",
    )
    output.add_argument("--append-eod", action="store_true", help="end documents with <eod>")
    output.add_argument("--overwrite", action="store_true", help="replace existing datasets")
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="number of processes that tokenize (default: %(default)s, the available processors); "
        "the output does not depend on it",
    )
    runtime.add_argument(
        "--log-interval",
        type=positive,
        default=1000,
        metavar="N",
        help="documents between two lines of progress (default: %(default)s)",
    )
    for flag in REFUSED:
        parser.add_argument(flag, action=Refuse, nargs="?", help=argparse.SUPPRESS)
    add_tokenizer_arguments(parser)
    return parser


def summary(counts: IndexingCounts, encoder: DocumentEncoder, seconds: float) -> str:
    """Return what was read and written, one line for each figure."""
    return (
        f"documents  {counts.documents:,}\n"
        f"tokens     {counts.tokens:,}, {encoder.dtype.__name__}, of a vocabulary of "
        f"{encoder.tokenizer.vocab_size:,}\n"
        f"bytes      {counts.text_bytes:,}, {counts.text_bytes / counts.tokens:.2f} per token\n"
        f"empty      {counts.empty:,} documents skipped\n"
        f"malformed  {counts.malformed:,} lines skipped\n"
        f"time       {seconds:.1f} s, {counts.documents / seconds:,.0f} documents/s, "
        f"{counts.text_bytes / seconds / 1e6:.2f} MB/s"
    )


def preprocess(args: argparse.Namespace) -> None:
    """Index the files that the flags name. Raises ValueError or OSError if that is not possible."""
    reader = JsonLinesReader(find_inputs(args.input))
    encoder = DocumentEncoder(
        build_text_tokenizer(args), args.json_keys, append_eod=args.append_eod
    )
    # Documents are longer than the model's window, and are meant to be.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    progress = IndexingProgress(reader.total_bytes(), args.log_interval)
    try:
        counts = index_json_lines(
            reader,
            encoder,
            args.output_prefix,
            workers=args.workers,
            on_malformed=args.on_malformed,
            overwrite=args.overwrite,
            report_malformed=progress.warn,
            report_progress=progress,
        )
    finally:
        progress.close()
    print(summary(counts, encoder, progress.seconds()))
    for prefix in output_prefixes(args.output_prefix, args.json_keys).values():
        print(f"wrote {prefix}.bin and .idx")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: returns its exit status."""
    # SIGTERM removes unfinished files just as an error does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # PyTorch's warning about more workers than processors: the number is the user's choice.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    try:
        preprocess(build_parser().parse_args(argv))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
