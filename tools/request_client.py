"""Send prompts to a running server, whose model may have exits or not:

    python tools/request_client.py --prompt "def main():" --mode early_exit --max-tokens 100

prints the text as it arrives, with each token coloured by its exit on a terminal, and how long it
took. --prompts-file sends many prompts, from a .jsonl file with one {"prompt": "..."} per line or a
.txt file with one prompt per line; --compare sends each prompt in mode full as well. Without
--prompt and --prompts-file, prompts are read from the terminal until an empty line or Ctrl-D. Texts
go to the standard output, figures to the standard error; the client measures the times, so they
include the connection."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

from tqdm import tqdm

from megatron.early_exit.client.completions import (
    CompletionClient,
    RequestFailed,
    Unreachable,
)
from megatron.early_exit.client.exit_colours import ExitColours
from megatron.early_exit.client.figures import (
    Comparison,
    describe,
    describe_all,
    describe_comparisons,
)
from megatron.early_exit.client.outcomes import EXIT_FIELDS, Outcome, ask
from megatron.early_exit.client.prompts import read_prompts
from megatron.early_exit.config import ExitMeasure
from megatron.early_exit.errors import one_line
from megatron.early_exit.flags import API_KEY_VARIABLE
from megatron.early_exit.ranges import ABOVE_ZERO, ONE_OR_MORE

_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--url",
        default="http://127.0.0.1:5000",
        help="address of the server (default: %(default)s)",
    )
    add("--api-key", help=f"default: ${API_KEY_VARIABLE}, else no key")
    silence = "seconds without data from the server until a request fails (default: %(default)s)"
    add("--timeout", type=float, default=600.0, help=silence)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="one prompt")
    prompts.add_argument("--prompts-file", type=Path, help=".jsonl or .txt, see above")
    add("--concurrency", type=int, default=1, help="requests at a time (default: %(default)s)")
    add("--compare", action="store_true", help="send each prompt in mode full, too, and compare")
    add("--output", type=Path, help="write answers with their figures as JSON lines to this file")
    request = parser.add_argument_group("request", "the server chooses what is not given here")
    add = request.add_argument
    add("--model", help="a name listed by /v1/models (default: the first one)")
    add("--mode", choices=("full", "early_exit", "self_speculative"))
    add("--early-exit-threshold", type=float, help="least confidence of an exit, 0 to 1")
    add("--exit-layers", type=int, nargs="+", help="exits that may be used")
    add("--exit-measure", choices=get_args(ExitMeasure), help="what an exit's confidence is")
    add("--exit-thresholds", type=float, nargs="+", help="one for each exit that may be used")
    add("--exit-threshold-decay", type=float, help="how fast thresholds decay over a text")
    add("--kv-policy", choices=("exact", "propagate"), help="of tokens that leave at exits")
    add("--exits-pay-at", type=int, help="batch size in which exits have to pay to be asked")
    add("--max-tokens", type=int, default=100, help="default: %(default)s")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="default: 0, which takes the most probable token",
    )
    add("--seed", type=int, help="default: the server draws one")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse flags that make no sense; the server checks the fields of the request.

    Raises:
        ValueError: a flag is invalid.
    """
    if not args.url.startswith(("http://", "https://")):
        raise ValueError(f"--url {args.url} is not an address, allowed: http://HOST:PORT")
    ONE_OR_MORE.check_flags(args, "concurrency")
    ABOVE_ZERO.check_flags(args, "timeout")
    path = args.prompts_file
    if path is not None and path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"--prompts-file {path} has an unknown ending, allowed: .jsonl, .txt")
    if args.compare and args.mode == "full":
        raise ValueError("--mode full: there is nothing to --compare it with, allowed: the others")
    if args.prompt is None and path is None:
        for flag, is_given in (("--compare", args.compare), ("--output", args.output is not None)):
            if is_given:
                raise ValueError(f"{flag} needs --prompt or --prompts-file")


def request_body(args: argparse.Namespace) -> dict[str, Any]:
    """The request that the command line makes, without its prompt."""
    names = (
        *("model", *EXIT_FIELDS),
        *("max_tokens", "temperature", "seed"),
    )
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def show_stream(
    client: CompletionClient, card: dict[str, Any], body: dict[str, Any], prompt: str
) -> None:
    """Print one text as it arrives, and its figures.

    Raises:
        Unreachable: see `CompletionClient`.
        RequestFailed: see `CompletionClient`.
    """
    layers = (*card["exit_layers"], card["num_layers"])
    if "mtp" in card.get("draft_methods", ()):
        # No layer runs for what a multi-token-prediction module drafts.
        layers = (0, *layers)
    colours = ExitColours(layers, sys.stdout)
    answer = client.complete({**body, "prompt": prompt}, colours.write)
    sys.stdout.write("\n")
    sys.stdout.flush()
    if len(layers) > 1:
        print(colours.legend(), file=sys.stderr)
    print(describe(answer), file=sys.stderr)


def converse(client: CompletionClient, card: dict[str, Any], body: dict[str, Any]) -> None:
    """Answer prompts that are typed, until an empty one; Ctrl-C ends an answer.

    Raises:
        Unreachable: the server has stopped.
    """
    # Where there is readline, it lets input() edit and recall lines.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not prompt:
            return
        try:
            show_stream(client, card, body, prompt)
        except RequestFailed as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Send all prompts.

    Raises:
        ValueError: a flag or a file cannot be used.
        Unreachable: there is no server, or it has stopped.
        RequestFailed: the server refuses the only request, or the model or the key of all requests.
    """
    check(args)
    prompts = [args.prompt] if args.prompts_file is None else read_prompts(args.prompts_file)
    key = args.api_key or os.environ.get(API_KEY_VARIABLE)
    client, body = CompletionClient(args.url, key, args.timeout), request_body(args)
    card = client.card(args.model)
    if prompts == [None]:
        converse(client, card, body)
        return 0
    if args.prompt is not None and args.output is None and not args.compare:
        show_stream(client, card, body, args.prompt)
        return 0
    begin, outcomes = perf_counter(), []
    with (
        open(args.output or os.devnull, "w", encoding="utf-8") as file,
        tqdm(total=len(prompts), unit=" prompts", disable=None) as bar,
    ):
        full = f"{card['root']}:full" if args.compare else None
        asked = ask(client, body, prompts, args.concurrency, full)
        for number, outcome in enumerate(asked, start=1):
            if outcome.error is not None and len(prompts) == 1:
                raise RequestFailed(outcome.error)
            outcomes.append(outcome)
            file.write(json.dumps(outcome.line(), ensure_ascii=False) + "\n")
            if args.output is None and outcome.answer is not None:
                bar.write(outcome.answer.text)
            for line in report(number, outcome):
                bar.write(line, file=sys.stderr)
            bar.update()
    answers = [one.answer for one in outcomes if one.answer is not None]
    for line in describe_all(answers, perf_counter() - begin):
        print(line, file=sys.stderr)
    if args.compare:
        print(describe_comparisons(comparisons_of(outcomes)), file=sys.stderr)
    return 0 if len(answers) == len(prompts) else 1


def report(number: int, outcome: Outcome) -> list[str]:
    """Return the lines to print about one prompt; `number` counts prompts from 1."""
    if outcome.answer is None:
        return [f"{number}: error: {outcome.error}"]
    compared = [f"{number}: {one.describe()}" for one in comparisons_of([outcome])]
    return [f"{number}: {describe(outcome.answer)}", *compared]


def comparisons_of(outcomes: Sequence[Outcome]) -> list[Comparison]:
    """Return the comparisons of all outcomes that have both answers."""
    pairs = ((one.answer, one.full) for one in outcomes)
    return [Comparison(answer, full) for answer, full in pairs if answer and full]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, Unreachable, RequestFailed) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
