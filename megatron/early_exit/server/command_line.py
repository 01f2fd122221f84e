"""The server's flags, and the settings that they give."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

import torch

from megatron.early_exit.checkpoint.stored_rule import StoredRule
from megatron.early_exit.config import ExitMeasure, KVPolicy
from megatron.early_exit.errors import as_flag, out_of_range
from megatron.early_exit.flags import API_KEY_VARIABLE, refuse_beside
from megatron.early_exit.inference.params import (
    DEFAULT_THRESHOLD,
    MODE_FIELDS,
    RANGES,
    DraftMethod,
    Mode,
    modes_of,
)
from megatron.early_exit.ranges import ABOVE_ZERO, ONE_OR_MORE, ZERO_OR_MORE, Range
from megatron.early_exit.server.http.client_address import trusted_networks
from megatron.early_exit.server.settings import ExitSettings, ServerSettings

DEFAULTS: dict[str, Any] = {
    one.name: one.default for one in (*fields(ExitSettings), *fields(ServerSettings))
}
SHOWN = "(default: %(default)s)"
_NAMES = tuple(name for own in MODE_FIELDS.values() for name in own)
"""The fields of requests that flags of the same names set, beside `mode`."""
_PORT_VARIABLE = "EARLY_EXIT_PORT"
_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the server, beside those with which its engine is loaded."""
    add = parser.add_argument
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
        help="default: early_exit with a rule that tools/choose_threshold.py has stored, if none "
        "of the other flags of this group is given; else self_speculative, which is lossless, or "
        "full for a model that cannot draft",
    )
    for name, text in {
        "exit_threshold_decay": "how fast thresholds decay over a text, 0 is off",
        "num_draft_tokens": "most tokens to draft before they are verified",
    }.items():
        kind, default = type(DEFAULTS[name]), DEFAULTS[name]
        add(as_flag(name), type=kind, help=f"{text} (default: {default})")
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
        f"(default: that of the stored rule, else {DEFAULT_THRESHOLD})",
    )
    add(
        "--exit-layers",
        type=int,
        nargs="+",
        help="exits that may be used (default: those of the stored rule, else all)",
    )
    add(
        "--exit-thresholds",
        type=float,
        nargs="+",
        help="one for each exit that may be used, instead of --early-exit-threshold",
    )
    add(
        "--exit-measure",
        choices=get_args(ExitMeasure),
        help="what an exit's confidence is (default: that of the stored rule, else what is stored "
        "with the model)",
    )
    add(
        "--kv-policy",
        choices=get_args(KVPolicy),
        help="what later tokens see of one that has left at an exit (default: that of the stored "
        f"rule, else {DEFAULTS['kv_policy']})",
    )
    add(
        "--exits-pay-at",
        type=int,
        metavar="BATCH_SIZE",
        help="in mode early_exit, ask exits only while they make decoding faster than mode full "
        "would be in a batch of this many sequences; 0 is off "
        f"(default: {DEFAULTS['exits_pay_at']})",
    )
    add(
        "--draft-method",
        choices=get_args(DraftMethod),
        help="what drafts: exit; mtp, a multi-token-prediction module; or auto, that one of the "
        "module and all exits which makes a text faster (default: exit with --draft-exit-layer or "
        "without such a module, else auto)",
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


def check_flags(args: argparse.Namespace) -> None:
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


def settings_of(
    args: argparse.Namespace,
    exit_layers: Sequence[int],
    stored_measure: ExitMeasure | None = None,
    has_gates: bool = False,
    num_depths: int = 0,
    rule: StoredRule | None = None,
) -> ServerSettings:
    """The server's settings from the flags.

    Args:
        args: the flags.
        exit_layers: the model's exits.
        stored_measure: what is stored with the model.
        has_gates: its exits have gates.
        num_depths: of its multi-token-prediction module, if it has one.
        rule: that is stored with the model; flags come before it.

    Raises:
        ValueError: a flag names an exit that the model does not have, or a mode that needs exits.
    """
    _check_exits(args, exit_layers, has_gates)
    _check_drafting(args, exit_layers, num_depths)
    return ServerSettings(
        model_name=args.served_model_name or args.load.resolve().name,
        exits=_exit_settings(args, exit_layers, stored_measure, num_depths, rule),
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


def _check_exits(args: argparse.Namespace, exit_layers: Sequence[int], has_gates: bool) -> None:
    for layer in args.exit_layers or ():
        if layer not in exit_layers:
            raise ValueError(f"--exit-layers {layer} is unknown, allowed: {_known(exit_layers)}")
    if args.exit_measure == "gate" and not has_gates:
        others = ", ".join(one for one in get_args(ExitMeasure) if one != "gate")
        raise ValueError(f"--exit-measure gate: the model's exits have no gates, allowed: {others}")


def _check_drafting(args: argparse.Namespace, exit_layers: Sequence[int], num_depths: int) -> None:
    if args.draft_exit_layer is not None and args.draft_exit_layer not in exit_layers:
        raise out_of_range("--draft-exit-layer", args.draft_exit_layer, _known(exit_layers))
    modes = modes_of(len(exit_layers), num_depths)
    if args.mode is not None and args.mode not in modes:
        allowed = " or ".join(modes)
        raise ValueError(f"--mode {args.mode}: the model has no exits, allowed: {allowed}")
    if args.draft_method == "mtp":
        if not num_depths:
            raise ValueError(
                "--draft-method mtp: the model has no multi-token-prediction module, allowed: exit "
                "or auto"
            )
        beside = "a multi-token-prediction module drafts then, not an exit"
        refuse_beside("--draft-method mtp", args, {"draft_exit_layer": (None, beside)})
    if args.draft_method == "exit" and not exit_layers:
        allowed = "mtp or auto" if num_depths else "a model with exits"
        raise ValueError(f"--draft-method exit: the model has no exits, allowed: {allowed}")


def _known(exit_layers: Sequence[int]) -> str:
    return " ".join(map(str, exit_layers)) or "none, the model has no exits"


def _exit_settings(
    args: argparse.Namespace,
    exit_layers: Sequence[int],
    stored_measure: ExitMeasure | None,
    num_depths: int,
    rule: StoredRule | None,
) -> ExitSettings:
    # What a flag says, or the stored rule where none does.
    said = {name: getattr(args, name) for name in _NAMES if getattr(args, name) is not None}
    stored = {} if rule is None else rule.defaults_beside(vars(args))
    said.update(stored)
    layers = said.get("exit_layers")
    used = exit_layers if layers is None else sorted(set(layers))
    if args.exit_thresholds is not None and len(args.exit_thresholds) != len(used):
        given = " ".join(map(str, args.exit_thresholds))
        allowed = f"one for each exit that is used ({' '.join(map(str, used)) or 'none'})"
        raise ValueError(
            f"--exit-thresholds {given} are {len(args.exit_thresholds)}, allowed: {allowed}"
        )
    by_rule = rule is not None and args.mode is None and not said_of_exits(args)
    mode = args.mode or ("early_exit" if by_rule else _default_mode(exit_layers, num_depths))
    for name in ("exit_layers", "exit_thresholds"):
        if name in said:
            said[name] = tuple(said[name])
    said.setdefault("exit_measure", stored_measure)
    names = frozenset([*stored, *(["mode"] if by_rule else [])])
    return ExitSettings(mode=mode, stored=names, **said)


def said_of_exits(args: argparse.Namespace) -> list[str]:
    """The flags that say how to use exits, beside `--mode`: with them, the mode is not that of a
    stored rule."""
    return [as_flag(name) for name in _NAMES if getattr(args, name) is not None]


def _default_mode(exit_layers: Sequence[int], num_depths: int) -> Mode:
    can_draft = len(modes_of(len(exit_layers), num_depths)) > 1
    return "self_speculative" if can_draft else "full"
