"""A remark of PyTorch's that nobody can act on."""

from __future__ import annotations

import logging

LOGGER = "torch.utils.cpp_extension"
START = "No CUDA runtime is found"


class _IsOther(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(START)


_IS_OTHER = _IsOther()


def silence_cuda_remark() -> None:
    """Leave out what PyTorch says when it compiles for a CPU on a machine that has CUDA's compiler
    but no GPU. Call it before anything is compiled; again it does nothing."""
    logging.getLogger(LOGGER).addFilter(_IS_OTHER)
