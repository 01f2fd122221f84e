"""The listed messages are silent, and no others."""

from __future__ import annotations

import logging
import warnings

import pytest

from megatron.early_exit import platform
from megatron.early_exit.patches import messages
from megatron.early_exit.patches.messages import (
    CUDA_REMARK,
    LOG_RECORDS,
    WARNINGS,
    silence,
    silence_cuda_remark,
    silence_prints,
    without_distributed_warning,
)

platform.prepare()


def test_listed_warnings_are_silent_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence()
        for start in WARNINGS:
            warnings.warn(f"{start} and so on", stacklevel=1)
        warnings.warn("Only 3 GB are left on the disk", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["Only 3 GB are left on the disk"]


def test_listed_log_records_are_silent_and_others_are_not() -> None:
    for name, start in LOG_RECORDS:
        logger = logging.getLogger(name)
        shown: list[str] = []
        # Not by caplog: torch's loggers of some releases hand nothing on to the root's.
        handler = logging.Handler()
        handler.emit = lambda record, shown=shown: shown.append(record.getMessage())  # type: ignore[method-assign, misc]
        logger.addHandler(handler)
        try:
            logger.warning("%s and so on", start)
            logger.warning("Something else")
        finally:
            logger.removeHandler(handler)
        assert shown == ["Something else"], name


def test_filters_are_added_once() -> None:
    silence()
    filters = logging.getLogger(CUDA_REMARK[0]).filters
    before = filters[:]
    silence_cuda_remark()
    silence()
    assert filters == before


def test_the_warning_of_absent_process_groups_is_silent_for_a_while() -> None:
    said = "torch.distributed is disabled, unavailable or uninitialized, assuming the intent"
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with without_distributed_warning():
            warnings.warn(said, stacklevel=1)
            warnings.warn("another", stacklevel=1)
        warnings.warn(said, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another", said]


def test_listed_prints_are_silent_and_others_are_not(capsys) -> None:
    from megatron.training import arguments

    arguments.print("WARNING: Setting args.overlap_p2p_comm and so on")
    arguments.print("Something else")
    assert capsys.readouterr().out == "Something else\n"


def test_a_print_that_has_moved_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(messages, "PRINTS", (("megatron.training.arguments", "Never printed"),))
    with pytest.raises(RuntimeError, match=r"no longer prints 'Never printed'.*is not supported"):
        silence_prints()
