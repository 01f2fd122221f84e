"""A stand-in for Transformer Engine on a CPU: what Megatron's layers use of it, computed plainly.

Megatron takes it for the real one, so it must only be on `sys.path` in processes of their own; see
`tests/helpers/stand_in_process.py`."""

from transformer_engine import common as common
from transformer_engine import pytorch as pytorch

__version__ = "2.7.0"
