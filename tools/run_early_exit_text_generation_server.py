"""Serve a checkpoint, with or without exits, over HTTP:

    python tools/run_early_exit_text_generation_server.py --load checkpoint

answers clients of OpenAI's API at /v1 and clients of EE-LLM and Megatron at /api, and shows a page
at /. On several processes: torchrun --nproc-per-node 2
tools/run_early_exit_text_generation_server.py --pipeline-model-parallel-size 2 --load checkpoint.
After SIGTERM the server answers the requests under way and exits with status 0. Other exit statuses
are 1 if the engine cannot continue, 2 if a flag or the checkpoint cannot be used, and 75 if the
port or the memory that it needs is in use by another program."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from ipaddress import ip_address
from typing import Any, get_args

import torch

from megatron.early_exit.client.completions import API_KEY_VARIABLE
from megatron.early_exit.config import ExitMeasure
from megatron.early_exit.errors import as_flag, one_line, out_of_range
from megatron.early_exit.flags import refuse_beside
from megatron.early_exit.inference.engine_flags import add_engine_flags, load_engine
from megatron.early_exit.inference.params import (
    DEFAULT_THRESHOLD,
    RANGES,
    DraftMethod,
    KVPolicy,
    Mode,
    modes_of,
)
from megatron.early_exit.process_family import end_with_parent
from megatron.early_exit.ranges import ABOVE_ZERO, ONE_OR_MORE, ZERO_OR_MORE, Range
from megatron.early_exit.server.app import create_app
from megatron.early_exit.server.engine_thread.metrics import Metrics
from megatron.early_exit.server.engine_thread.worker import EngineWorker
from megatron.early_exit.server.exit_status import exit_status_of
from megatron.early_exit.server.http.client_address import trusted_networks
from megatron.early_exit.server.http.logs import configure, log
from megatron.early_exit.server.settings import ExitSettings, ServerSettings
from megatron.early_exit.server.web import WebServer, bound_sockets

LOG = logging.getLogger("server")
DEFAULTS: dict[str, Any] = {
    one.name: one.default for one in (*fields(ExitSettings), *fields(ServerSettings))
}
_PORT_VARIABLE = "EARLY_EXIT_PORT"
_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")
SHOWN = "(default: %(default)s)"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_engine_flags(parser)
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add(
        "--port",
        type=int,
        default=os.environ.get(_PORT_VARIABLE, "5000"),
        help=f"0 takes any free one (default: ${_PORT_VARIABLE}, else 5000)",
    )
    add("--served-model-name", help="default: the name of the folder of --load")
    add(
        "--api-key", help=f"key that clients have to send (default: ${API_KEY_VARIABLE}, else none)"
    )
    add("--max-model-len", type=int, help="most tokens of a sequence (default: the model's limit)")
    add(
        "--allowed-origins",
        nargs="+",
        action="extend",
        default=[],
        metavar="ORIGIN",
        help="origins whose web pages may use the server (CORS), such as https://example.org, a "
        "JSON list of origins, or * for all (default: none)",
    )
    exits = parser.add_argument_group("exits", "defaults for fields that a request does not set")
    add = exits.add_argument
    add(
        "--mode",
        choices=get_args(Mode),
        help="default: self_speculative, which is lossless; full for a model that cannot draft",
    )
    for name, text in {
        "exit_threshold_decay": "how fast thresholds decay over a text, 0 is off",
        "num_draft_tokens": "most tokens to draft before they are verified",
    }.items():
        add(
            as_flag(name), type=type(DEFAULTS[name]), default=DEFAULTS[name], help=f"{text} {SHOWN}"
        )
    add(
        "--draft-confidence",
        type=float,
        help="drafting goes on while the product of confidences is at least this (default: found "
        "while decoding; drafting pauses where it makes decoding slower)",
    )
    add(
        "--early-exit-threshold",
        type=float,
        help="least confidence with which a token leaves at an exit "
        f"(default: {DEFAULT_THRESHOLD})",
    )
    add("--exit-layers", type=int, nargs="+", help="exits that may be used (default: all)")
    add(
        "--exit-thresholds",
        type=float,
        nargs="+",
        help="one for each exit that may be used, instead of --early-exit-threshold",
    )
    add(
        "--exit-measure",
        choices=get_args(ExitMeasure),
        help="what an exit's confidence is (default: what is stored with the model)",
    )
    add(
        "--kv-policy",
        choices=get_args(KVPolicy),
        default=DEFAULTS["kv_policy"],
        help=f"what later tokens see of one that has left at an exit {SHOWN}",
    )
    add(
        "--exits-pay-at",
        type=int,
        default=DEFAULTS["exits_pay_at"],
        metavar="BATCH_SIZE",
        help="in mode early_exit, ask exits only while they make decoding faster than mode full "
        f"would be in a batch of this many sequences; 0 is off {SHOWN}",
    )
    add(
        "--draft-method",
        choices=get_args(DraftMethod),
        help="what drafts: exit; mtp, a multi-token-prediction module; or auto, the one of them "
        "that makes a text faster (default: exit with --draft-exit-layer or without such a "
        "module, else auto)",
    )
    add("--draft-exit-layer", type=int, help="exit that drafts (default: the first one)")
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    for name, text in {
        "max_waiting": "requests under way beyond --max-batch-size; further ones get status 429",
        "max_sequences": "most texts generated for one request",
        "max_body_bytes": "most bytes of one request body",
        "request_timeout": "seconds after which a request is given up",
    }.items():
        add(
            as_flag(name), type=type(DEFAULTS[name]), default=DEFAULTS[name], help=f"{text} {SHOWN}"
        )
    add(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        help=f"seconds for requests under way after SIGTERM {SHOWN}",
    )
    add(
        "--forwarded-allow-ips",
        default="",
        metavar="ADDRESSES",
        help="proxies whose X-Forwarded-For names the client in the log: comma-separated addresses "
        "and networks, or * (default: none)",
    )
    add(
        "--log-prompts",
        action="store_true",
        help="write request bodies, with their prompts, into the log",
    )
    add(
        "--example-prompt",
        metavar="TEXT",
        action="append",
        default=[],
        help="prompt that the server's page offers as an example; repeat the flag for several "
        "(default: prompts that suit any model)",
    )
    return parser


def check_limits(args: argparse.Namespace) -> None:
    """Refuse flags that are invalid for every model, before one is loaded.

    Raises:
        ValueError: a number is out of range.
    """
    ZERO_OR_MORE.check_flags(args, "max_waiting", "shutdown_timeout")
    ONE_OR_MORE.check_flags(args, "max_sequences")
    Range(least=1024).check_flags(args, "max_body_bytes")
    ABOVE_ZERO.check_flags(args, "request_timeout")
    Range(least=0, most=2**16 - 1).check_flags(args, "port")
    numbers = ("num_draft_tokens", "early_exit_threshold", "draft_confidence")
    for name in (*numbers, "exit_threshold_decay", "exits_pay_at"):
        RANGES[name].check_flags(args, name)
    for threshold in args.exit_thresholds or ():
        RANGES["exit_thresholds"].check(**{"--exit-thresholds": threshold})
    if args.exit_thresholds is not None:
        only_one = {"early_exit_threshold": (None, "exits have thresholds of their own then")}
        refuse_beside("--exit-thresholds", args, only_one)
    key = api_key_of(args)
    if key is not None and not (key.isascii() and key.isprintable() and key.split() == [key]):
        raise ValueError(
            f"--api-key (or {API_KEY_VARIABLE}) is empty or has characters that cannot be sent in "
            "a header, allowed: ASCII without spaces"
        )
    trusted_networks(args.forwarded_allow_ips)
    if args.device is not None:
        try:
            torch.device(args.device)
        except RuntimeError as error:
            raise ValueError(f"--device {args.device} is unknown, allowed: cpu, cuda") from error
    origins_of(args)


def api_key_of(args: argparse.Namespace) -> str | None:
    """The key that clients have to send; None lets everyone in."""
    key: str | None = args.api_key
    return os.environ.get(API_KEY_VARIABLE) if key is None else key


def origins_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The origins of pages that may use the server.

    Raises:
        ValueError: a value is not an origin.
    """
    found: list[object] = []
    for text in args.allowed_origins:
        try:
            found += json.loads(text) if text.startswith("[") else [text]
        except ValueError:
            raise ValueError(f"--allowed-origins {text} is not a JSON list") from None
    origins = [one for one in found if isinstance(one, str)]
    for origin in found:
        # Browsers send them in lower case, and compare letter by letter.
        if not isinstance(origin, str) or not (origin == "*" or _ORIGIN.fullmatch(origin)):
            raise ValueError(
                f"--allowed-origins {origin} is not an origin, allowed: * or "
                "http(s)://HOST[:PORT] in lower case without a path"
            )
    return tuple(origins)


def _check_mtp(args: argparse.Namespace, num_depths: int) -> None:
    if not num_depths:
        raise ValueError(
            "--draft-method mtp: the model has no multi-token-prediction module, allowed: exit or "
            "auto"
        )
    beside = "a multi-token-prediction module drafts then, not an exit"
    refuse_beside("--draft-method mtp", args, {"draft_exit_layer": (None, beside)})


def settings_of(
    args: argparse.Namespace,
    exit_layers: Sequence[int],
    stored_measure: ExitMeasure | None = None,
    has_gates: bool = False,
    num_depths: int = 0,
) -> ServerSettings:
    """The server's settings from the flags.

    Args:
        args: the flags.
        exit_layers: the model's exits.
        stored_measure: what is stored with the model.
        has_gates: its exits have gates.
        num_depths: of its multi-token-prediction module, if it has one.

    Raises:
        ValueError: a flag names an exit that the model does not have, or a mode that needs exits.
    """
    known = " ".join(map(str, exit_layers)) or "none, the model has no exits"
    for layer in args.exit_layers or ():
        if layer not in exit_layers:
            raise ValueError(f"--exit-layers {layer} is unknown, allowed: {known}")
    if args.draft_exit_layer is not None and args.draft_exit_layer not in exit_layers:
        raise out_of_range("--draft-exit-layer", args.draft_exit_layer, known)
    threshold = args.early_exit_threshold
    used = exit_layers if args.exit_layers is None else sorted(set(args.exit_layers))
    if args.exit_thresholds is not None and len(args.exit_thresholds) != len(used):
        given = " ".join(map(str, args.exit_thresholds))
        layers = " ".join(map(str, used)) or "none"
        allowed = f"one for each exit that is used ({layers})"
        raise ValueError(f"--exit-thresholds {given} are {len(given.split())}, allowed: {allowed}")
    if args.exit_measure == "gate" and not has_gates:
        others = ", ".join(one for one in get_args(ExitMeasure) if one != "gate")
        raise ValueError(f"--exit-measure gate: the model's exits have no gates, allowed: {others}")
    modes = modes_of(len(exit_layers), num_depths)
    if args.mode is not None and args.mode not in modes:
        allowed = " or ".join(modes)
        raise ValueError(f"--mode {args.mode}: the model has no exits, allowed: {allowed}")
    if args.draft_method == "mtp":
        _check_mtp(args, num_depths)
    if args.draft_method == "exit" and not exit_layers:
        allowed = "mtp or auto" if num_depths else "a model with exits"
        raise ValueError(f"--draft-method exit: the model has no exits, allowed: {allowed}")
    return ServerSettings(
        model_name=args.served_model_name or args.load.resolve().name,
        exits=ExitSettings(
            mode=args.mode or ("full" if len(modes) == 1 else "self_speculative"),
            early_exit_threshold=DEFAULT_THRESHOLD if threshold is None else threshold,
            exit_measure=args.exit_measure or stored_measure,
            exit_thresholds=None if args.exit_thresholds is None else tuple(args.exit_thresholds),
            exit_threshold_decay=args.exit_threshold_decay,
            exit_layers=None if args.exit_layers is None else tuple(args.exit_layers),
            kv_policy=args.kv_policy,
            exits_pay_at=args.exits_pay_at,
            draft_method=args.draft_method,
            draft_exit_layer=args.draft_exit_layer,
            num_draft_tokens=args.num_draft_tokens,
            draft_confidence=args.draft_confidence,
        ),
        api_key=api_key_of(args),
        max_waiting=args.max_waiting,
        max_sequences=args.max_sequences,
        max_body_bytes=args.max_body_bytes,
        request_timeout=args.request_timeout,
        log_prompts=args.log_prompts,
        trusted_proxies=trusted_networks(args.forwarded_allow_ips),
        allowed_origins=origins_of(args),
        example_prompts=tuple(args.example_prompt),
    )


def serve(args: argparse.Namespace) -> int:
    """Load the model and serve it until a signal arrives; other ranks than 0 compute for rank 0.

    Raises:
        ValueError: a flag, or the file that it names, cannot be used.
        OSError: the server cannot listen at that address.
    """
    check_limits(args)
    if int(os.environ.get("RANK", "0")) > 0:
        return follow(args)
    with bound_sockets(args.host, args.port) as sockets:
        return serve_at(args, sockets)


def follow(args: argparse.Namespace) -> int:
    """Compute for rank 0 until it ends."""
    engine = load_engine(args, args.max_model_len)
    # torchrun sends signals to all ranks, but requests under way still need this one.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    engine.work()
    return 0


def warn_of_open_doors(args: argparse.Namespace, sockets: Sequence[socket.socket]) -> None:
    """Warn if users of other machines can reach the server and it needs no key."""
    hosts = [str(one.getsockname()[0]) for one in sockets]
    if api_key_of(args) is None and not all(ip_address(one).is_loopback for one in hosts):
        LOG.warning(
            "--host %s lets everybody who reaches it use the model without a key: set %s or "
            "--api-key",
            args.host,
            API_KEY_VARIABLE,
        )


def serve_at(args: argparse.Namespace, sockets: Sequence[socket.socket]) -> int:
    """Load the model and serve it at an address."""
    configure()
    warn_of_open_doors(args, sockets)
    log(LOG, "loading the model; it is served when it is ready", load=str(args.load))
    engine = load_engine(args, args.max_model_len)
    settings = settings_of(
        args, engine.exit_layers, engine.exit_measure, engine.has_gates, engine.num_mtp_depths
    )
    worker = EngineWorker(engine, engine.max_batch_size, settings.max_waiting, Metrics())
    server = WebServer(create_app(worker, settings), worker, settings, sockets, args.max_batch_size)
    engine.on_death(server.fail)
    exits = settings.exits
    host = f"[{args.host}]" if ":" in args.host else args.host
    log(
        LOG,
        f"serving {settings.model_name} at http://{host}:{server.port}",
        layers=engine.num_layers,
        exit_layers=list(engine.exit_layers),
        max_model_len=engine.max_sequence_length,
        default_mode=exits.mode,
        early_exit_threshold=exits.exit_thresholds or exits.early_exit_threshold,
        exit_measure=exits.exit_measure,
        kv_policy=exits.kv_policy,
        exits_pay_at=exits.exits_pay_at,
        draft_exit_layer=exits.draft_exit_layer or next(iter(engine.exit_layers), None),
        draft_confidence=exits.draft_confidence,
        needs_key=settings.api_key is not None,
    )
    return server.run(args.shutdown_timeout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return serve(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return exit_status_of(error)


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
