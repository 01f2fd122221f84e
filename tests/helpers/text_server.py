"""The text-generation server in a thread of the test's process, over a real socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.server.app import create_app
from megatron.early_exit.server.engine_thread.metrics import Metrics
from megatron.early_exit.server.engine_thread.worker import EngineWorker
from megatron.early_exit.server.settings import ExitSettings, ServerSettings
from megatron.early_exit.server.web import WebServer, bound_sockets
from tests.helpers.speed import patient

NAME = "tiny"


@dataclass(frozen=True)
class TextServer:
    """A running server.

    Attributes:
        url: without a slash at the end.
        worker: owns the engine.
    """

    url: str
    worker: EngineWorker

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        """Send a body as JSON, or `data` as it is."""
        if body is not None:
            options["json"] = body
        return requests.post(self.url + path, timeout=patient(60), **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        """Fetch a page."""
        return requests.get(self.url + path, timeout=patient(60), **options)


@contextmanager
def text_server(
    checkpoint: Path,
    max_batch_size: int = 4,
    mode: str = "self_speculative",
    send_buffer_bytes: int | None = None,
    exits: ExitSettings | None = None,
    **settings: Any,
) -> Iterator[TextServer]:
    """Serve a checkpoint until the block ends.

    Args:
        send_buffer_bytes: size of the system's buffer for an answer that its client does not read.
        exits: how exits are used where a request says nothing; None is by `mode`.
        settings: further fields of `ServerSettings`.
    """
    engine = EarlyExitEngine.from_checkpoint(
        checkpoint, max_batch_size=max_batch_size, use_stored_rule=False
    )
    own = ServerSettings(
        model_name=NAME,
        # Left to itself, drafting soon pauses with exits as bad as those of tiny models.
        exits=exits
        or ExitSettings(mode=mode if engine.exit_layers else "full", draft_confidence=0.25),
        **settings,
    )
    worker = EngineWorker(engine, max_batch_size, own.max_waiting, Metrics())
    with bound_sockets("127.0.0.1", 0) as sockets:
        if send_buffer_bytes is not None:
            for one in sockets:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        server = WebServer(create_app(worker, own), worker, own, sockets, max_batch_size)
        server.start()
        try:
            yield TextServer(f"http://127.0.0.1:{server.port}", worker)
        finally:
            server.stop(5)
