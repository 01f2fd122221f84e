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
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from ipaddress import ip_address

from megatron.early_exit.errors import one_line
from megatron.early_exit.flags import API_KEY_VARIABLE
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.engine_flags import add_engine_flags, load_engine
from megatron.early_exit.process_family import end_with_parent
from megatron.early_exit.server.app import create_app
from megatron.early_exit.server.command_line import (
    add_server_flags,
    api_key_of,
    check_flags,
    said_of_exits,
    settings_of,
)
from megatron.early_exit.server.engine_thread.metrics import Metrics
from megatron.early_exit.server.engine_thread.worker import EngineWorker
from megatron.early_exit.server.exit_status import exit_status_of
from megatron.early_exit.server.http.logs import configure, log
from megatron.early_exit.server.web import WebServer, bound_sockets

LOG = logging.getLogger("server")


def build_parser() -> argparse.ArgumentParser:
    """The command line of the server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_flags(parser)
    add_server_flags(parser)
    return parser


def serve(args: argparse.Namespace) -> int:
    """Load the model and serve it until a signal arrives; other ranks than 0 compute for rank 0.

    Raises:
        ValueError: a flag, or the file that it names, cannot be used.
        OSError: the server cannot listen at that address.
    """
    check_flags(args)
    if int(os.environ.get("RANK", "0")) > 0:
        return follow(args)
    with bound_sockets(args.host, args.port) as sockets:
        return serve_at(args, sockets)


def _engine(args: argparse.Namespace) -> EarlyExitEngine:
    # What a request gets of a stored rule is decided in the settings, which flags come before.
    return load_engine(args, args.max_model_len, use_stored_rule=False)


def follow(args: argparse.Namespace) -> int:
    """Compute for rank 0 until it ends."""
    engine = _engine(args)
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
    engine = _engine(args)
    settings = settings_of(
        args,
        engine.exit_layers,
        engine.exit_measure,
        engine.has_gates,
        engine.num_mtp_depths,
        engine.stored_rule,
    )
    if engine.stored_rule is not None and args.mode is None and "mode" not in settings.exits.stored:
        LOG.warning(
            "the rule that is stored with the model is not the default, since there is %s; with "
            "--mode early_exit it is, but for what flags say",
            ", ".join(said_of_exits(args)),
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
