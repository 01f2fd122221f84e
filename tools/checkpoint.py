"""Convert checkpoints, add or remove exits, and inspect checkpoints:

    python tools/checkpoint.py import-hf SmolLM2-135M base
    python tools/checkpoint.py add-exits base with_exits --exit-layer-nums 8 16 24 \\
        --use-exit-norm --use-exit-mlp
    python tools/checkpoint.py inspect with_exits

No existing file is overwritten, every tensor is read again and compared after it was written, and a
conversion that fails leaves nothing behind."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, get_args

from tqdm import tqdm

from megatron.early_exit.checkpoint.base import is_of_mtp
from megatron.early_exit.checkpoint.conversion import Conversion, match_table
from megatron.early_exit.checkpoint.description import describe
from megatron.early_exit.checkpoint.ee_llm import import_ee_llm
from megatron.early_exit.checkpoint.exits import RandomInit, add_exits, strip_exits
from megatron.early_exit.checkpoint.huggingface import import_hf, open_export
from megatron.early_exit.checkpoint.inspection import count_parameters, inspect
from megatron.early_exit.checkpoint.lazy import LazyWeights
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.multi_token_prediction import add_mtp, strip_mtp
from megatron.early_exit.checkpoint.quantization import Quantization
from megatron.early_exit.checkpoint.quantized_model import quantize_model
from megatron.early_exit.checkpoint.source import open_checkpoint, open_parts
from megatron.early_exit.checkpoint.stored_rule import StoredRule, dropped
from megatron.early_exit.checkpoint.writer import Report
from megatron.early_exit.config import HEAD_FIELDS, EarlyExitConfig, ExitMeasure
from megatron.early_exit.errors import as_flag, one_line
from megatron.early_exit.inference.quantization_loss import (
    QuantizationLoss,
    encoded,
    quantization_loss,
)
from megatron.early_exit.inference.weight_dtype import NO_INT4, WEIGHT_DTYPES

GENERATE = "python tools/generate.py --load {} --prompt ..."
DRAFT = f"{GENERATE} --mode self_speculative"
TUNE = "torchrun pretrain_early_exit_gpt.py --tune-exit --load {} ..."
ADD_EXITS = "python tools/checkpoint.py add-exits {} DST --exit-layer-nums ..."
MIMO_FILES = "copy configuration_mimo.py and modeling_mimo.py from MiMo-7B's folder into it, then "
LOAD = "transformers.AutoModelForCausalLM.from_pretrained({!r}{})"
_OTHER_WEIGHTS = "it was found of other weights"
_PATHS = {
    "SRC": "what to read: a save directory, or one iteration in it",
    "DST": "what to write: a directory that is empty or does not exist",
    "MODEL": "a folder with config.json and safetensors files, a GGUF file, or a name on the hub",
    "FOLDER": "what to write: a folder that is empty or does not exist",
    "TEXT": "a text file in UTF-8, of which the model predicts each token",
    "BASE": "the model that the exits were tuned on",
    "EXITS": "a checkpoint with exits only, as --tune-exit saves",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(
        name: str, does: Callable[[argparse.Namespace], None], text: str, *paths: str
    ) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        for path in paths:
            one.add_argument(path.lower(), type=Path, metavar=path, help=_PATHS[path])
        one.set_defaults(run=does)
        return one

    verb("import-hf", _import_hf, "turn a Hugging Face model into a checkpoint", "MODEL", "DST")
    one = verb(
        "export-hf", _export_hf, "turn a checkpoint into a folder for transformers", "SRC", "FOLDER"
    )
    one.add_argument(
        "--plain",
        action="store_true",
        help="export no exits, for transformers' own generate(assistant_early_exit=k)",
    )
    one.add_argument(
        "--draft-of-exit",
        type=int,
        metavar="P",
        help="export the exit after layer P and the layers in front of it as a model without exits:"
        " the draft model of speculative decoding in transformers, vLLM, SGLang and others",
    )
    one.add_argument(
        "--with-mtp",
        action="store_true",
        help="export the multi-token-prediction module, too, in the format of MiMo, which SGLang "
        "runs as Megatron does (default: it is left out)",
    )
    one = verb("add-exits", _add_exits, "add exits to a model", "SRC", "DST")
    one.add_argument(
        "--exit-layer-nums",
        type=int,
        nargs="+",
        required=True,
        help="layers that get an exit, counted from 1; existing exits there are replaced",
    )
    one.add_argument(
        "--pre-exit",
        action="store_true",
        help="the exits are before their layers: layer k + 1 means the exit after layer k",
    )
    for name, part in HEAD_FIELDS.items():
        one.add_argument(as_flag(name), action="store_true", help=part.help_when_added)
    one.add_argument(
        "--share-final-head",
        action="store_true",
        help="exits predict with the model's own final norm and output layer, without weights of "
        "their own: what LayerSkip's models are trained for",
    )
    one.add_argument(
        "--exit-vocab-size",
        type=int,
        metavar="N",
        help="exits can predict only the first N tokens of the vocabulary, which makes evaluating "
        "them cheap (default: all)",
    )
    one.add_argument(
        "--exit-measure",
        choices=get_args(ExitMeasure),
        help="measure of confidence that inference leaves at exits by, where a request asks for no "
        "other one (default: that of SRC)",
    )
    _add_random_init(one)
    verb("strip-exits", _strip_exits, "remove the exits", "SRC", "DST")
    one = verb(
        "add-mtp",
        _add_mtp,
        "add Megatron's multi-token-prediction module to a model, or layers to that which it has",
        "SRC",
        "DST",
    )
    one.add_argument(
        "--mtp-num-layers",
        type=int,
        required=True,
        metavar="K",
        help="further tokens that the module predicts",
    )
    one.add_argument(
        "--mtp-use-repeated-layer",
        action="store_true",
        help="one layer predicts all of them, from its own outputs (default: K layers)",
    )
    _add_random_init(one)
    verb("strip-mtp", _strip_mtp, "remove the multi-token-prediction module", "SRC", "DST")
    verb("merge-exits", _merge_exits, "join tuned exits and their base", "BASE", "EXITS", "DST")
    one = verb(
        "import-ee-llm", _import_ee_llm, "convert a checkpoint of the original EE-LLM", "SRC", "DST"
    )
    one.add_argument(
        "--tokenizer-model",
        type=Path,
        help="the tokenizer's file or folder (default: the path that training used)",
    )
    one.add_argument("--tokenizer-type", help="default: the type that training used")
    one = verb(
        "quantize",
        _quantize,
        "store a model with its matrices in 8 bits, which the engine loads as they are",
        "SRC",
        "DST",
    )
    one.add_argument("--weight-dtype", choices=WEIGHT_DTYPES, default="int8", help="default: int8")
    _add_quantize_heads(one)
    one.add_argument("--text", type=Path, metavar="TEXT", help="print what measure-int8 does, too")
    one = verb(
        "measure-int8",
        _measure_int8,
        "print what weights in 8 bits (--weight-dtype int8 of tools/generate.py) change",
        "SRC",
        "TEXT",
    )
    _add_quantize_heads(one)
    one = verb("inspect", _inspect, "describe what a checkpoint contains", "SRC")
    one.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_quantize_heads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize-heads",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="projections to the vocabulary are in 8 bits, too (default: yes)",
    )


def _add_random_init(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--random-init", action="store_true", help="start with random weights, not copies"
    )
    verb.add_argument("--seed", type=int, help="seed of --random-init (default: 1234)")


class Made(Protocol):
    """A converted model that is not written yet."""

    @property
    def weights(self) -> LazyWeights: ...

    @property
    def sources(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def num_bytes(self) -> int: ...

    def write(self, target: Path, report: Report) -> None: ...


def _note_dropped_rule(source: Path, kept: StoredRule | None, reason: str) -> None:
    """Say that a stored rule of early exit is left out, where that is so."""
    for line in dropped(describe(locate(source)).rule, kept, reason):
        print(line)


def _import_hf(args: argparse.Namespace) -> None:
    conversion = import_hf(args.model)
    if any(map(is_of_mtp, conversion.weights)):
        print(
            "note: Megatron gives the multi-token-prediction module the hidden state behind the "
            "final norm, as SGLang does and vLLM does not: drafts may differ from vLLM's"
        )
    _write_checkpoint(conversion, args.dst, ADD_EXITS)


def _export_hf(args: argparse.Namespace) -> None:
    export = open_export(args.src, args.plain, args.draft_of_exit, args.with_mtp)
    _write(export, args.folder)
    _note_dropped_rule(args.src, None, "no program reads it there")
    if export.tokenizer is None:
        print("note: transformers does not support the model's tokenizer, so the folder has none")
    left_out_mtp = [is_of_mtp(name) for name in export.left_out]
    if any(left_out_mtp):
        print("note: the multi-token-prediction module is left out (--with-mtp exports it)")
    if not all(left_out_mtp):
        print("note: the exits' gates are left out: no program asks them there")
    trust = ", trust_remote_code=True" if export.needs_remote_code else ""
    first = MIMO_FILES if export.is_mimo else ""
    _say_what_was_written(export, args.folder, first + LOAD.format(str(args.folder), trust))


def _import_ee_llm(args: argparse.Namespace) -> None:
    conversion = import_ee_llm(args.src, args.tokenizer_model, args.tokenizer_type)
    _write_checkpoint(conversion, args.dst, GENERATE)


def _add_exits(args: argparse.Namespace) -> None:
    source, random_init = _open_for_addition(args)
    stored = source.description.early_exit.exit_measure
    beside = [name for name, part in HEAD_FIELDS.items() if part.is_beside]
    if stored == "gate" and not any(getattr(args, name) for name in beside):
        stored = EarlyExitConfig.exit_measure
    wanted = EarlyExitConfig(
        exit_layer_nums=tuple(args.exit_layer_nums),
        pre_exit=args.pre_exit,
        share_final_head=args.share_final_head,
        exit_vocab_size=args.exit_vocab_size,
        exit_measure=args.exit_measure or stored,
        **{name: getattr(args, name) for name in HEAD_FIELDS},
    )
    conversion = add_exits(source, wanted, random_init)
    _note_other_matrix(conversion)
    _write_checkpoint(conversion, args.dst, DRAFT if wanted.share_final_head else TUNE)
    _note_dropped_rule(args.src, None, "the model has other exits now")


def _open_for_addition(args: argparse.Namespace) -> tuple[Conversion, RandomInit | None]:
    if args.seed is not None and not args.random_init:
        raise ValueError(f"--seed {args.seed} has no effect without --random-init")
    source = open_checkpoint(args.src)
    if not args.random_init:
        return source, None
    seed = 1234 if args.seed is None else args.seed
    return source, RandomInit(seed, getattr(source.args, "init_method_std", None) or 0.02)


def _add_mtp(args: argparse.Namespace) -> None:
    source, random_init = _open_for_addition(args)
    layers, is_repeated = args.mtp_num_layers, args.mtp_use_repeated_layer
    conversion = add_mtp(source, layers, is_repeated, random_init)
    if random_init is not None and conversion.weights.keys() == source.weights.keys():
        raise ValueError(f"--random-init has no effect: {args.src} has all layers already")
    flags = " --mtp-use-repeated-layer" if is_repeated else ""
    _write_checkpoint(conversion, args.dst, f"{TUNE} --mtp-num-layers {layers}{flags}")
    _note_dropped_rule(args.src, conversion.description.rule, _OTHER_WEIGHTS)


def _strip_mtp(args: argparse.Namespace) -> None:
    try:
        conversion = strip_mtp(open_checkpoint(args.src))
    except ValueError as error:
        raise ValueError(f"strip-mtp {args.src}: {error}") from error
    _write_checkpoint(conversion, args.dst, GENERATE)
    _note_dropped_rule(args.src, conversion.description.rule, _OTHER_WEIGHTS)


def _note_other_matrix(conversion: Conversion) -> None:
    architecture = conversion.description.architecture
    assert architecture is not None
    is_tied = architecture.share_embeddings_and_output_weights
    exits = conversion.description.early_exit
    if not (is_tied or exits.untie_exit_output_weights or exits.share_final_head):
        print(
            "note: the exits project with the word embedding, but this model's output layer is "
            "another matrix: without tuning, their predictions are useless "
            "(--untie-exit-output-weights copies the output layer)"
        )


def _strip_exits(args: argparse.Namespace) -> None:
    try:
        conversion = strip_exits(open_checkpoint(args.src))
    except ValueError as error:
        raise ValueError(f"strip-exits {args.src}: {error}") from error
    _write_checkpoint(conversion, args.dst, GENERATE)
    _note_dropped_rule(args.src, None, "the model has no exits now")


def _merge_exits(args: argparse.Namespace) -> None:
    conversion = open_parts(args.base, args.exits)
    _write_checkpoint(conversion, args.dst, GENERATE)
    for source in (args.base, args.exits):
        _note_dropped_rule(source, conversion.description.rule, _OTHER_WEIGHTS)


def _quantize(args: argparse.Namespace) -> None:
    if args.weight_dtype == "int4":
        raise ValueError(f"--weight-dtype int4 {NO_INT4}")
    text = None if args.text is None else _read_text(args.text)
    if text is not None:
        # What cannot be measured is refused before anything is written.
        encoded(args.src, text)
    quantization = Quantization(args.quantize_heads)
    _write_checkpoint(quantize_model(open_checkpoint(args.src), quantization), args.dst, GENERATE)
    _note_dropped_rule(args.src, None, "weights in 8 bits are another model")
    if text is not None:
        _print_loss(quantization_loss(args.src, text, args.quantize_heads, quantized_path=args.dst))


def _measure_int8(args: argparse.Namespace) -> None:
    _print_loss(quantization_loss(args.src, _read_text(args.text), args.quantize_heads))


def _print_loss(loss: QuantizationLoss) -> None:
    change = loss.quantized_perplexity / loss.perplexity - 1
    print(
        f"perplexity of {loss.num_tokens} tokens: {loss.perplexity:.4f}, in 8 bits "
        f"{loss.quantized_perplexity:.4f} ({change:+.2%}); the most probable token is the same at "
        f"{loss.agreement:.2%} of them"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text in UTF-8: {error}") from error


def _inspect(args: argparse.Namespace) -> None:
    found = inspect(args.src)
    print(json.dumps(found.to_dict(), indent=2) if args.json else "\n".join(found.lines()))


def _write_checkpoint(conversion: Conversion, target: Path, next_command: str) -> None:
    _write(conversion, target)
    counts = count_parameters({name: one.shape for name, one in conversion.weights.items()})
    early_exit = conversion.description.early_exit
    for position in early_exit.positions:
        counts.setdefault(f"exit after layer {position}", 0)
    for part, count in counts.items():
        flags = f"  {early_exit.head_flags}" if part.startswith("exit") else ""
        print(f"{part:24}{count:>17,} parameters{flags}")
    _say_what_was_written(conversion, target, next_command.format(target))


def _write(made: Made, target: Path) -> None:
    """Write the result, with a progress bar on a terminal, and print which source tensors each
    tensor was made of."""
    for line in match_table(made.sources, made.weights):
        print(line)
    # Each tensor is written, and then read again.
    total = 2 * made.num_bytes
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        made.write(target, lambda _, num_bytes: bar.update(num_bytes))


def _say_what_was_written(made: Made, target: Path, next_command: str) -> None:
    print(
        f"wrote {target}: {len(made.weights)} tensors, {made.num_bytes / 1e6:,.1f} MB, all read "
        f"again and equal; next: {next_command}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    # SIGTERM removes unfinished files just as an error does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
