"""What a request may ask for."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["full", "early_exit"]
DEFAULT_THRESHOLD = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to continue a prompt.

    Raises:
        ValueError: a field is outside its range; the message names the field, the value and the
            range. What depends on the model is checked when the request reaches an engine.
    """

    max_tokens: int = 16
    """Most tokens to generate; the context of the model may end a sequence earlier."""

    temperature: float = 0.0
    """Divisor of the logits before sampling; 0 takes the most probable token."""

    top_k: int = 0
    """Sample among this many most probable tokens; 0 is no limit."""

    top_p: float = 1.0
    """Sample among the most probable tokens that together reach this probability."""

    seed: int | None = None
    """Seed of the sampling; None draws one."""

    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence, besides the tokenizer's end of document."""

    ignore_eos: bool = False
    """Do not stop at the tokenizer's end of document."""

    mode: Mode = "full"
    """`full` runs all layers for every token; `early_exit` takes a token from the first exit that
    is confident enough."""

    early_exit_threshold: float | None = None
    """Least confidence (the largest softmax probability) to leave at an exit, 0 to 1; None is 0.8
    in mode `early_exit`."""

    exit_layers: tuple[int, ...] | None = None
    """The exits to use, each named by the number of backbone layers before it; None is all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.exit_layers is not None:
            object.__setattr__(self, "exit_layers", tuple(self.exit_layers))
        self._check("max_tokens", self.max_tokens >= 1, "1 or more")
        in_range = math.isfinite(self.temperature) and self.temperature >= 0
        self._check("temperature", in_range, "0 or more")
        self._check("top_k", self.top_k >= 0, "0 (no limit) or more")
        self._check("top_p", 0 < self.top_p <= 1, "above 0, up to 1")
        in_range = self.seed is None or 0 <= self.seed < 2**63
        self._check("seed", in_range, "0 to 2**63 - 1")
        self._check("mode", self.mode in get_args(Mode), " or ".join(get_args(Mode)))
        threshold = self.early_exit_threshold
        in_range = threshold is None or 0 <= threshold <= 1
        self._check("early_exit_threshold", in_range, "0 to 1")
        if self.mode == "full":
            for name in ("early_exit_threshold", "exit_layers"):
                self._check(name, getattr(self, name) is None, "None with mode='full'")

    def _check(self, name: str, in_range: bool, allowed: str) -> None:
        if not in_range:
            value = getattr(self, name)
            raise ValueError(f"{name} {value!r} is out of range, allowed: {allowed}")

    @property
    def threshold(self) -> float:
        """The threshold that applies in mode `early_exit`."""
        return DEFAULT_THRESHOLD if self.early_exit_threshold is None else self.early_exit_threshold
