"""The status of a server that could not start says whether to start it again."""

from __future__ import annotations

import errno
import logging
import socket
from pathlib import Path

import pytest
import torch

from megatron.early_exit.server.exit_status import (
    EXIT_CONFIGURATION,
    EXIT_FAILURE,
    EXIT_TEMPORARY,
    exit_status_of,
)
from tools import run_early_exit_text_generation_server as tool

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "serving"


@pytest.fixture(autouse=True)
def log_as_before():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("--port 70000 is out of range"), EXIT_CONFIGURATION),
        (FileNotFoundError(errno.ENOENT, "no such file"), EXIT_CONFIGURATION),
        (PermissionError(errno.EACCES, "not yours"), EXIT_CONFIGURATION),
        (socket.gaierror(socket.EAI_NONAME, "no such name"), EXIT_CONFIGURATION),
        (socket.gaierror(socket.EAI_AGAIN, "later"), EXIT_TEMPORARY),
        (OSError(errno.EADDRINUSE, "taken"), EXIT_TEMPORARY),
        (OSError(errno.EADDRNOTAVAIL, "not yet"), EXIT_TEMPORARY),
        (OSError(errno.EIO, "a disk that stutters"), EXIT_TEMPORARY),
        (MemoryError(), EXIT_TEMPORARY),
        (torch.OutOfMemoryError("CUDA out of memory"), EXIT_TEMPORARY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), EXIT_TEMPORARY),
        (RuntimeError("a cable is loose"), EXIT_FAILURE),
    ],
    ids=str,
)
def test_only_what_lasts_is_a_matter_of_configuration(error, status):
    assert exit_status_of(error) == status


def test_systemd_gives_up_on_nothing_else():
    unit = (FOLDER / "early-exit-server.service").read_text().splitlines()
    assert f"RestartPreventExitStatus={EXIT_CONFIGURATION}" in unit
    assert "StartLimitIntervalSec=0" in unit[: unit.index("[Service]")]


def test_a_model_that_finds_no_memory_may_find_it_later(monkeypatch, capsys):
    def load(args, length, use_stored_rule):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(tool, "load_engine", load)
    assert tool.main(["--load", "/no/such", "--port", "0"]) == EXIT_TEMPORARY
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: CUDA out of memory")


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [
        ("127.0.0.1", None, False),
        ("0.0.0.0", None, True),
        ("0.0.0.0", "sesame", False),
        ("localhost", None, False),
    ],
)
def test_a_door_that_is_open_to_all_is_said_before_the_model_is_read(
    monkeypatch, capsys, host, key, warns
):
    def load(args, length, use_stored_rule):
        raise ValueError("no further")

    monkeypatch.setattr(tool, "load_engine", load)
    monkeypatch.delenv("EARLY_EXIT_API_KEY", raising=False)
    flags = [] if key is None else ["--api-key", key]
    assert tool.main(["--load", "/x", "--port", "0", "--host", host, *flags]) == EXIT_CONFIGURATION
    said = capsys.readouterr().err
    assert ("without a key" in said) == warns
    assert '"loading the model; it is served when it is ready"' in said
