"""The decoding modes, by the names that requests give them."""

from collections.abc import Mapping

from megatron.early_exit.inference.modes.early_exit import EarlyExitMode
from megatron.early_exit.inference.modes.full import FullMode
from megatron.early_exit.inference.modes.mode import DecodingMode
from megatron.early_exit.inference.modes.self_speculative import SelfSpeculativeMode
from megatron.early_exit.inference.params import Mode

MODES: Mapping[Mode, type[DecodingMode]] = {
    "full": FullMode,
    "early_exit": EarlyExitMode,
    "self_speculative": SelfSpeculativeMode,
}
