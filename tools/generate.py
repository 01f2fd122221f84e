"""Generate text with a checkpoint, with or without its exits:

    python tools/generate.py --load checkpoint --prompt "def main():" \\
        --mode early_exit --early-exit-threshold 0.5 --max-tokens 100

prints the text; on a terminal each token is coloured by the exit that gave it. With --prompts-file
the prompts are read from a .jsonl file with one {"prompt": "..."} per line, or from a .txt file
with one prompt per line; with --output the results are written as JSON lines with all fields."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO, get_args

from tqdm import tqdm

from megatron.early_exit.client.exit_colours import ExitColours
from megatron.early_exit.client.prompts import read_prompts
from megatron.early_exit.config import ExitMeasure, KVPolicy
from megatron.early_exit.errors import FieldError, as_flag, one_line
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.engine_flags import add_engine_flags, load_engine
from megatron.early_exit.inference.params import DraftMethod, Mode
from megatron.early_exit.process_family import end_with_parent


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition(":")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN:NUMBER") from None


_LISTS: dict[str, Callable[[str], Any]] = {
    "stop": str,
    "stop_token_ids": int,
    "exit_layers": int,
    "exit_thresholds": float,
    "logit_bias": _bias,
}
_CHOICES_OF_MODELS = {
    "mode": (get_args(Mode), "early_exit by the rule that is stored with the model, else full"),
    "kv_policy": (get_args(KVPolicy), "that of the stored rule, else exact"),
    "exit_measure": (get_args(ExitMeasure), "that of the stored rule, else the model's"),
    "draft_method": (
        get_args(DraftMethod),
        "exit with --draft-exit-layer or without multi-token prediction, else auto",
    ),
}
_SWITCHES = ("ignore_eos", "echo", "exit_details")
_INTEGERS = (
    *("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"),
    *("num_draft_tokens", "draft_exit_layer", "exits_pay_at"),
)


@dataclass(frozen=True)
class Answer:
    """The result for one prompt, or the reason why there is none."""

    prompt: str
    result: GenerationResult | None
    error: str | None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_flags(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="one prompt")
    prompts.add_argument("--prompts-file", type=Path, help=".jsonl or .txt file, see above")
    parser.add_argument("--output", type=Path, help="write results as JSON lines to this file")
    request = parser.add_argument_group("request", "fields of SamplingParams, which documents them")
    for field in fields(SamplingParams):
        name, flag = field.name, as_flag(field.name)
        default = f"default: {field.default}"
        if name in _SWITCHES:
            request.add_argument(flag, action="store_true")
        elif name in _LISTS:
            request.add_argument(flag, nargs="+", type=_LISTS[name], help="default: none")
        elif name in _CHOICES_OF_MODELS:
            choices, default = _CHOICES_OF_MODELS[name]
            request.add_argument(flag, choices=choices, help=f"default: {default}")
        else:
            kind = int if name in _INTEGERS else float
            request.add_argument(flag, type=kind, default=field.default, help=default)
    return parser


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters that the command line gives.

    Raises:
        ValueError: a value is out of range; the message names its flag.
    """
    given = {field.name: getattr(args, field.name) for field in fields(SamplingParams)}
    try:
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})
    except FieldError as error:
        raise ValueError(error.named(as_flag(error.field))) from error


def answers(
    engine: EarlyExitEngine, prompts: Sequence[str], params: SamplingParams, bar: tqdm[Any]
) -> Iterator[Answer]:
    """Yield the answers in the order of the prompts, each as soon as it is complete."""
    requests: list[Request | str] = []
    for prompt in prompts:
        try:
            requests.append(engine.submit(prompt, params))
        except ValueError as error:
            requests.append(str(error))
    for prompt, request in zip(prompts, requests, strict=True):
        if isinstance(request, str):
            yield Answer(prompt, None, request)
        else:
            while not request.is_finished:
                bar.update(len(engine.step()))
            yield Answer(prompt, request.result(), request.error)


def show_stream(engine: EarlyExitEngine, prompt: str, params: SamplingParams, out: TextIO) -> None:
    """Print one text as it is generated; if `out` is a terminal, each token has the background
    colour of its exit."""
    layers = (*engine.exit_layers, engine.num_layers)
    if engine.num_mtp_depths:
        # No layer runs for what a multi-token-prediction module drafts.
        layers = (0, *layers)
    colours = ExitColours(layers, out)
    for token in engine.stream(prompt, params):
        colours.write(token.text or "", token.exit_layer)
    out.write("\n")
    if len(layers) > 1:
        print(colours.legend(), file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Answer all prompts.

    Raises:
        ValueError: a flag, or the file that it names, cannot be used.
    """
    params = sampling_params(args)
    prompts = [args.prompt] if args.prompt is not None else read_prompts(args.prompts_file)
    engine = load_engine(args)
    if engine.is_worker:
        engine.work()
        return 0
    if args.prompt is not None and args.output is None and params.max_tokens > 0:
        show_stream(engine, args.prompt, params, sys.stdout)
        return 0
    failed = 0
    out = sys.stdout if args.output is None else args.output.open("w", encoding="utf-8")
    with out, tqdm(unit=" tokens", disable=None) as bar:
        for answer in answers(engine, prompts, params, bar):
            failed += answer.error is not None
            out.write(_as_line(answer) if args.output else _as_text(answer))
    return 1 if failed else 0


def _as_line(answer: Answer) -> str:
    result = {} if answer.result is None else asdict(answer.result)
    return json.dumps({"prompt": answer.prompt, **result, "error": answer.error}) + "\n"


def _as_text(answer: Answer) -> str:
    if answer.result is None or answer.error is not None:
        return f"error: {answer.error}\n"
    return f"{answer.result.text}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
